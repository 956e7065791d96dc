"""Crystals written as tokens, on the device: from arrays and one key to what the model is trained on.

A text is a list of pieces. The tokens of all pieces lie in one list for the whole batch: those of the prompts and of
each element once, those of every number where it was made. A piece says where its tokens start there and how many they
are: none for a task not chosen or an atom that is not there, and a number starts behind its leading zeros.

    list     <s> Below … │ Generate … │ H ⏎ │ He ⏎ │ … │ 0 0 5 . 2 ␣ │ 1 2 0 ␣ │ … │ 0 . 5 0 ␣ 0 . 5 0 ␣ … ⏎ │ …
    text     <s> Below … │ Generate … │ 5 . 2 ␣ │ … │ Na ⏎ │ 0 . 5 0 ␣ … ⏎ │ … │ </s>

From a place in the text to its token's place in the list is a step that is the same all along a piece. It is added
where the piece begins and taken away where it ends; a cumulative sum makes the steps of all places.

This equals the tokenizer's own tokens of the text because the tokenizer cuts it where pieces meet: `TokenTables` tries
it and refuses a tokenizer that does not. Where it groups digits, a whole part is one token, and decimals are cut into
groups from their left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, PRNGKeyArray, UInt32

from jaxcrystal.config import ATTRIBUTES, Augment, TextFormat
from jaxcrystal.crystals import prompts
from jaxcrystal.crystals.conditions import sentence
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, CrystalBatch
from jaxcrystal.crystals.token_tables import EMPTY, TokenTables, ragged
from jaxcrystal.crystals.tokenizer import Tokenizer


def sentence_tokens(
    tokenizer: Tokenizer, attributes: Sequence[dict[str, Any]], paper_compat: bool = False
) -> Int[np.ndarray, "crystals attributes width"]:
    """The tokens of every condition that could be stated of each crystal, on the host; EMPTY where none is known."""
    start = len(tokenizer.encode(prompts.INTRODUCTION))
    known: dict[str, list[int]] = {}

    def tokens(name: str, label: dict[str, Any]) -> list[int]:
        if label.get(name) is None:
            return []
        text = sentence(name, label[name], paper_compat)
        if text not in known:
            known[text] = tokenizer.encode(prompts.INTRODUCTION + text)[start:]
        return known[text]

    flat = ragged([tokens(name, label) for label in attributes for name in ATTRIBUTES])
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

    def otherwise(self, when: Bool[Array, "*n"], other: Pieces) -> Pieces:
        """`other` where `when`."""
        return jax.tree.map(lambda x, y: jnp.where(when, y, x), self, other)

    def without_first(self, count: Int[Array, "*n"]) -> Pieces:
        return Pieces(self.start + count, self.length - count)

    def without_last(self, count: Int[Array, "*n"]) -> Pieces:
        return self.replace(length=self.length - count)


def one_after_the_other(shape: tuple[int, ...], *parts: Pieces) -> Pieces:
    """Along a last axis. Each part has `shape` (or is for all of it), or that and an axis of its own pieces."""

    def join(*xs: Int[Array, "..."]) -> Int[Array, "*n pieces"]:
        wide = [x if x.ndim > len(shape) else x[..., None] for x in xs]
        return jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in wide], axis=-1)

    return jax.tree.map(join, *parts)


class TokenList:
    """The list of tokens of a batch, while its pieces are laid down."""

    def __init__(self) -> None:
        self._laid: list[Int[Array, "some"]] = []
        self._size = 0

    def lay(self, table: Int[Array, "*n width"]) -> Pieces:
        """A piece for each row of `table`: its tokens before EMPTY."""
        *shape, width = table.shape
        start = self._size + width * np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
        self._laid.append(jnp.ravel(table))
        self._size += table.size
        return Pieces(jnp.asarray(start), jnp.asarray((table != EMPTY).sum(-1)))

    def tokens(self) -> Int[Array, "all"]:
        return jnp.concatenate(self._laid)


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
        crystal, n = example.crystals, len(ATTRIBUTES)
        atoms = jnp.arange(crystal.species.shape[0])
        # The atoms' words come last: those before them must not depend on how many a batch has room for.
        count = 5 + 2 * n + len(atoms) * self.augment.permute
        words = jax.random.bits(jax.random.fold_in(key, example.index), (count,), jnp.uint32)
        task, atom, shift, chance, place, shuffle = jnp.split(words, np.cumsum([1, 1, 3, n, n]))
        order = _shuffled(shuffle, atoms < crystal.num_atoms) if self.augment.permute else atoms
        return Draws(
            infill=_uniform(task[0]) < self.augment.infill,
            stated=self._stated(chance, place, known=(example.sentences != EMPTY).any(-1)),
            translation=shift * jnp.uint32(self.augment.translate),
            order=order,
            masked=crystal.species[atom[0] % jnp.maximum(crystal.num_atoms, 1)],
        )

    def _stated(
        self,
        chance: UInt32[Array, "attributes"],
        place: UInt32[Array, "attributes"],
        known: Bool[Array, "attributes"],
    ) -> Int[Array, "attributes"]:
        known &= np.isin(ATTRIBUTES, self.augment.attributes)
        if not self.text.paper_compat:
            stated = known & (_uniform(chance) < self.augment.attribute_probability)
            order = _shuffled(place, stated)
            return jnp.where(stated[order], order, EMPTY)
        # The original: a uniform number of these, chosen at random; the formula before them, if there are any.
        formula = ATTRIBUTES.index("pretty_formula")
        others = known & ~np.isin(ATTRIBUTES, ("pretty_formula", "elements"))
        number = chance[0] % (others.sum() + 1)
        stated = jnp.where(jnp.arange(len(ATTRIBUTES)) < number, _shuffled(place, others), EMPTY)
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
        change = same * (len(t.mask) - 1 - symbol) + symbol  # the mask's line feed is its own
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
        rows = len(text.length)
        lengths = text.length.sum(-1)
        ends = _sum_before(lengths) + lengths
        begins = ((ends - lengths)[:, :, None] + _sum_before(text.length)).reshape(rows, -1)
        steps = text.start.reshape(rows, -1) - begins
        # A step is added where its piece begins and taken away where it ends. Rows lie in one list, with a place for
        # what is cut off behind each: XLA then needs no pairs of indices.
        added = jnp.zeros(rows * (length + 1), jnp.int32)
        for at, step in ((begins, steps), (begins + text.length.reshape(rows, -1), -steps)):
            at = jnp.minimum(at, length) + (length + 1) * jnp.arange(rows)[:, None]
            added = added.at[at.reshape(-1)].add(step.reshape(-1), mode="promise_in_bounds")
        here = jnp.arange(length)
        # A sum in a tree: on a CPU three times as fast as `cumsum`.
        place = here + jax.lax.associative_scan(jnp.add, added.reshape(rows, -1)[:, :length], axis=1)
        before = ends[:, None, :] <= here[:, None]  # crystals of the row that end before this place
        written = ~before[:, :, -1]
        place = jnp.where(written, place, 0).astype(jnp.uint32)
        position = here - (before * lengths[:, None, :]).sum(-1)
        in_answer = (before != (here[:, None] >= (ends - answer)[:, None, :])).any(-1)
        return Rows(
            tokens=jnp.where(written, tokens.at[place].get(mode="promise_in_bounds"), self.tables.pad),
            segments=jnp.where(written, before.sum(-1) + 1, 0),
            positions=jnp.where(written, position, 0),
            loss_mask=written & (in_answer | (self.augment.loss_on == "all")),
        )

    def _pieces(self, examples: Examples, draws: Draws) -> tuple[Int[Array, "all"], Pieces, Int[Array, "*n"]]:
        """The list of tokens, the pieces of each text in it, and how many tokens at the end of each are its answer."""
        t, infill, exists = self.tables, draws.infill, examples.index >= 0
        tokens = TokenList()
        introduction = tokens.lay(t.introduction).otherwise(infill, tokens.lay(t.infill_introduction))
        sentences = tokens.lay(examples.sentences)
        stated = jax.tree.map(lambda x: jnp.take_along_axis(x, draws.stated, axis=-1), sentences)
        body = self._body(tokens, examples.crystals, draws)
        asked = tokens.lay(t.elements)[draws.masked]
        text = one_after_the_other(
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
        t, fmt, shape = self.tables, self.text, draws.order.shape
        lengths = decimal(crystal.lengths, CELL_BITS, fmt.length_decimals)
        angles = decimal(crystal.angles, CELL_BITS, fmt.angle_decimals, truncate=fmt.paper_compat)
        cell = [
            self._cell_line(tokens, *lengths, fmt.length_decimals),
            self._cell_line(tokens, *angles, fmt.angle_decimals),
        ]

        line = lambda symbol: np.append(symbol[symbol != EMPTY], t.newline)  # noqa: E731
        elements, mask = tokens.lay(ragged([line(symbol) for symbol in t.elements])), tokens.lay(t.mask)
        species = jnp.take_along_axis(crystal.species, draws.order, axis=-1)
        element = elements[species].otherwise(draws.infill[..., None] & (species == draws.masked[..., None]), mask)

        frac_coords = jnp.take_along_axis(crystal.frac_coords, draws.order[..., None], axis=-2)
        whole, digits = decimal(frac_coords + draws.translation[..., None, :], COORD_BITS, fmt.coord_decimals)
        if not fmt.paper_compat:
            whole = jnp.zeros_like(whole)  # 1.00 is 0.00 of the next cell
        coords = tokens.lay(self._numbers(whole, 1, digits, fmt.coord_decimals).reshape(*shape, -1))

        atom, last = jnp.arange(shape[-1]), crystal.num_atoms[..., None] - 1
        lines = one_after_the_other(shape, element, coords.without_last(atom == last)).only((atom <= last)[..., None])
        atoms = jax.tree.map(lambda x: x.reshape(*shape[:-1], -1), lines)
        return one_after_the_other(shape[:-1], *cell, atoms)

    def _cell_line(
        self, tokens: TokenList, whole: Int[Array, "*n 3"], digits: Int[Array, "*n 3"], decimals: int
    ) -> Pieces:
        """Three numbers below 1000, a piece each, without leading zeros."""
        numbers = tokens.lay(self._numbers(whole, 3, digits, decimals))
        if self.tables.group > 1:
            return numbers  # a token has the whole part as it is
        return numbers.without_first(sum((whole < power).astype(jnp.int32) for power in (10, 100)))

    def _numbers(
        self, whole: Int[Array, "*n 3"], places: int, digits: Int[Array, "*n 3"], decimals: int
    ) -> Int[Array, "*n 3 width"]:
        """The tokens of a line of three numbers, and what follows each; the decimal point only before decimals."""
        ends = jnp.broadcast_to(np.array([self.tables.space, self.tables.space, self.tables.newline]), whole.shape)
        tokens = [*self._whole(whole, places)]
        if decimals:
            tokens += [jnp.full_like(whole, self.tables.point), *self._groups(digits, decimals)]
        return jnp.stack([*tokens, ends], axis=-1)

    def _whole(self, whole: Int[Array, "*n"], places: int) -> list[Int[Array, "*n"]]:
        """With leading zeros; a single token, without them, where digits are grouped."""
        if self.tables.group == 1:
            return self._groups(whole, places)
        zero = jnp.asarray(self.tables.digits)
        return [zero[whole + 10 * (whole >= 10) + 100 * (whole >= 100)]]

    def _groups(self, digits: Int[Array, "*n"], count: int) -> list[Int[Array, "*n"]]:
        """So many digits in groups from the left."""
        table, tokens, group = jnp.asarray(self.tables.digits), [], self.tables.group
        for left in range(count, 0, -group):
            width = min(group, left)
            value = digits // 10 ** (left - width) % 10**width
            tokens.append(table[(10**width - 10) // 9 + value])
        return tokens


def _sum_before(x: Int[Array, "*n k"]) -> Int[Array, "*n k"]:
    """Of what comes before along the last axis: a product with a triangle of ones, which float32 holds exactly."""
    triangle = np.triu(np.ones((x.shape[-1], x.shape[-1]), np.float32), k=1)
    return jnp.dot(x.astype(jnp.float32), triangle, precision="highest").astype(jnp.int32)


def _uniform(words: UInt32[Array, "*n"]) -> Float32[Array, "*n"]:
    """In [0, 1)."""
    return (words >> 8).astype(jnp.float32) * 2.0**-24


def _shuffled(words: UInt32[Array, "n"], chosen: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The numbers below n in random order, the `chosen` first: each is the end of a word, and the words are sorted."""
    n, bits = len(words), (len(words) - 1).bit_length()
    words = jnp.where(chosen, words >> 1, words | jnp.uint32(1 << 31))
    words = jnp.sort((words >> bits << bits) | jnp.arange(n, dtype=jnp.uint32))
    return (words & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)
