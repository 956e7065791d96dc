"""Crystals written as tokens, on the device: from arrays and one key to what the model is trained on.

A text is a list of pieces, and a piece a few tokens whose number only the draw decides: a task not chosen has none, an
atom that is not there has none, a leading digit is one or none. Each piece has slots for its longest, filled from the
left; where it begins in the text is a sum of lengths. From a place in the text to its slot it is then one step further
for every slot left empty before it, a number that only grows:

    slots    <s> Below … ⏎ │ Generate … │ ·  1 │ 5 . 2 ␣ │ … │ ⏎ Na · │ ⏎ 0 . 5 0 ␣ … │ </s>
    place     0   1  …     │ (none)     │    n │ n+1 …   │   │        │               │ last
    shift     0            │            │    s │ s       │   │ s      │ s + 1         │

This equals the tokenizer's own tokens of the text because no piece of the vocabulary joins a digit or a line feed to
anything else, and a space only begins a piece: `TokenTables` reads the vocabulary and refuses one where that is not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

from jaxcrystal.config import ATTRIBUTES, Augment, TextFormat
from jaxcrystal.crystals import prompts
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, ELEMENTS, CrystalBatch
from jaxcrystal.crystals.text import MASK
from jaxcrystal.crystals.tokenizer import SentencePieceTokenizer
from jaxcrystal.errors import UserError

EMPTY = -1  #: no token; only after the tokens that there are


@dataclass(frozen=True)
class TokenTables:
    """The tokens of every piece that a text is made of; ragged tables are padded with EMPTY."""

    digits: Int[np.ndarray, "10"]
    point: int
    space: int
    newline: int
    elements: Int[np.ndarray, "119 element"]  #: by atomic number
    mask: Int[np.ndarray, "mask"]
    introduction: Int[np.ndarray, "introduction"]
    request: Int[np.ndarray, "request"]
    infill_introduction: Int[np.ndarray, "infill_introduction"]
    infill_request: Int[np.ndarray, "infill_request"]
    bos: int
    eos: int
    pad: int

    @classmethod
    def build(cls, tokenizer: SentencePieceTokenizer) -> TokenTables:
        """Reads the pieces off `tokenizer`. Raises UserError if its tokens cannot be written piece by piece."""
        for i, piece in enumerate(tokenizer.pieces):
            joins = len(piece) > 1 and (any(c in "0123456789\n" for c in piece) or " " in piece.lstrip(" "))
            if joins:
                raise UserError(
                    f"{tokenizer.path}: piece {i} {piece!r} joins a digit, a line feed or a space to its neighbour, so "
                    "crystals cannot be written on the device; use a tokenizer that splits digits, as LLaMA-2's does"
                )

        def after(context: str, text: str) -> np.ndarray:
            before, whole = tokenizer.encode(context), tokenizer.encode(context + text)
            if whole[: len(before)] != before:
                raise UserError(f"{tokenizer.path}: the tokens of {context!r} change when {text!r} follows")
            return np.array(whole[len(before) :], np.int32)

        def one(context: str, text: str) -> int:
            tokens = after(context, text)
            if len(tokens) != 1:
                raise UserError(
                    f"{tokenizer.path} writes {text!r} as {len(tokens)} tokens; the device needs it to be one"
                )
            return int(tokens[0])

        return cls(
            digits=np.array([one("\n", str(d)) for d in range(10)], np.int32),
            point=one("\n0", "."),
            space=int(after("\n0", " 0")[0]),
            newline=one("\n0", "\n"),
            elements=_ragged([[], *(after("\n", symbol) for symbol in ELEMENTS[1:])]),
            mask=after("\n", MASK),
            introduction=np.array(tokenizer.encode(prompts.INTRODUCTION), np.int32),
            request=after(prompts.INTRODUCTION, prompts.REQUEST),
            infill_introduction=np.array(tokenizer.encode(prompts.INFILL_INTRODUCTION), np.int32),
            infill_request=after("\n0", prompts.INFILL_REQUEST),
            bos=tokenizer.bos_id,
            eos=tokenizer.eos_id,
            pad=tokenizer.pad_id,
        )


def _ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> Int[np.ndarray, "rows width"]:
    table = np.full((len(rows), max((len(r) for r in rows), default=0)), EMPTY, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table


def sentence_tokens(
    tokenizer: SentencePieceTokenizer, attributes: Sequence[dict[str, Any]], paper_compat: bool = False
) -> Int[np.ndarray, "crystals attributes width"]:
    """The tokens of every condition that could be stated of each crystal, on the host; EMPTY where none is known."""
    start = len(tokenizer.encode(prompts.INTRODUCTION))
    known: dict[str, list[int]] = {}

    def tokens(name: str, label: dict[str, Any]) -> list[int]:
        if label.get(name) is None:
            return []
        text = prompts.sentence(name, label[name], paper_compat)
        if text not in known:
            known[text] = tokenizer.encode(prompts.INTRODUCTION + text)[start:]
        return known[text]

    flat = _ragged([tokens(name, label) for label in attributes for name in ATTRIBUTES])
    return flat.reshape(len(attributes), len(ATTRIBUTES), -1)


def _widen(table: Int[np.ndarray, "*n narrow"], width: int) -> Int[Array, "*n width"]:
    pad = [(0, 0)] * (table.ndim - 1) + [(0, width - table.shape[-1])]
    return jnp.asarray(np.pad(table, pad, constant_values=EMPTY))


@struct.dataclass
class Examples:
    """Crystals to be written, of any leading shape: their arrays, their sentences, and their rows in the data set."""

    crystals: CrystalBatch
    sentences: Int[Array, "*n attributes width"]  #: EMPTY-padded tokens of each condition; all EMPTY where unknown
    index: Int[Array, "*n"]  #: row of the data set: what the draws are keyed by; negative for no crystal at all


@struct.dataclass
class Draws:
    """What chance decided about one crystal (or, with a leading shape, about many)."""

    infill: Bool[Array, "*n"]  #: the infilling task instead of generation
    stated: Int[Array, "*n attributes"]  #: attributes stated in a generation prompt, in order; EMPTY for none
    translation: UInt32[Array, "*n 3"]  #: added to every coordinate, modulo 1, in units of 2⁻³² of the cell edge
    order: Int[Array, "*n atoms"]  #: atoms in the order in which they are written
    masked: Int[Array, "*n"]  #: atomic number that infilling asks for

    def __getitem__(self, index: object) -> Draws:
        return jax.tree.map(lambda x: x[index], self)


@struct.dataclass
class Rows:
    """Packed training rows. Token `t` belongs to crystal `segments[t]` of its row (from 1; 0 is padding)."""

    tokens: Int[Array, "rows length"]
    segments: Int[Array, "rows length"]
    positions: Int[Array, "rows length"]  #: within the crystal's own text
    loss_mask: Bool[Array, "rows length"]  #: tokens that the loss counts, as targets


@struct.dataclass
class Pieces:
    """Pieces of a text, one after the other: the slots of all, and of each how many are filled, from its start on."""

    tokens: Int[Array, "*n slots"]
    lengths: Int[Array, "*n pieces"]
    starts: tuple[int, ...] = struct.field(pytree_node=False)  #: each piece's first slot

    @classmethod
    def of(cls, tokens: Int[Array, "*n slots"]) -> Pieces:
        """One piece, as long as its tokens are not EMPTY."""
        return cls(tokens, (tokens != EMPTY).sum(-1, keepdims=True), (0,))

    def only(self, when: Bool[Array, "*n"]) -> Pieces:
        """Nothing unless `when`."""
        return self.replace(lengths=self.lengths * when[..., None])

    def __add__(self, other: Pieces) -> Pieces:
        starts = tuple(self.tokens.shape[-1] + start for start in other.starts)
        join = lambda a, b: jnp.concatenate([a, b], axis=-1)  # noqa: E731
        return Pieces(join(self.tokens, other.tokens), join(self.lengths, other.lengths), self.starts + starts)

    def joined(self) -> Pieces:
        """The last leading axis one after the other."""
        count, width = self.tokens.shape[-2:]
        flat = lambda x: x.reshape(*x.shape[:-2], -1)  # noqa: E731
        starts = tuple(i * width + start for i in range(count) for start in self.starts)
        return Pieces(flat(self.tokens), flat(self.lengths), starts)


def decimal(
    x: UInt32[Array, "*n"], bits: int, decimals: int, truncate: bool = False
) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """Whole part and `decimals` digits of x·2⁻ᵇⁱᵗˢ, rounded exactly as Python's `format` does, or cut off.

    The fraction is kept as 32 bits. Ten times it, as a 64-bit product in two halves, pushes out the next digit; what
    stays is compared with one half, a tie going to the even neighbour.
    """
    whole = x >> bits if bits < 32 else jnp.zeros_like(x)
    rest = x << (32 - bits)
    digits = jnp.zeros_like(x)
    for _ in range(decimals):
        high, low = (rest >> 16) * 10, (rest & 0xFFFF) * 10
        digits = digits * 10 + ((high + (low >> 16)) >> 16)
        rest = rest * 10
    if not truncate:
        odd = (digits if decimals else whole) % 2 == 1
        half = jnp.uint32(1 << 31)
        digits = digits + ((rest > half) | ((rest == half) & odd))
    carry = digits == 10**decimals
    return (whole + carry).astype(jnp.int32), jnp.where(carry, 0, digits).astype(jnp.int32)


@dataclass(frozen=True)
class Writer:
    """Draws and writes. All methods are pure and run under `jit`; the settings are compiled in."""

    tables: TokenTables
    text: TextFormat
    augment: Augment

    def draw(self, key: PRNGKeyArray, examples: Examples) -> Draws:
        """Draws for each example; they depend on `key` and the example's `index` alone."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[examples.index.ndim :]), examples)
        draws = jax.vmap(self._draw, in_axes=(None, 0))(key, flat)
        return jax.tree.map(lambda x: x.reshape(*examples.index.shape, *x.shape[1:]), draws)

    def _draw(self, key: PRNGKeyArray, example: Examples) -> Draws:
        k_task, k_state, k_order, k_shift, k_atoms, k_mask = jax.random.split(jax.random.fold_in(key, example.index), 6)
        crystal = example.crystals
        max_atoms = crystal.species.shape[0]
        present = jnp.arange(max_atoms) < crystal.num_atoms
        shuffle = jax.random.uniform(k_atoms, (max_atoms,)) if self.augment.permute else jnp.arange(max_atoms)
        return Draws(
            infill=jax.random.bernoulli(k_task, float(self.augment.infill)),
            stated=self._stated(k_state, k_order, known=(example.sentences != EMPTY).any(-1)),
            translation=jax.random.bits(k_shift, (3,), jnp.uint32) * jnp.uint32(self.augment.translate),
            order=jnp.argsort(jnp.where(present, shuffle, max_atoms), stable=True),
            masked=crystal.species[jax.random.randint(k_mask, (), 0, jnp.maximum(crystal.num_atoms, 1))],
        )

    def _stated(
        self, k_state: PRNGKeyArray, k_order: PRNGKeyArray, known: Bool[Array, "attributes"]
    ) -> Int[Array, "attributes"]:
        count, formula = len(ATTRIBUTES), ATTRIBUTES.index("pretty_formula")
        known &= np.isin(ATTRIBUTES, self.augment.attributes)
        rank = jax.random.uniform(k_order, (count,))
        if self.text.paper_compat:
            # The original: a uniform number of these, chosen at random; the formula before them, if there are any.
            others = known & ~np.isin(ATTRIBUTES, ("pretty_formula", "elements"))
            place = jnp.argsort(jnp.argsort(jnp.where(others, rank, 2.0)))
            stated = others & (place < jax.random.randint(k_state, (), 0, others.sum() + 1))
            stated = stated.at[formula].set(known[formula] & stated.any())
            rank = rank.at[formula].set(-1.0)
        else:
            stated = known & jax.random.bernoulli(k_state, float(self.augment.attribute_probability), (count,))
        order = jnp.argsort(jnp.where(stated, rank, 2.0))
        return jnp.where(stated[order], order, EMPTY)

    def lengths(self, examples: Examples, draws: Draws) -> Int[Array, "*n"]:
        """Number of tokens of each text; what packing must know before the rows are written."""
        return self._pieces(examples, draws)[0].lengths.sum(-1)

    def bounds(self, examples: Examples) -> tuple[Int[np.ndarray, "crystals"], Int[np.ndarray, "crystals"]]:
        """Number of tokens of each crystal's shortest and longest possible text, whatever is drawn; on the host."""
        t, crystals = self.tables, jax.device_get(examples.crystals)
        shape = crystals.species.shape
        nothing = Draws(
            infill=np.zeros(shape[0], bool),
            stated=np.full((shape[0], len(ATTRIBUTES)), EMPTY),
            translation=np.zeros((shape[0], 3), np.uint32),
            order=np.broadcast_to(np.arange(shape[1]), shape),
            masked=np.zeros(shape[0], np.int32),
        )
        bare = np.asarray(jax.jit(self.lengths)(examples, nothing))
        sentences = (np.asarray(examples.sentences) != EMPTY).sum((1, 2)) * (self.augment.attribute_probability > 0)
        # Infilling writes [MASK] for every atom of one element, and the element once more at the end.
        symbol = (t.elements != EMPTY).sum(1)[crystals.species]
        same = (crystals.species[:, :, None] == crystals.species[:, None, :]).sum(2)
        change = same * (len(t.mask) - symbol) + symbol
        frame = len(t.infill_introduction) + len(t.infill_request) - len(t.introduction) - len(t.request)
        present = crystals.species > 0
        most = bare + frame + np.where(present, change, change.min()).max(1)
        least = bare + frame + np.where(present, change, change.max()).min(1)
        if self.augment.infill == 0:
            return bare, bare + sentences
        if self.augment.infill == 1:
            return least, most
        return np.minimum(bare, least), np.maximum(bare + sentences, most)

    def write(self, examples: Examples, draws: Draws, length: int) -> Rows:
        """Rows of `length` tokens from examples [rows, slots]: the crystals of a row one after the other.

        Tokens beyond `length` are cut off: pack by `lengths`.
        """
        text, answer = self._pieces(examples, draws)
        rows, crystals, slots = text.tokens.shape
        lengths = text.lengths.reshape(rows, -1)
        begins = jnp.cumsum(lengths, axis=1) - lengths
        firsts = (slots * np.arange(crystals)[:, None] + np.array(text.starts)).reshape(-1)
        # Rows lie in one list, with a place for what is cut off behind each: XLA then needs no pairs of indices. Of
        # pieces that begin at one place, all but the last are empty, and it has the largest shift.
        at = jnp.minimum(begins, length) + (length + 1) * jnp.arange(rows)[:, None]
        shifts = jnp.zeros(rows * (length + 1), jnp.int32).at[at.reshape(-1)].max((firsts - begins).reshape(-1))
        # A running maximum in a tree: on a CPU three times as fast as `cummax`.
        shift = jax.lax.associative_scan(jnp.maximum, shifts.reshape(rows, -1)[:, :length], axis=1)
        here = jnp.arange(length)
        slot = jnp.minimum(here + shift, crystals * slots - 1) + crystals * slots * jnp.arange(rows)[:, None]
        tokens = text.tokens.reshape(-1).at[slot].get(mode="promise_in_bounds")

        ends = jnp.cumsum(text.lengths.sum(-1), axis=1)
        ended = (ends[:, None, :] <= here[:, None]).sum(-1)  # crystals of the row that end before this place
        current = jnp.minimum(ended, crystals - 1)
        begin = jnp.take_along_axis(ends - text.lengths.sum(-1), current, axis=1)
        answered = jnp.take_along_axis(ends - answer, current, axis=1)
        written = here < ends[:, -1:]
        return Rows(
            tokens=jnp.where(written, tokens, self.tables.pad),
            segments=jnp.where(written, ended + 1, 0),
            positions=jnp.where(written, here - begin, 0),
            loss_mask=written & ((here >= answered) | (self.augment.loss_on == "all")),
        )

    def _pieces(self, examples: Examples, draws: Draws) -> tuple[Pieces, Int[Array, "*n"]]:
        """Each text, and how many tokens at its end are its answer."""
        write = self._write_one
        for _ in range(examples.index.ndim):
            write = jax.vmap(write)
        return write(examples, draws)

    def _write_one(self, example: Examples, draws: Draws) -> tuple[Pieces, Int[Array, ""]]:
        t, infill, exists = self.tables, draws.infill, example.index >= 0
        fixed = lambda tokens: Pieces.of(jnp.asarray(tokens))  # noqa: E731
        stated = jnp.where((draws.stated != EMPTY)[:, None], example.sentences[draws.stated], EMPTY)
        body, end = self._body(example.crystals, draws), fixed([t.eos])
        element = Pieces.of(jnp.asarray(t.elements)[draws.masked])
        generation = fixed(t.introduction) + Pieces.of(stated).joined() + fixed(t.request)
        text = (
            fixed([t.bos])
            + generation.only(~infill)
            + fixed(t.infill_introduction).only(infill)
            + body
            + (fixed(t.infill_request) + element).only(infill)
            + end
        ).only(exists)
        answer = jnp.where(infill, element.lengths.sum(), body.lengths.sum()) + 1
        return text, answer * exists

    def _body(self, crystal: CrystalBatch, draws: Draws) -> Pieces:
        """The crystal's own text: the line of lengths, the line of angles, then two lines an atom."""
        t, fmt = self.tables, self.text
        lengths = decimal(crystal.lengths, CELL_BITS, fmt.length_decimals)
        angles = decimal(crystal.angles, CELL_BITS, fmt.angle_decimals, truncate=fmt.paper_compat)
        cell = [
            self._number(whole[i], digits[i], decimals, after)
            for (whole, digits), decimals, last in (
                (lengths, fmt.length_decimals, [t.newline]),
                (angles, fmt.angle_decimals, []),
            )
            for i, after in enumerate(([t.space], [t.space], last))
        ]

        species = crystal.species[draws.order]
        width = max(t.elements.shape[1], len(t.mask))
        hidden = draws.infill & (species == draws.masked)
        element = jnp.where(hidden[:, None], _widen(t.mask, width), _widen(t.elements, width)[species])
        whole, digits = decimal(crystal.frac_coords[draws.order] + draws.translation, COORD_BITS, fmt.coord_decimals)
        if not fmt.paper_compat:
            whole = jnp.zeros_like(whole)  # 1.00 is 0.00 of the next cell
        newline, space = (jnp.full_like(species, token) for token in (t.newline, t.space))
        numbers = [self._digits(whole[:, i], digits[:, i], fmt.coord_decimals) for i in range(3)]
        coords = jnp.stack([newline, *numbers[0], space, *numbers[1], space, *numbers[2]], axis=-1)
        atoms = Pieces.of(jnp.concatenate([newline[:, None], element], axis=-1)) + Pieces.of(coords)
        present = jnp.arange(len(species)) < crystal.num_atoms
        return sum(cell[1:], cell[0]) + atoms.only(present).joined()

    def _number(self, whole: Int[Array, ""], digits: Int[Array, ""], decimals: int, after: list[int]) -> Pieces:
        """A number below 1000 without leading zeros, and what follows it."""
        digit = jnp.asarray(self.tables.digits)
        leading = [Pieces.of(digit[whole // power % 10][None]).only(whole >= power) for power in (100, 10)]
        rest = [*self._digits(whole % 10, digits, decimals), *(jnp.asarray(token) for token in after)]
        return leading[0] + leading[1] + Pieces.of(jnp.stack(rest))

    def _digits(self, whole: Int[Array, "*n"], digits: Int[Array, "*n"], decimals: int) -> list[Int[Array, "*n"]]:
        """Tokens of a number below 10; the decimal point only before decimals."""
        digit = jnp.asarray(self.tables.digits)
        point = [jnp.full_like(whole, self.tables.point)] if decimals else []
        return [digit[whole], *point, *(digit[digits // 10**power % 10] for power in reversed(range(decimals)))]
