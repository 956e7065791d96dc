"""Crystals written as symmetry texts on the device: what is drawn about them, and their pieces.

    body    Sr │ ␣ 1 │ ␣ Ti │ ␣ 1 │ … │ ⏎ 2 2 1 ⏎ │ Sr │ ␣ a │ ⏎ │ … │ O │ ␣ e │ ␣ 2 5 ⏎ │ 3 . 9 1

An element of the composition is two pieces, an orbit three, a lattice parameter one; those that are not free have no
tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, UInt32

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.crystals.wyckoff import GROUPS, SYSTEMS, free_axes, group
from jaxcrystal.texts.numbers import decimal, digit_groups, whole_number
from jaxcrystal.texts.pieces import EMPTY, Pieces, TokenList, one_after_the_other, ragged
from jaxcrystal.texts.symmetry.tables import SymmetryTables

WHOLE = 3  #: digits that a lattice parameter may have before the point
NOTHING = -1  #: masked: no atomic number, and no padding either
MOST = 1000  #: atoms of an element, and one more


def free_coordinates() -> Bool[np.ndarray, "231 27 3"]:
    """Which coordinates of a representative are free, by space group and letter."""
    table = np.zeros((len(GROUPS) + 1, 27, 3), bool)
    for number in GROUPS:
        for at, position in enumerate(group(number).positions):
            table[number, at] = position.free
    return table


def free_parameters() -> Bool[np.ndarray, "231 6"]:
    """Which of a, b, c, α, β, γ are free, by space group."""
    table = np.zeros((len(GROUPS) + 1, 6), bool)
    for number in GROUPS:
        table[number, list(SYSTEMS[group(number).system][0])] = True
    return table


def free_origin() -> Bool[np.ndarray, "231 3"]:
    """Along which axes the origin is free, by space group."""
    table = np.zeros((len(GROUPS) + 1, 3), bool)
    for number in GROUPS:
        table[number, list(free_axes(number))] = True
    return table


@struct.dataclass
class Description:
    """One way to write a crystal."""

    number: Int[Array, "*n"]  #: of those that are stored; 0 is the canonical one
    shift: UInt32[Array, "*n 3"]  #: along axes in which the origin is free, in units of 2⁻³² of the edge


@struct.dataclass
class Drawn:
    """What chance decided about the crystal itself (or, with a leading shape, about many)."""

    masked: Int[Array, "*n"]  #: atomic number that infilling asks for
    generated: Description  #: that the generation task writes
    infilled: Int[Array, "*n"]  #: the stored description that infilling writes; its origin stays where it is


def draw(words: UInt32[Array, "5"], crystal: SymmetricBatch, augment: Augment) -> Drawn:
    """Of one crystal: a word for the atom that infilling asks for, one for the description, three for the shift."""
    atom, which, shift = words[0], words[1], words[2:5]
    ends = jnp.cumsum(crystal.counts)
    element = (ends <= (atom % jnp.maximum(ends[-1], 1).astype(jnp.uint32)).astype(ends.dtype)).sum()
    number = (which % jnp.maximum(crystal.num_descriptions, 1).astype(jnp.uint32)).astype(jnp.int32)
    anyhow = Description(number, shift)
    canonical = Description(jnp.zeros_like(number), jnp.zeros_like(shift))
    return Drawn(
        masked=crystal.elements[element],
        generated=anyhow if augment.descriptions else canonical,
        # A validation set may lack those that hide an element: there the canonical one stands for them.
        infilled=jnp.where(crystal.hides, crystal.num_descriptions + element, 0),
    )


def pieces(
    tables: SymmetryTables,
    text: TextFormat,
    tokens: TokenList,
    crystal: SymmetricBatch,
    drawn: Drawn,
    infill: Bool[Array, "*n"],
) -> Pieces:
    """The lines of each crystal; under infilling those of the masked element come first."""
    described = Description(
        jnp.where(infill, drawn.infilled, drawn.generated.number),
        jnp.where(infill[..., None], 0, drawn.generated.shift),
    )
    masked = jnp.where(infill, drawn.masked, NOTHING)[..., None]
    lines = [
        _composition(tables, tokens, crystal, masked),
        tokens.lay(_group_lines(tables))[crystal.space_group],
        _orbits(tables, text, tokens, crystal, described, masked),
        _lattice(tables, text, tokens, crystal),
    ]
    return one_after_the_other(infill.shape, *lines)


def _composition(
    tables: SymmetryTables, tokens: TokenList, crystal: SymmetricBatch, masked: Int[Array, "*n one"]
) -> Pieces:
    elements, counts = _masked_first(masked, crystal.elements, crystal.elements, crystal.counts)
    here = elements > 0
    hidden = here & (elements == masked)
    first = jnp.arange(elements.shape[-1]) == 0
    symbols = tokens.lay(tables.spaced_elements)[elements].otherwise(first, tokens.lay(tables.elements)[elements])
    symbols = symbols.otherwise(hidden, tokens.lay(tables.mask_count))
    numbers = ragged([[tables.space, *tables.digit_tokens(str(count))] for count in range(MOST)])
    written = tokens.lay(numbers)[counts]
    written = written.without_first(hidden.astype(jnp.int32))  # the mask has its space
    pair = one_after_the_other(elements.shape, symbols, written).only(here[..., None])
    return jax.tree.map(lambda x: x.reshape(*elements.shape[:-1], -1), pair)


def _group_lines(tables: SymmetryTables) -> Int[np.ndarray, "231 width"]:
    """Each number, with the line feeds around it."""
    return ragged([[], *([tables.newline, *tables.digit_tokens(str(n)), tables.newline] for n in GROUPS)])


def _orbits(
    tables: SymmetryTables,
    text: TextFormat,
    tokens: TokenList,
    crystal: SymmetricBatch,
    described: Description,
    masked: Int[Array, "*n one"],
) -> Pieces:
    at = described.number[..., None, None]
    letters = jnp.take_along_axis(crystal.letters, at, axis=-2)[..., 0, :].astype(jnp.int32)
    coords = jnp.take_along_axis(crystal.frac_coords, at[..., None], axis=-3)[..., 0, :, :]
    along = jnp.asarray(free_origin())[crystal.space_group]
    coords = coords + (described.shift * along)[..., None, :]
    species, letters, x, y, z = _masked_first(
        masked, crystal.species, crystal.species, letters, *jnp.moveaxis(coords, -1, 0)
    )
    here = species > 0
    hidden = here & (species == masked)
    element = tokens.lay(tables.elements)[species].only(~hidden)
    letter = tokens.lay(tables.letters)[letters].otherwise(hidden, tokens.lay(tables.mask_letters)[letters])

    # The free coordinates move to the front, so that a line's tokens lie together; the line feed is behind the last.
    free = jnp.asarray(free_coordinates())[crystal.space_group[..., None], letters]
    order = jnp.argsort(~free, axis=-1, stable=True)
    coords = jnp.take_along_axis(jnp.stack([x, y, z], axis=-1), order, axis=-1)
    _, digits = decimal(coords, COORD_BITS, text.coord_decimals)
    each = jnp.stack([jnp.full_like(digits, tables.space), *digit_groups(tables, digits, text.coord_decimals)], axis=-1)
    row = each.reshape(*each.shape[:-2], -1)
    row = jnp.concatenate([row, jnp.full_like(row[..., :1], EMPTY)], axis=-1)
    end = free.sum(-1, keepdims=True) * each.shape[-1]
    place = jnp.arange(row.shape[-1])
    row = jnp.where(place < end, row, jnp.where(place == end, tables.newline, EMPTY))
    line = one_after_the_other(species.shape, element, letter, tokens.lay(row)).only(here[..., None])
    return jax.tree.map(lambda x: x.reshape(*species.shape[:-1], -1), line)


def _lattice(tables: SymmetryTables, text: TextFormat, tokens: TokenList, crystal: SymmetricBatch) -> Pieces:
    """Six numbers, of which those that are free have tokens; a space behind each but the last."""
    found = []
    for cell, decimals in ((crystal.cell[..., :3], text.length_decimals), (crystal.cell[..., 3:], text.angle_decimals)):
        whole, digits = decimal(cell, CELL_BITS, decimals)
        number, unused = whole_number(tables, whole, WHOLE)
        if decimals:
            number = [*number, jnp.full_like(whole, tables.point), *digit_groups(tables, digits, decimals)]
        row = jnp.stack([*number, jnp.full_like(whole, tables.space)], axis=-1)
        found.append(tokens.lay(row).without_first(unused))
    free = jnp.asarray(free_parameters())[crystal.space_group]
    last = jnp.where(free, jnp.arange(6), -1).max(-1, keepdims=True)
    numbers = one_after_the_other(crystal.space_group.shape, *found)
    return numbers.without_last((jnp.arange(6) == last).astype(jnp.int32)).only(free)


def _masked_first(masked: Int[Array, "*n one"], elements: Int[Array, "*n k"], *columns: Array) -> list[Array]:
    """Columns beside `elements`, those of the masked one first, the others in their order."""
    order = jnp.argsort(elements != masked, axis=-1, stable=True)
    return [jnp.take_along_axis(column, order, axis=-1) for column in columns]


def bounds(
    tables: SymmetryTables, text: TextFormat, crystals: SymmetricBatch
) -> tuple[Int[np.ndarray, "2 crystals"], Int[np.ndarray, "2 crystals"]]:
    """As `Form.bounds` has them."""
    count = len(crystals)

    @jax.jit
    def lengths(crystals: SymmetricBatch, drawn: Drawn, infill: Bool[Array, "crystals"]) -> Int[Array, "crystals"]:
        return pieces(tables, text, TokenList(), crystals, drawn, infill).length.sum(-1)

    def of(number: Int[np.ndarray, "crystals"], masked: Int[np.ndarray, "crystals"]) -> Int[np.ndarray, "crystals"]:
        drawn = Drawn(masked, Description(number, np.zeros((count, 3), np.uint32)), number)
        return np.asarray(lengths(crystals, drawn, masked > 0))

    last = crystals.num_descriptions - 1
    nothing = np.zeros(count, np.int32)
    plain = np.stack([of(np.minimum(n, last), nothing) for n in range(int(last.max(initial=0)) + 1)])
    symbol = (tables.elements != EMPTY).sum(1)
    hiding = []
    for element, z in enumerate(crystals.elements.T):
        # An element that is not there stands for the first one, which always is.
        number, z = np.where(z > 0, last + 1 + element, last + 1), np.where(z > 0, z, crystals.elements[:, 0])
        hiding.append(of(np.where(crystals.hides, number, 0), z) + symbol[z])
    hidden = np.stack(hiding)
    return np.stack([plain.min(0), plain.max(0)]), np.stack([hidden.min(0), hidden.max(0)])
