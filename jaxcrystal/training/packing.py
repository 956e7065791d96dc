"""Several crystals in one row: which of them share it.

    row 0   │ crystal 17 ──────────── │ crystal 4 ───── │ crystal 230 ──────── │ · · │
    row 1   │ crystal 8 ─────────────────────────────── │ crystal 51 ─── │ · · · · · │
                                                                           padding

The lengths of all texts of an epoch are known before any is written: they follow from the epoch's draws (task and
sentences), and translation, permutation and digits do not change them. So rows are packed exactly, with no reserve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray

from jaxcrystal.config import ATTRIBUTES, Property
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.tokenizer import Tokenizer
from jaxcrystal.texts.writer import Examples, Writer, sentence_tokens

SPARE_SLOTS = 1.25  #: room for crystals in a row, over the number that fills it on average; each costs time to write
OPEN_ROWS = 64  #: rows that a crystal may still join; more of them pack no tighter and shuffle less
ONE_DESCRIPTION = (
    "the package's own data have one description of each crystal: run `jaxcrystal prepare mp20 --out DIR`, which finds "
    "all, and train on what it writes to DIR"
)
PREPARED_BEFORE = "the training data lack the descriptions that hide an element, as all did before: prepare them again"


def pack(lengths: Sequence[int], order: Sequence[int], row_length: int, slots: int | None = None) -> list[list[int]]:
    """Rows of crystals, each put into the first open row that has room for it (first fit), in the given order.

    A row takes no more than `slots` of them; None: as many as fit.
    """
    done: list[list[int]] = []
    rows: list[list[int]] = []
    room: list[int] = []
    for crystal in order:
        length = int(lengths[crystal])
        at = next((i for i, left in enumerate(room) if left >= length), None)
        if at is None:
            if len(rows) == OPEN_ROWS:
                fullest = int(np.argmin(room))
                done.append(rows.pop(fullest))
                room.pop(fullest)
            rows.append([])
            room.append(row_length)
            at = len(rows) - 1
        rows[at].append(crystal)
        room[at] -= length
        if len(rows[at]) == slots:
            done.append(rows.pop(at))
            room.pop(at)
    return done + rows


@dataclass(frozen=True, eq=False)
class Feed:
    """A data set as batches of packed rows; epoch `n` of a seed is the same on every host and at every call."""

    examples: Examples  #: numpy arrays of the whole set
    ids: Sequence[str]  #: what the set calls its crystals
    labels: Sequence[Mapping[str, Any]]  #: what prompts may state of each
    writer: Writer
    row_length: int
    rows_per_batch: int
    slots: int  #: crystals that a row has room for
    seed: int
    together: int = 1  #: so many crystals, one after the other in the set, stand side by side in a row

    @classmethod
    def of(
        cls,
        crystals: CrystalSet,
        tokenizer: Tokenizer,
        writer: Writer,
        row_length: int,
        rows_per_batch: int,
        seed: int,
    ) -> Feed:
        """Raises UserError for an empty set, or if some text could be longer than a row."""
        if not len(crystals):
            raise UserError("the data set is empty; nothing can be trained on it")
        if writer.augment.descriptions and crystals.canonical:
            raise UserError(f"augment.descriptions is true, but {ONE_DESCRIPTION}")
        arrays = writer.form.arrays(crystals)
        labels = writer.form.stated(crystals, arrays)
        examples = Examples(
            crystals=arrays,
            sentences=sentence_tokens(tokenizer, labels, writer.form.text),
            index=np.arange(len(crystals), dtype=np.int32),
        )
        shortest, longest = writer.bounds(examples)
        worst = int(np.argmax(longest))
        if longest[worst] > row_length:
            raise UserError(
                f"crystal {crystals.ids[worst]} can take {longest[worst]} tokens, a row holds {row_length}; "
                f"set data.tokens_per_row to {longest[worst]} or more, or prepare with fewer --max-atoms"
            )
        slots = min(row_length // int(shortest.min()), math.ceil(SPARE_SLOTS * row_length / shortest.mean()))
        return cls(examples, crystals.ids, labels, writer, row_length, rows_per_batch, slots, seed)

    def key(self, epoch: int) -> PRNGKeyArray:
        """The key of all draws of an epoch; with a crystal's index it decides how that crystal is written."""
        return jax.random.fold_in(jax.random.key(self.seed), epoch)

    def epoch(self, number: int) -> Int[np.ndarray, "batches rows slots"]:
        """Which crystals stand in each row of each batch of an epoch; -1 fills slots, and rows of the last batch."""
        side_by_side = np.arange(len(self.examples.index)).reshape(-1, self.together)
        lengths = np.asarray(self._lengths(self.key(number), self.examples))[side_by_side].sum(1)
        order = np.random.default_rng([self.seed, number]).permutation(len(lengths))
        rows = pack(lengths, order, self.row_length, self.slots // self.together)
        batches = -(-len(rows) // self.rows_per_batch)
        table = np.full((batches * self.rows_per_batch, self.slots), -1, np.int32)
        for row, chosen in zip(table, rows, strict=False):
            crystals = side_by_side[chosen].ravel()
            row[: len(crystals)] = crystals
        return table.reshape(batches, self.rows_per_batch, self.slots)

    def batch(self, crystals: Int[np.ndarray, "rows slots"]) -> Examples:
        """The arrays of the crystals of one batch, gathered on the host."""
        return jax.tree.map(lambda x: x[crystals], self.examples).replace(index=crystals)

    def placed(self, crystals: Int[np.ndarray, "rows slots"], sharding: NamedSharding) -> Examples:
        """`batch` on the devices; each host gathers the rows of its own devices, no others."""

        def gather(x: np.ndarray) -> Array:
            shape = crystals.shape + x.shape[1:]
            return jax.make_array_from_callback(shape, sharding, lambda index: x[crystals[index[0]]])

        index = jax.make_array_from_callback(crystals.shape, sharding, lambda index: crystals[index])
        return jax.tree.map(gather, self.examples).replace(index=index)

    def nothing(self) -> Examples:
        """A batch of empty rows, to compile for."""
        return self.batch(np.full((self.rows_per_batch, self.slots), -1, np.int32))

    def names(self, crystals: Int[np.ndarray, "rows slots"]) -> list[str]:
        """The ids of the crystals of one batch, row by row."""
        return [self.ids[i] for i in crystals.ravel() if i >= 0]

    def told(self) -> list[str]:
        """What the sentences of one's own properties cost, a line each."""
        first = len(ATTRIBUTES)
        tokens = (self.examples.sentences[:, first:] != EMPTY).sum(-1)
        return [
            f"{own.name}: known of {(of > 0).sum():,} crystals, its sentence takes {of[of > 0].mean():.0f} tokens"
            for own, of in zip(self.writer.form.text.properties, tokens.T, strict=True)
        ]

    @cached_property
    def _lengths(self) -> Callable[[PRNGKeyArray, Examples], Int[Array, "crystals"]]:
        return jax.jit(lambda key, examples: self.writer.lengths(examples, self.writer.draw(key, examples)))


def check_infilling(feed: Feed, crystals: CrystalSet) -> None:
    """Raises UserError where infilling a training set would be no riddle, since the only description of a crystal
    depends on all of its elements."""
    augment = feed.writer.augment
    if augment.infill and not feed.writer.form.hides(feed.examples.crystals):
        why = ONE_DESCRIPTION if crystals.canonical else PREPARED_BEFORE
        raise UserError(f"augment.infill is {augment.infill}, and a canonical description tells what it hides; {why}")


def check_properties(crystals: CrystalSet, properties: Sequence[Property]) -> None:
    """Raises UserError where a training set does not have what a recipe names, or has text where it says number."""
    for own in properties:
        if own.name not in crystals.labels.column_names:
            known = ", ".join(name for name in crystals.labels.column_names if name not in ATTRIBUTES) or "none"
            raise UserError(
                f"text.properties names {own.name!r}, which the data set does not have; its own labels: {known} "
                "(`jaxcrystal prepare --labels` adds some)"
            )
        column = crystals.labels[own.name]
        if column.null_count == len(column):
            raise UserError(f"text.properties names {own.name!r}, which no crystal of the data set has")
        is_text = pa.types.is_string(column.type)
        if is_text != (own.decimals is None):
            row = next(i for i, value in enumerate(column) if value.is_valid)
            found, remedy = ("text", "null") if is_text else ("a number", "a number of decimals")
            raise UserError(
                f"text.properties: {own.name!r} is {found} in the data set ({column[row].as_py()!r} of crystal "
                f"{crystals.ids[row]}); set its decimals to {remedy}"
            )
