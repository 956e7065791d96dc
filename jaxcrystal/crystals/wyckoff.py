"""Space groups as tables: operations, Wyckoff positions, and in how many ways a crystal of a group may be described.

Everything stands in moyo's `Setting.standard()`: unique axis b and cell choice 1 for monoclinic groups, hexagonal axes
for rhombohedral ones, origin choice 2. Shifts are whole numbers of 1/24 (`GRID`), so that arithmetic is exact.

A position is an affine map from its free parameters to its first listed representative, and in all 1,731 of them each
parameter is one of the representative's own coordinates: position e of Fm-3m is x,0,0, and x says all of it. Hence
`Position.free` names coordinates, and a crystal needs no formula to be written.

    wyckoff.csv, normalizers.csv      written by `wyckoff_tables`
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import moyopy
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcrystal.errors import UserError

HERE = Path(__file__).parent
GROUPS = range(1, 231)
GRID = 24  #: shifts of operations and representatives are multiples of 1/24
LETTERS = "abcdefghijklmnopqrstuvwxyzA"  #: of positions; only Pmmm has 27


@dataclass(frozen=True, eq=False)
class Operations:
    """x goes to rotations[i] @ x + translations[i] / GRID, modulo 1; centring translations are operations too."""

    rotations: Int[np.ndarray, "n 3 3"]
    translations: Int[np.ndarray, "n 3"]  #: 0 to 23

    def __len__(self) -> int:
        return len(self.rotations)

    def __iter__(self) -> Iterator[tuple[Int[np.ndarray, "3 3"], Int[np.ndarray, "3"]]]:
        return zip(self.rotations, self.translations, strict=True)

    def __getitem__(self, which: slice | Int[np.ndarray, "n"]) -> Operations:
        return Operations(self.rotations[which], self.translations[which])

    def images(self, point: Float[np.ndarray, "3"]) -> Float[np.ndarray, "n 3"]:
        """Of a point, in [0, 1); as many as there are operations."""
        return (self.rotations @ point + self.translations / GRID) % 1


@dataclass(frozen=True, eq=False)
class Position:
    """A Wyckoff position, by its first listed representative: matrix @ x + shift / GRID of a point x."""

    letter: str
    multiplicity: int  #: atoms in the conventional cell
    matrix: Int[np.ndarray, "3 3"]
    shift: Int[np.ndarray, "3"]

    @property
    def free(self) -> Bool[np.ndarray, "3"]:
        """Which coordinates of the representative are its free parameters."""
        return self.matrix.any(0)

    @property
    def reusable(self) -> bool:
        """Whether several orbits may lie on it."""
        return bool(self.matrix.any())

    def representative(self, coords: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        """The point of the position whose free coordinates are these, in [0, 1)."""
        return (coords @ self.matrix.T + self.shift / GRID) % 1


@dataclass(frozen=True, eq=False)
class Group:
    """A space group, in the standard setting."""

    number: int
    symbol: str  #: short Hermann-Mauguin symbol
    hall_symbol: str
    system: str  #: of `SYSTEMS`
    operations: Operations
    positions: tuple[Position, ...]  #: by letter

    @property
    def centring(self) -> int:
        """Primitive cells in the conventional one."""
        return int((self.operations.rotations == np.eye(3, dtype=int)).all((1, 2)).sum())

    @property
    def order(self) -> int:
        """Operations, apart from lattice translations."""
        return len(self.operations) // self.centring

    @property
    def chiral(self) -> bool:
        """Whether no operation is a mirror image: then a crystal is another one than its mirror image."""
        return bool((np.linalg.det(self.operations.rotations) > 0).all())

    def position(self, letter: str) -> Position:
        """Raises UserError for a letter that the group lacks."""
        at = LETTERS.find(letter)
        if len(letter) != 1 or not 0 <= at < len(self.positions):
            raise UserError(f"space group {self.number} has positions a to {self.positions[-1].letter}, not {letter!r}")
        return self.positions[at]

    def atoms(self, letter: str) -> int:
        """Of an orbit, in the primitive cell."""
        return self.position(letter).multiplicity // self.centring


#: Of a conventional cell: which of a, b, c, α, β, γ are free, and what the others are: a number of degrees, or the
#: place of the length that they equal.
SYSTEMS: dict[str, tuple[tuple[int, ...], tuple[int, int, int], tuple[float | None, ...]]] = {
    "triclinic": ((0, 1, 2, 3, 4, 5), (0, 1, 2), (None, None, None)),
    "monoclinic": ((0, 1, 2, 4), (0, 1, 2), (90.0, None, 90.0)),
    "orthorhombic": ((0, 1, 2), (0, 1, 2), (90.0, 90.0, 90.0)),
    "tetragonal": ((0, 2), (0, 0, 2), (90.0, 90.0, 90.0)),
    "hexagonal": ((0, 2), (0, 0, 2), (90.0, 90.0, 120.0)),  # and trigonal, rhombohedral groups on hexagonal axes too
    "cubic": ((0,), (0, 0, 0), (90.0, 90.0, 90.0)),
}


def system(number: int) -> str:
    """Of a space group, as far as the shape of its cell goes: one of `SYSTEMS`."""
    ends = zip((2, 15, 74, 142, 194, 230), SYSTEMS, strict=True)
    return next(name for last, name in ends if number <= last)


@cache
def group(number: int) -> Group:
    """Raises UserError for a number that no space group has."""
    if number not in GROUPS:
        raise UserError(f"space group {number} does not exist; numbers run from 1 to 230")
    entry = moyopy.SpaceGroupType(number)
    return Group(
        number=number,
        symbol=entry.hm_short,
        hall_symbol=_hall_symbol(number),
        system=system(number),
        operations=operations(number),
        positions=_positions()[number],
    )


@cache
def operations(number: int) -> Operations:
    """Of a group; the identity first."""
    found = moyopy.operations_from_number(number, setting=moyopy.Setting.standard())
    translations = np.round(np.array(found.translations) * GRID).astype(np.int64) % GRID
    return Operations(np.array(found.rotations, np.int64), translations)


def _hall_symbol(number: int) -> str:
    """Of the standard setting: of the settings of this number the one that has the same operations."""
    wanted = {r.tobytes() + t.tobytes() for r, t in operations(number)}
    for hall_number in range(1, 531):
        entry = moyopy.HallSymbolEntry(hall_number)
        if entry.number != number:
            continue
        found = moyopy.operations_from_number(number, setting=moyopy.Setting.hall_number(hall_number))
        rotations = np.array(found.rotations, np.int64)
        translations = np.round(np.array(found.translations) * GRID).astype(np.int64) % GRID
        if {r.tobytes() + t.tobytes() for r, t in zip(rotations, translations, strict=True)} == wanted:
            return entry.hall_symbol.replace("=", '"')  # moyo writes = for the quotation mark
    raise AssertionError(f"space group {number} has no standard setting")


@cache
def free_axes(number: int) -> tuple[int, ...]:
    """Along which of the three axes the origin may lie anywhere: those that no operation turns round (68 groups)."""
    unit = np.eye(3, dtype=int)
    return tuple(axis for axis in range(3) if (operations(number).rotations @ unit[axis] == unit[axis]).all())


@cache
def normalizing(number: int, linear: bytes) -> tuple[Int[np.ndarray, "3"], ...]:
    """Shifts s, in [0, GRID) and 0 along free axes, with which x -> linear @ x + s / GRID maps the group onto itself.

    `linear` is the buffer of a unimodular matrix of int64, 3x3 in C order; empty if no shift does.
    """
    matrix = np.frombuffer(linear, np.int64).reshape(3, 3)
    inverse = np.round(np.linalg.inv(matrix)).astype(np.int64)
    known: dict[bytes, list[Int[np.ndarray, "3"]]] = {}
    for rotation, translation in operations(number):
        known.setdefault(rotation.tobytes(), []).append(translation)
    axes = [range(1) if axis in free_axes(number) else range(GRID) for axis in range(3)]
    shifts = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    for rotation, translation in operations(number):
        turned = matrix @ rotation @ inverse
        targets = known.get(turned.tobytes())
        if targets is None:
            return ()
        moved = (matrix @ translation + shifts @ (np.eye(3, dtype=np.int64) - turned).T) % GRID
        shifts = shifts[(moved[:, None] == np.array(targets)).all(-1).any(-1)]
    return tuple(shifts)


class Coset(NamedTuple):
    """x -> linear @ x + shift / GRID, which maps a group onto itself; it stands for all that differ from it by an
    operation of the group, or by a shift along free axes."""

    linear: Int[np.ndarray, "3 3"]
    shift: Int[np.ndarray, "3"]


@cache
def cosets_among(number: int, matrices: tuple[bytes, ...]) -> tuple[Coset, ...]:
    """Of a group, all cosets with these matrices, each once; matrices are buffers as `normalizing` takes them."""
    kept = [axis for axis in range(3) if axis not in free_axes(number)]
    found: list[Coset] = []
    known: set[bytes] = set()
    for buffer in matrices:
        matrix = np.frombuffer(buffer, np.int64).reshape(3, 3)
        for shift in normalizing(number, buffer):
            same = [
                np.concatenate([(rotation @ matrix).reshape(-1), ((rotation @ shift + move) % GRID)[kept]]).tobytes()
                for rotation, move in operations(number)
            ]
            if known.isdisjoint(same):
                known.update(same)
                found.append(Coset(matrix, shift))
    return tuple(found)


def cosets(number: int) -> tuple[Coset, ...]:
    """Of the Euclidean normalizer: the other ways to describe a crystal of the group in the same cell; the identity
    first. At most 24, 1,109 of all groups: a group without mirror images has none here either.
    """
    return _cosets()[number]


@cache
def _cosets() -> dict[int, tuple[Coset, ...]]:
    found: dict[int, list[Coset]] = {}
    with (HERE / "normalizers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["space_group"]), []).append(Coset(*read(row["coset"])))
    return {number: tuple(listed) for number, listed in found.items()}


@cache
def _positions() -> dict[int, tuple[Position, ...]]:
    found: dict[int, list[Position]] = {}
    with (HERE / "wyckoff.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            position = Position(row["letter"], int(row["multiplicity"]), *read(row["representative"]))
            found.setdefault(int(row["space_group"]), []).append(position)
    return {number: tuple(listed) for number, listed in found.items()}


def read(text: str) -> tuple[Int[np.ndarray, "3 3"], Int[np.ndarray, "3"]]:
    """The map that `x;2x;1/4` writes: a matrix, and a shift in units of 1/GRID."""
    matrix, shift = np.zeros((3, 3), np.int64), np.zeros(3, np.int64)
    for row, expression in enumerate(text.split(";")):
        for sign, number, axis in re.findall(r"([+-]?)([0-9/]*)([xyz]?)", expression):
            if not number and not axis:
                continue
            value = Fraction(number or 1) * (-1 if sign == "-" else 1)
            if axis:
                matrix[row, "xyz".index(axis)] += int(value)
            else:
                shift[row] += int(value * GRID)
    return matrix, shift % GRID


def written(matrix: Int[np.ndarray, "3 3"], shift: Int[np.ndarray, "3"]) -> str:
    """The opposite of `read`."""
    rows = []
    for factors, constant in zip(matrix, shift, strict=True):
        terms = "".join(
            f"{'-' if n < 0 else '+'}{abs(n) if abs(n) > 1 else ''}{axis}"
            for n, axis in zip(factors, "xyz", strict=True)
            if n
        )
        terms += f"+{Fraction(int(constant), GRID)}" if constant else ""
        rows.append(terms.removeprefix("+") or "0")
    return ";".join(rows)
