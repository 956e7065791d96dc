"""Which values of a coordinate leave an orbit full, and apart from the others: on the device, in whole numbers.

A coordinate of d decimals is a number of 10⁻ᵈ, constants are numbers of 1/24: both are whole in units of 1/(24·10ᵈ). No
value may come that meets a condition (`places`), given the coordinates before it. Of the last coordinate none may come
either with which the point would lie where one of an earlier orbit of the position lies.

At least 28 of 100 values are always left, whatever came before, in a crystal of 64 atoms of any group (tests).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int8, Int16, Int32

from jaxcrystal.crystals.wyckoff import GRID
from jaxcrystal.texts.symmetry.kept import KeptOrbits
from jaxcrystal.texts.symmetry.kinds import KindTables
from jaxcrystal.texts.symmetry.listed import over_pairs
from jaxcrystal.texts.symmetry.places import PlaceTables


@struct.dataclass
class Orbits:
    """Those of each slot so far, the kept ones first, and the point that is being written."""

    count: Int32[Array, "slots"]
    letters: Int8[Array, "slots orbits"]  #: places in the alphabet of positions
    points: Int16[Array, "slots orbits 3"]  #: free coordinates in units of the last decimal; 0 where none is free
    letter: Int32[Array, "slots"]  #: of the one being written
    axis: Int32[Array, "slots"]  #: the coordinate being written, 0 to 2
    free: Int32[Array, "slots"]  #: coordinates that are free and come behind it: 1 for x, 2 for y, 4 for z
    point: Int16[Array, "slots 3"]  #: the coordinates before it

    @classmethod
    def begun(cls, kept: KeptOrbits) -> Orbits:
        """With the kept ones alone, which count as written before all others."""
        zero = jnp.zeros(len(kept.state), jnp.int32)
        there = (kept.elements > 0).sum(1, dtype=jnp.int32)
        given = jnp.asarray(kept.letters), jnp.asarray(kept.points)
        return cls(there, *given, zero, zero, zero, jnp.zeros((len(zero), 3), jnp.int16))

    def located(
        self, when: Bool[Array, "slots"], group: Int32[Array, "slots"], letter: Int32[Array, "slots"]
    ) -> Orbits:
        """A new one on this position."""
        letter = jnp.where(when, letter, self.letter)
        free = jnp.asarray(KindTables.build().free)[group, letter].astype(jnp.int32)
        point = jnp.where(when[:, None], 0, self.point).astype(jnp.int16)
        return self.replace(letter=letter, point=point, free=jnp.where(when, free, self.free))._on(when)

    def measured(self, when: Bool[Array, "slots"], value: Int32[Array, "slots"]) -> Orbits:
        """The coordinate being written has this value."""
        here = when[:, None] & (jnp.arange(3) == self.axis[:, None])
        return self.replace(point=jnp.where(here, value[:, None], self.point).astype(jnp.int16))._on(when)

    def _on(self, when: Bool[Array, "slots"]) -> Orbits:
        """The next free coordinate is the one being written."""
        axis = jnp.where(self.free & 1 > 0, 0, jnp.where(self.free & 2 > 0, 1, 2))
        free = self.free & ~(1 << axis)
        return self.replace(axis=jnp.where(when, axis, self.axis), free=jnp.where(when, free, self.free))

    def appended(self, when: Bool[Array, "slots"]) -> Orbits:
        """The one being written is complete."""
        here = when[:, None] & (jnp.arange(self.letters.shape[1]) == self.count[:, None])
        return self.replace(
            count=self.count + when,
            letters=jnp.where(here, self.letter[:, None].astype(jnp.int8), self.letters),
            points=jnp.where(here[..., None], self.point[:, None], self.points),
        )


def blocked(
    orbits: Orbits, group: Int32[Array, "slots"], decimals: int, when: Bool[Array, "slots"]
) -> Bool[Array, "slots values"]:
    """Values that the coordinate being written may not have, in slots where it begins."""
    place = jnp.asarray(PlaceTables.build().first, jnp.int32)[group] + orbits.letter
    return _met(orbits, place, decimals, when & (orbits.free == 0), _collapsed(orbits, place, decimals))


def _collapsed(orbits: Orbits, place: Int32[Array, "slots"], decimals: int) -> Bool[Array, "slots values"]:
    """With which the point would lie on a more special position."""
    tables, values = PlaceTables.build(), 10**decimals
    starts = jnp.asarray(tables.condition_start, jnp.int32)
    start, end = (starts[place, orbits.axis + k][:, None] for k in (0, 1))
    at = start + jnp.arange(tables.most_conditions)
    rows = jnp.asarray(tables.rows)[jnp.asarray(tables.condition)[at]].astype(jnp.int32)
    point = jnp.where(jnp.arange(3) < orbits.axis[:, None], orbits.point, 0).astype(jnp.int32)
    sums = GRID * (rows[..., :3] * point[:, None, None]).sum(-1) + values * rows[..., 3]  # [slots, conditions, rows]
    sums %= GRID * values
    factor = jnp.take_along_axis(rows[:, :, 0], orbits.axis[:, None, None], axis=2)[..., 0]
    wanted = GRID * values * jnp.arange(1, tables.most_solutions + 1) - sums[..., :1]
    factor = GRID * jnp.maximum(factor, 1)[..., None]
    found = (at < end)[..., None] & (sums[..., 1:] == 0).all(-1, keepdims=True) & (wanted % factor == 0)
    value = jnp.where(found, wanted // factor % values, values).reshape(len(place), -1)
    each = jnp.arange(len(place))[:, None]
    return jnp.zeros((len(place), values), bool).at[each, value].set(True, mode="drop")


def _met(
    orbits: Orbits,
    place: Int32[Array, "slots"],
    decimals: int,
    when: Bool[Array, "slots"],
    blocked: Bool[Array, "slots values"],
) -> Bool[Array, "slots values"]:
    """These, and those with which the point would be one of an earlier orbit."""
    tables, values = PlaceTables.build(), 10**decimals
    written = jnp.arange(orbits.letters.shape[1]) < orbits.count[:, None]
    pairs = when[:, None] & written & (orbits.letters == orbits.letter[:, None])

    def work(rows: Array, columns: Array, blocked: Array) -> Array:
        starts = jnp.asarray(tables.map_start, jnp.int32)
        start, end = (starts[place[rows] + k][:, None] for k in (0, 1))
        at = start + jnp.arange(tables.most_maps)
        maps = jnp.asarray(tables.maps)[jnp.asarray(tables.map)[at]].astype(jnp.int32)
        other = orbits.points[rows, columns].astype(jnp.int32)
        image = GRID * (maps[..., :3] * other[:, None, None]).sum(-1) + values * maps[..., 3]
        image %= GRID * values
        point, axis = orbits.point[rows].astype(jnp.int32), orbits.axis[rows]
        same = (image == GRID * point[:, None]) | (jnp.arange(3) >= axis[:, None])[:, None]
        last = jnp.take_along_axis(image, axis[:, None, None], axis=2)[..., 0]
        found = (at < end) & same.all(-1) & (last % GRID == 0)
        return blocked.at[rows[:, None], jnp.where(found, last // GRID, values)].set(True, mode="drop")

    return over_pairs(pairs, work, blocked)
