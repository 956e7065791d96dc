"""Pairs of crystals, of which one is preferred, as rows of tokens.

    pairs.parquet    preferred  dispreferred  conditions
                     mine-17    mine-4        {"pretty_formula": "SrTiO3"}

    row │ <prompt> mine-17 │ <prompt> mine-4 │ <prompt> mine-8 │ <prompt> mine-51 │ · · │
          └────────── pair 0 ──────────────┘   └────────── pair 3 ──────────────┘

Ids are those of `data.train`. What the prompt states is the pair's, in the spelling of a ledger's column `conditions`,
and not the crystals' own labels: both follow the prompt that they were drawn from, whether they keep to it or not. It
is stated whole and in the order of `TextFormat.attributes`. A pair's crystals stand side by side in a row, so that no
device needs another's for it, and each has draws of its own: translation, order, description.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, PRNGKeyArray

from jaxcrystal.config import Property, Recipe
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.paths import local
from jaxcrystal.texts.conditions import Range, checked
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.tokenizer import Tokenizer
from jaxcrystal.texts.writer import Draws, Examples, Writer, sentence_tokens
from jaxcrystal.training.packing import SPARE_SLOTS, Feed


class PairWriter(Writer):
    """Writes crystals behind prompts that state all that there is to state; the loss is of what comes behind them."""

    @classmethod
    def like(cls, writer: Writer) -> PairWriter:
        """With the form, tables and augmentations of another, as far as they are of crystals."""
        augment = replace(writer.augment, infill=0.0, attribute_probability=1.0, loss_on="response")
        return cls(writer.form, writer.tables, augment)

    def draw(self, key: PRNGKeyArray, examples: Examples) -> Draws:
        known = (examples.sentences != EMPTY).any(-1)
        order = jnp.argsort(~known, axis=-1, stable=True)
        stated = jnp.where(jnp.take_along_axis(known, order, axis=-1), order, EMPTY)
        return super().draw(key, examples).replace(stated=stated)


def feed(recipe: Recipe, crystals: CrystalSet, tokenizer: Tokenizer, writer: Writer) -> Feed:
    """The pairs of a recipe as batches: crystals 2 i and 2 i + 1 of its examples are pair i, the preferred one first.

    Raises UserError, naming file and row, for what is no table of pairs of `crystals`, or a pair longer than a row.
    """
    path, row_length = recipe.preferences.pairs, recipe.data.tokens_per_row
    rows, conditions = _read(path, crystals, recipe.data.train, recipe.text.properties)
    pair_writer = PairWriter.like(writer)
    arrays = writer.form.arrays(crystals)
    stated = [each for each in conditions for _ in range(2)]
    examples = Examples(
        crystals=jax.tree.map(lambda x: x[rows.ravel()], arrays),
        sentences=sentence_tokens(tokenizer, stated, recipe.text),
        index=np.arange(rows.size, dtype=np.int32),
    )
    shortest, longest = (bound.reshape(-1, 2).sum(1) for bound in pair_writer.bounds(examples))
    worst = int(np.argmax(longest))
    if longest[worst] > row_length:
        raise UserError(
            f"{path}: the pair of row {worst} can take {longest[worst]} tokens, a row holds {row_length}; set "
            f"data.tokens_per_row to {longest[worst]} or more"
        )
    in_row = min(row_length // int(shortest.min()), math.ceil(SPARE_SLOTS * row_length / shortest.mean()))
    ids = [crystals.ids[i] for i in rows.ravel()]
    return Feed(
        examples, ids, stated, pair_writer, row_length, recipe.data.rows_per_batch, 2 * in_row, recipe.seed, together=2
    )


def _read(
    path: str, crystals: CrystalSet, where: str, properties: Sequence[Property]
) -> tuple[Int[np.ndarray, "pairs 2"], list[dict[str, Any]]]:
    """Rows of `crystals`, the preferred one first, and what each pair's prompt states."""
    try:
        with local(path).open("rb") as file:
            table = pq.ParquetFile(file).read()
    except OSError as error:
        raise UserError(f"cannot read the pairs {path}: {error.strerror or error}") from None
    except pa.ArrowInvalid:
        raise UserError(f"{path} is no parquet file; preferences.pairs is a table of pairs") from None
    for column in ("preferred", "dispreferred"):
        if column not in table.column_names:
            raise UserError(f"{path} has no column {column!r}, of ids of crystals of {where}")
    if not len(table):
        raise UserError(f"{path} has no pairs; nothing can be trained on it")
    there, twice = {name: i for i, name in enumerate(crystals.ids)}, Counter(crystals.ids)
    rows, conditions = np.zeros((len(table), 2), np.int64), []
    for number, pair in enumerate(table.to_pylist()):
        names = pair["preferred"], pair["dispreferred"]
        for name in names:
            if twice[name] != 1:
                has = f"has {twice[name]} crystals" if twice[name] else "has no crystal"
                raise UserError(f"{path}, row {number}: {where} {has} {name!r}; a pair names one by its id")
        if names[0] == names[1]:
            raise UserError(f"{path}, row {number}: {names[0]!r} is preferred to itself; a pair is of two crystals")
        rows[number] = [there[name] for name in names]
        conditions.append(_conditions(pair.get("conditions"), f"{path}, row {number}", properties))
    return rows, conditions


def _conditions(text: Any, where: str, properties: Sequence[Property]) -> dict[str, Any]:
    """What JSON states, spelled as training texts spell it. Raises UserError for what no prompt can state."""
    try:
        stated = json.loads(text or "{}")
    except (TypeError, ValueError):
        stated = None
    if not isinstance(stated, dict):
        raise UserError(f'{where}: conditions {text!r} is no JSON object, such as {{"pretty_formula": "SrTiO3"}}')
    try:
        found = checked(stated, tuple(properties))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name, value in found.items():
        if isinstance(value, Range):
            raise UserError(f"{where}: {name} is a range; a prompt states a value")
    return found
