"""Crystals written as tokens, on the device: from arrays and one key to what the model is trained on.

A text is a list of pieces. The tokens of all pieces lie in one list for the whole batch: those of the prompts and of
each element once, those of every number where it was made. A piece says where its tokens start there and how many they
are: none for a task not chosen or an atom that is not there, and a number starts behind its leading zeros.

    list     <s> Below … │ Generate … │ H ⏎ │ He ⏎ │ … │ 0 0 5 . 2 ␣ │ 1 2 0 ␣ │ … │ 0 . 5 0 ␣ 0 . 5 0 ␣ … ⏎ │ …
    text     <s> Below … │ Generate … │ 5 . 2 ␣ │ … │ Na ⏎ │ 0 . 5 0 ␣ … ⏎ │ … │ </s>

From a place in the text to its token's place in the list is a step that is the same all along a piece. The difference
to the step before is added where the piece begins, and a cumulative sum makes the steps of all places.

This equals the tokenizer's own tokens of the text because no piece of the vocabulary joins a digit or a line feed to
anything else, and a space only begins a piece: `TokenTables` reads the vocabulary and refuses one where that is not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, PRNGKeyArray, UInt32

from jaxcrystal.config import ATTRIBUTES, Augment, TextFormat
from jaxcrystal.crystals import prompts
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, ELEMENTS, CrystalBatch
from jaxcrystal.crystals.text import MASK
from jaxcrystal.crystals.tokenizer import SentencePieceTokenizer
from jaxcrystal.errors import UserError

EMPTY = -1  #: no token; only behind the tokens of a row


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
            introduction=np.array([tokenizer.bos_id, *tokenizer.encode(prompts.INTRODUCTION)], np.int32),
            request=after(prompts.INTRODUCTION, prompts.REQUEST),
            infill_introduction=np.array([tokenizer.bos_id, *tokenizer.encode(prompts.INFILL_INTRODUCTION)], np.int32),
            infill_request=after("\n0", prompts.INFILL_REQUEST),
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
    """Where the tokens of some pieces start in the list of tokens, and how many they are."""

    start: Int[Array, "*n"]
    length: Int[Array, "*n"]

    def __getitem__(self, index: object) -> Pieces:
        return jax.tree.map(lambda x: x[index], self)

    def only(self, when: Bool[Array, "*n"]) -> Pieces:
        """Nothing unless `when`."""
        return self.replace(length=self.length * when)

    def without_first(self, count: Int[Array, "*n"]) -> Pieces:
        return Pieces(self.start + count, self.length - count)

    def without_last(self, count: Int[Array, "*n"]) -> Pieces:
        return self.replace(length=self.length - count)

    @staticmethod
    def joined(shape: tuple[int, ...], *parts: Pieces) -> Pieces:
        """One after the other along a last axis; each part has `shape`, or that and an axis of pieces of its own."""

        def join(*xs: Int[Array, "..."]) -> Int[Array, "*n pieces"]:
            wide = [x if x.ndim > len(shape) else x[..., None] for x in xs]
            return jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in wide], axis=-1)

        return jax.tree.map(join, *parts)


class TokenList:
    """The list of tokens, while its pieces are laid down."""

    def __init__(self) -> None:
        self.tables: list[Int[Array, "any"]] = []
        self.size = 0

    def lay(self, table: Int[Array, "*n width"]) -> Pieces:
        """A piece for each row, of the tokens before its first EMPTY."""
        *shape, width = table.shape
        start = self.size + width * np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
        self.tables.append(jnp.ravel(table))
        self.size += table.size
        return Pieces(jnp.asarray(start), jnp.asarray((table != EMPTY).sum(-1)))

    def tokens(self) -> Int[Array, "size"]:
        return jnp.concatenate(self.tables)


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
        crystal, count = example.crystals, len(ATTRIBUTES)
        atoms = jnp.arange(crystal.species.shape[0])
        words = jax.random.bits(jax.random.fold_in(key, example.index), (5 + 2 * count + len(atoms),), jnp.uint32)
        task, atom, shift, state = words[0], words[1], words[2:5], words[5:-len(atoms)]  # the atoms', of any number, last
        if self.augment.permute:
            order = _shuffled(words[-len(atoms) :], atoms < crystal.num_atoms)
        else:
            order = atoms
        return Draws(
            infill=_uniform(task) < self.augment.infill,
            stated=self._stated(state[:count], state[count:], known=example.sentences[:, 0] != EMPTY),
            translation=shift * jnp.uint32(self.augment.translate),
            order=order,
            masked=crystal.species[atom % jnp.maximum(crystal.num_atoms, 1)],
        )

    def _stated(
        self,
        chance: UInt32[Array, "attributes"],
        places: UInt32[Array, "attributes"],
        known: Bool[Array, "attributes"],
    ) -> Int[Array, "attributes"]:
        known &= np.isin(ATTRIBUTES, self.augment.attributes)
        if not self.text.paper_compat:
            stated = known & (_uniform(chance) < self.augment.attribute_probability)
            order = _shuffled(places, stated)
            return jnp.where(stated[order], order, EMPTY)
        # The original: a uniform number of these, chosen at random; the formula before them, if there are any.
        formula = ATTRIBUTES.index("pretty_formula")
        others = known & ~np.isin(ATTRIBUTES, ("pretty_formula", "elements"))
        number = chance[0] % (others.sum() + 1)
        stated = jnp.where(jnp.arange(len(ATTRIBUTES)) < number, _shuffled(places, others), EMPTY)
        first = jnp.where(known[formula] & (number > 0), formula, EMPTY)
        return jnp.concatenate([first[None], stated[:-1]])

    def lengths(self, examples: Examples, draws: Draws) -> Int[Array, "*n"]:
        """Number of tokens of each text; what packing must know before the rows are written."""
        return self._pieces(examples, draws)[1].length.sum(-1)

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
        tokens, text, answer = self._pieces(examples, draws)
        rows, crystals, _ = text.length.shape
        lengths = text.length.reshape(rows, -1)
        begins = jnp.cumsum(lengths, axis=1) - lengths
        steps = text.start.reshape(rows, -1) - begins
        # Rows lie in one list, with a place for what is cut off behind each: XLA then needs no pairs of indices. Of
        # pieces that begin at one place, all but the last are empty, and the differences add up to its step.
        at = jnp.minimum(begins, length) + (length + 1) * jnp.arange(rows)[:, None]
        differences = jnp.diff(steps, axis=1, prepend=0)
        added = jnp.zeros(rows * (length + 1), jnp.int32).at[at.reshape(-1)].add(differences.reshape(-1))
        # A sum in a tree: on a CPU three times as fast as `cumsum`.
        step = jax.lax.associative_scan(jnp.add, added.reshape(rows, -1)[:, :length], axis=1)
        here = jnp.arange(length)

        ends = jnp.cumsum(text.length.sum(-1), axis=1)
        ended = (ends[:, None, :] <= here[:, None]).sum(-1)  # crystals of the row that end before this place
        current = jnp.minimum(ended, crystals - 1)
        begin = jnp.take_along_axis(ends - text.length.sum(-1), current, axis=1)
        answered = jnp.take_along_axis(ends - answer, current, axis=1)
        written = here < ends[:, -1:]
        return Rows(
            tokens=jnp.where(written, tokens.at[here + step].get(mode="clip"), self.tables.pad),
            segments=jnp.where(written, ended + 1, 0),
            positions=jnp.where(written, here - begin, 0),
            loss_mask=written & ((here >= answered) | (self.augment.loss_on == "all")),
        )

    def _pieces(self, examples: Examples, draws: Draws) -> tuple[Int[Array, "size"], Pieces, Int[Array, "*n"]]:
        """The list of tokens, the pieces of each text in it, and how many tokens at the end of a text are its answer."""
        t, infill, exists = self.tables, draws.infill, examples.index >= 0
        tokens = TokenList()
        generation, infilling = tokens.lay(t.introduction), tokens.lay(t.infill_introduction)
        introduction = jax.tree.map(partial(jnp.where, infill), infilling, generation)
        sentences = tokens.lay(examples.sentences)
        stated = jax.tree.map(lambda x: jnp.take_along_axis(x, draws.stated, axis=-1), sentences)
        body = self._body(tokens, examples.crystals, draws)
        asked = tokens.lay(t.elements)[draws.masked]
        text = Pieces.joined(
            infill.shape,
            introduction,
            stated.only((draws.stated != EMPTY) & ~infill[..., None]),
            tokens.lay(t.request).only(~infill),
            body,
            tokens.lay(t.infill_request).only(infill),
            asked.only(infill),
            tokens.lay(np.array([t.eos])),
        )
        answer = jnp.where(infill, asked.length, body.length.sum(-1)) + 1
        return tokens.tokens(), text.only(exists[..., None]), answer * exists

    def _body(self, tokens: TokenList, crystal: CrystalBatch, draws: Draws) -> Pieces:
        """The crystals' own texts: the line of lengths, the line of angles, then two lines an atom."""
        t, fmt = self.tables, self.text
        ordered = partial(jnp.take_along_axis, indices=draws.order, axis=-1)
        whole, digits = decimal(crystal.lengths, CELL_BITS, fmt.length_decimals)
        lengths = self._below_1000(tokens, whole, digits, fmt.length_decimals)
        whole, digits = decimal(crystal.angles, CELL_BITS, fmt.angle_decimals, truncate=fmt.paper_compat)
        angles = self._below_1000(tokens, whole, digits, fmt.angle_decimals)

        species = ordered(crystal.species)
        line = lambda symbol: np.append(symbol[symbol != EMPTY], t.newline)  # noqa: E731
        elements, mask = tokens.lay(_ragged([line(symbol) for symbol in t.elements])), tokens.lay(line(t.mask))
        hidden = draws.infill[..., None] & (species == draws.masked[..., None])
        element = jax.tree.map(partial(jnp.where, hidden), mask, elements[species])
        place = jnp.take_along_axis(crystal.frac_coords, draws.order[..., None], axis=-2) + draws.translation[..., None, :]
        whole, digits = decimal(place, COORD_BITS, fmt.coord_decimals)
        if not fmt.paper_compat:
            whole = jnp.zeros_like(whole)  # 1.00 is 0.00 of the next cell
        table = self._digits(whole, digits, 1, fmt.coord_decimals)
        coords = tokens.lay(table.reshape(*species.shape, -1))
        atom = jnp.arange(species.shape[-1])
        number = crystal.num_atoms[..., None]
        atoms = jax.tree.map(
            lambda *x: jnp.stack(x, axis=-1).reshape(*species.shape[:-1], -1),
            element.only(atom < number),
            coords.only(atom < number).without_last(atom == number - 1),
        )
        return Pieces.joined(draws.infill.shape, lengths, angles, atoms)

    def _below_1000(self, tokens, whole, digits, decimals):
        zeros = (whole < 100).astype(jnp.int32) + (whole < 10)
        return tokens.lay(self._digits(whole, digits, 3, decimals)).without_first(zeros)

    def _digits(self, whole, digits, places: int, decimals: int) -> Int[Array, "*n 3 width"]:
        """Three numbers and what follows each; the decimal point only before decimals."""
        digit = jnp.asarray(self.tables.digits)
        ends = jnp.array([self.tables.space, self.tables.space, self.tables.newline])
        columns = [digit[whole // 10**power % 10] for power in reversed(range(places))]
        columns += [jnp.full_like(whole, self.tables.point)] * (decimals > 0)
        columns += [digit[digits // 10**power % 10] for power in reversed(range(decimals))]
        return jnp.stack([*columns, jnp.broadcast_to(ends, whole.shape)], axis=-1)


def _uniform(words: UInt32[Array, "*n"]) -> Float32[Array, "*n"]:
    """In [0, 1)."""
    return (words >> 8).astype(jnp.float32) * 2.0**-24


def _shuffled(words: UInt32[Array, "n"], chosen: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The numbers below n in a random order, the `chosen` first: each is put in the last bits of a random word, and
    the words are sorted."""
    last = (1 << (len(words) - 1).bit_length()) - 1
    marked = jnp.where(chosen, words >> 1, words | jnp.uint32(1 << 31))
    return (jnp.sort(marked & ~jnp.uint32(last) | jnp.arange(len(words), dtype=jnp.uint32)) & last).astype(jnp.int32)
