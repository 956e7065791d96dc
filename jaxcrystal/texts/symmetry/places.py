"""Where on a Wyckoff position a point may lie: as tables, in whole numbers.

Of an operation that moves a position's points in general, some may stay where they are: those lie on a more special
position, and their orbit collapses. Which ones, three linear equations of the free coordinates say, modulo 1. They are
brought into echelon form from the last coordinate on, so that the first equation alone has it and decides, while the
others are about earlier ones: a *condition*. What is implied by another condition is left out.

    Fm-3m, position k = x,x,z      z = x meets a mirror plane         z - x ≡ 0            decided at z
                                   x = 0 meets another                2x ≡ 0               decided at x

Other operations take a position's representative to itself, as a line or plane, and move its points there: a *map* of
the free coordinates. Where two orbits of a position meet, one of them takes a representative of the one to that of the
other. For a full orbit there is no other way: an operation that takes a point of full orbit to another one of the same
representative has the same stabilizer on both sides, and so takes the whole line or plane to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int8, Int16

from jaxcrystal.crystals.wyckoff import GRID, GROUPS, Group, Position, group
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS

Row = tuple[int, int, int, int]  #: factors of x, y, z, and a constant in units of 1/GRID: their sum is a whole number


def decides(condition: Sequence[Row]) -> int:
    """The coordinate, 0 to 2, at which a condition is decided: the last one that it is about."""
    return max(axis for axis in range(3) if condition[0][axis])


def conditions(space_group: Group, position: Position) -> list[tuple[Row, ...]]:
    """When points of a position lie on a more special one; none is implied by another."""
    turned = space_group.operations.rotations - np.eye(3, dtype=np.int64)
    factors = turned @ position.matrix
    constants = (turned @ position.shift + space_group.operations.translations) % GRID
    systems = np.unique(np.concatenate([factors, constants[..., None]], axis=2), axis=0)
    found = {rows for system in systems if (rows := _echelon(system.tolist()))}
    return sorted(one for one in found if not any(other != one and _implies(one, other) for other in found))


def _echelon(rows: list[list[int]]) -> tuple[Row, ...] | None:
    """Equations that say the same, from the last coordinate on; none if all is whole, None if nothing can be."""
    pivots: list[tuple[int, list[int]]] = []
    for axis in (2, 1, 0):
        while len(those := sorted((row for row in rows if row[axis]), key=lambda row: abs(row[axis]))) > 1:
            for row in those[1:]:
                _subtract(row, those[0], row[axis] // those[0][axis])
        if those:
            pivot = those[0]
            rows = [row for row in rows if row is not pivot]
            if pivot[axis] < 0:
                pivot[:] = [-x for x in pivot]
            for _, before in pivots:
                _subtract(before, pivot, before[axis] // pivot[axis])
            pivots.append((axis, pivot))
    if any(row[3] % GRID for row in rows):
        return None
    return tuple((*row[:3], row[3] % GRID) for _, row in pivots)


def _subtract(row: list[int], other: Sequence[int], times: int) -> None:
    row[:] = [x - times * y for x, y in zip(row, other, strict=True)]


def _implies(one: tuple[Row, ...], other: tuple[Row, ...]) -> bool:
    """Whether every point that meets one condition meets the other: whether its equations are sums of the first's."""
    for row in map(list, other):
        for pivot in one:
            axis = decides([pivot])
            if row[axis] % pivot[axis]:
                return False
            _subtract(row, pivot, row[axis] // pivot[axis])
        if any(row[:3]) or row[3] % GRID:
            return False
    return True


def maps(space_group: Group, position: Position) -> list[tuple[Row, Row, Row]]:
    """Where the operations that keep a position's representative, as a whole, take its free coordinates."""
    rotations, translations = space_group.operations.rotations, space_group.operations.translations
    factors = rotations @ position.matrix
    constants = (rotations @ position.shift + translations) % GRID
    off = np.eye(3, dtype=np.int64) - position.matrix
    kept = ((off @ factors) == 0).all((1, 2)) & ((constants @ off.T - position.shift) % GRID == 0).all(1)
    found = np.concatenate([factors[kept], constants[kept][..., None]], axis=2) * position.free[:, None]
    return [tuple(map(tuple, rows)) for rows in np.unique(found, axis=0).tolist()]


@dataclass(frozen=True, eq=False)
class PlaceTables:
    """All positions, one after the other, as the device reads them. Lists of a position lie in one list of all."""

    first: Int16[np.ndarray, "231"]  #: of a space group's positions, by its number
    rows: Int8[np.ndarray, "conditions 3 4"]  #: of every distinct condition, the deciding one first
    condition: Int16[np.ndarray, "all"]  #: of each position, by the coordinate that decides
    condition_start: Int16[np.ndarray, "places 4"]  #: of those that each coordinate decides, and the end of the last
    maps: Int8[np.ndarray, "maps 3 4"]  #: every distinct one
    map: Int16[np.ndarray, "all"]  #: of each position
    map_start: Int16[np.ndarray, "places_and_end"]

    @property
    def most_conditions(self) -> int:
        """That one coordinate decides."""
        return int(np.diff(self.condition_start, axis=1).max())

    @property
    def most_maps(self) -> int:
        """Of a position."""
        return int(np.diff(self.map_start).max())

    @property
    def most_solutions(self) -> int:
        """Values of a coordinate that meet a condition."""
        return int(self.rows[:, 0, :3].max())

    @classmethod
    @cache
    def build(cls) -> PlaceTables:
        """The same for all tokenizers and formats."""
        first, starts, map_starts = [0], [], [0]
        known_conditions: dict[tuple[Row, ...], int] = {}
        known_maps: dict[tuple[Row, Row, Row], int] = {}
        all_conditions: list[int] = []
        all_maps: list[int] = []
        for number in GROUPS:
            here = group(number)
            first.append(len(starts))
            for position in here.positions:
                found = conditions(here, position) if position.reusable else []
                start = [len(all_conditions)]
                for axis in range(3):
                    those = [each for each in found if decides(each) == axis]
                    all_conditions += [known_conditions.setdefault(each, len(known_conditions)) for each in those]
                    start.append(len(all_conditions))
                starts.append(start)
                # Two orbits of more atoms find no room in a crystal.
                if position.reusable and 2 * position.multiplicity // here.centring <= MOST_ATOMS:
                    found = maps(here, position)
                    all_maps += [known_maps.setdefault(each, len(known_maps)) for each in found]
                map_starts.append(len(all_maps))
        rows = np.zeros((len(known_conditions), 3, 4), np.int8)
        for row, condition in zip(rows, known_conditions, strict=True):
            row[: len(condition)] = condition
        return cls(
            first=np.array(first, np.int16),
            rows=rows,
            condition=np.array(all_conditions, np.int16),
            condition_start=np.array(starts, np.int16),
            maps=np.array(list(known_maps), np.int8),
            map=np.array(all_maps, np.int16),
            map_start=np.array(map_starts, np.int16),
        )
