"""Crystals written as P1 texts on the device: what is drawn about them, and their pieces.

    body    5 . 2 ␣ │ … │ 1 2 0 ⏎ │ Na ⏎ │ 0 . 5 0 ␣ 0 . 5 0 ␣ 0 . 5 0 ⏎ │ [MASK] ⏎ │ …

A number of the cell is a piece, which starts behind its leading zeros; an atom has two, a line each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, UInt32

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, CrystalBatch
from jaxcrystal.texts.chance import shuffled
from jaxcrystal.texts.numbers import decimal, digit_groups, whole_number
from jaxcrystal.texts.pieces import EMPTY, Pieces, TokenList, one_after_the_other, ragged
from jaxcrystal.texts.token_tables import TokenTables

WHOLE = 3  #: digits that a number of the cell may have before the point


@struct.dataclass
class Drawn:
    """What chance decided about the crystal itself (or, with a leading shape, about many)."""

    translation: UInt32[Array, "*n 3"]  #: added to every coordinate, modulo 1, in units of 2⁻³² of the cell edge
    order: Int[Array, "*n atoms"]  #: atoms in the order in which they are written
    masked: Int[Array, "*n"]  #: atomic number that infilling asks for


def draw(words: UInt32[Array, "words"], crystal: CrystalBatch, augment: Augment) -> Drawn:
    """Of one crystal: a word for the atom that infilling asks for, three for the translation, one an atom to shuffle.

    The atoms' words come last: those before them must not depend on how many a batch has room for.
    """
    atoms = jnp.arange(crystal.species.shape[0])
    atom, shift, shuffle = jnp.split(words, [1, 4])
    return Drawn(
        translation=shift * jnp.uint32(augment.translate),
        order=shuffled(shuffle, atoms < crystal.num_atoms) if augment.permute else atoms,
        masked=crystal.species[atom[0] % jnp.maximum(crystal.num_atoms, 1)],
    )


def pieces(
    tables: TokenTables,
    text: TextFormat,
    tokens: TokenList,
    crystal: CrystalBatch,
    drawn: Drawn,
    infill: Bool[Array, "*n"],
) -> Pieces:
    """The line of lengths, the line of angles, then two lines an atom."""
    shape = drawn.order.shape
    lengths = decimal(crystal.lengths, CELL_BITS, text.length_decimals)
    angles = decimal(crystal.angles, CELL_BITS, text.angle_decimals, truncate=text.paper_compat)
    cell = []
    for (whole, digits), decimals in ((lengths, text.length_decimals), (angles, text.angle_decimals)):
        numbers, unused = _numbers(tables, whole, WHOLE, digits, decimals)
        cell.append(tokens.lay(numbers).without_first(unused))

    line = lambda symbol: np.append(symbol[symbol != EMPTY], tables.newline)  # noqa: E731
    elements, mask = tokens.lay(ragged([line(symbol) for symbol in tables.elements])), tokens.lay(tables.mask)
    species = jnp.take_along_axis(crystal.species, drawn.order, axis=-1)
    element = elements[species].otherwise(infill[..., None] & (species == drawn.masked[..., None]), mask)

    frac_coords = jnp.take_along_axis(crystal.frac_coords, drawn.order[..., None], axis=-2)
    whole, digits = decimal(frac_coords + drawn.translation[..., None, :], COORD_BITS, text.coord_decimals)
    if not text.paper_compat:
        whole = jnp.zeros_like(whole)  # 1.00 is 0.00 of the next cell
    numbers, _ = _numbers(tables, whole, 1, digits, text.coord_decimals)
    coords = tokens.lay(numbers.reshape(*shape, -1))

    atom, last = jnp.arange(shape[-1]), crystal.num_atoms[..., None] - 1
    lines = one_after_the_other(shape, element, coords.without_last(atom == last)).only((atom <= last)[..., None])
    atoms = jax.tree.map(lambda x: x.reshape(*shape[:-1], -1), lines)
    return one_after_the_other(shape[:-1], *cell, atoms)


def _numbers(
    tables: TokenTables, whole: Int[Array, "*n 3"], places: int, digits: Int[Array, "*n 3"], decimals: int
) -> tuple[Int[Array, "*n 3 width"], Int[Array, "*n 3"]]:
    """The tokens of a line of three numbers below 10 to the `places`, and what follows each; the point only before
    decimals. And how many of the first tokens of each number are none of it."""
    ends = jnp.broadcast_to(np.array([tables.space, tables.space, tables.newline]), whole.shape)
    tokens, unused = whole_number(tables, whole, places)
    if decimals:
        tokens = [*tokens, jnp.full_like(whole, tables.point), *digit_groups(tables, digits, decimals)]
    return jnp.stack([*tokens, ends], axis=-1), unused


def bounds(
    tables: TokenTables, text: TextFormat, crystals: CrystalBatch
) -> tuple[Int[np.ndarray, "2 crystals"], Int[np.ndarray, "2 crystals"]]:
    """As `Form.bounds` has them."""
    count, atoms = crystals.species.shape
    nothing = Drawn(
        translation=np.zeros((count, 3), np.uint32),
        order=np.broadcast_to(np.arange(atoms), (count, atoms)),
        masked=np.zeros(count, np.int32),
    )

    @jax.jit
    def lengths(crystals: CrystalBatch) -> Int[Array, "crystals"]:
        return pieces(tables, text, TokenList(), crystals, nothing, jnp.zeros(count, bool)).length.sum(-1)

    bare = np.asarray(lengths(crystals))
    # Infilling writes [MASK] for every atom of one element, and the element once more at the end.
    symbol = (tables.elements != EMPTY).sum(1)[crystals.species]
    same = (crystals.species[:, :, None] == crystals.species[:, None, :]).sum(2)
    change = same * (len(tables.mask) - 1 - symbol) + symbol  # the mask's line feed is its own
    present = crystals.species > 0
    least = bare + np.where(present, change, change.max()).min(1)
    most = bare + np.where(present, change, change.min()).max(1)
    return np.stack([bare, bare]), np.stack([least, most])
