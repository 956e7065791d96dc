"""A crystal as its space group, its free lattice parameters and one point of each orbit: nothing that follows.

    SrTiO3     221, a = 3.91 Å, Sr on a, Ti on b, O on c

`SymmetricCrystal.to_crystal` writes all atoms of the primitive cell down; `symmetry.symmetrize` finds the way back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

import moyopy
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal, formula_of
from jaxcrystal.crystals.formulas import ordered
from jaxcrystal.crystals.wyckoff import LETTERS, SYSTEMS, Group, Position, group
from jaxcrystal.errors import UserError

TOGETHER = 1e-7  #: fractions of an edge: points that are nearer are the same
ON_SYSTEM = 1e-3  #: Å and degrees by which a cell may differ from one of its crystal system

#: Rows of a primitive cell in units of the conventional one, by the first letter of the group's symbol.
PRIMITIVE = {
    "P": np.eye(3),
    "A": np.array([[1, 0, 0], [0, 0.5, -0.5], [0, 0.5, 0.5]]),
    "C": np.array([[0.5, 0.5, 0], [-0.5, 0.5, 0], [0, 0, 1]]),
    "I": np.array([[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]]),
    "F": np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]),
    "R": np.array([[2, 1, 1], [-1, 1, 1], [-1, -2, 1]]) / 3,
}
INVERSE = {letter: np.linalg.inv(rows) for letter, rows in PRIMITIVE.items()}


@dataclass(frozen=True)
class Orbit:
    """The atoms that the group makes of one."""

    species: int  #: atomic number
    letter: str  #: of the Wyckoff position
    frac_coords: tuple[float, float, float]  #: of the first listed representative, in the conventional cell

    @property
    def symbol(self) -> str:
        """Of the element."""
        return ELEMENTS[self.species]


@dataclass(frozen=True, eq=False)
class SymmetricCrystal:
    """A crystal in the standard setting of its space group (`wyckoff`).

    Construction puts the coordinates that are not free where they belong. Raises UserError for a group or a letter that
    does not exist, a position without free coordinates used twice, an orbit that collapses onto a more special position
    or meets another, or a cell of another crystal system.
    """

    space_group: int
    lengths: Float[np.ndarray, "3"]  #: a, b, c of the conventional cell in Å
    angles: Float[np.ndarray, "3"]  #: α, β, γ of it in degrees
    orbits: tuple[Orbit, ...]

    def __post_init__(self) -> None:
        group(self.space_group)
        if not self.orbits:
            raise UserError("a crystal has at least one orbit of atoms")
        cell = np.array([*self.lengths, *self.angles], np.float64)
        whole = cell_of(self.group.system, cell[self.free_parameters])
        if np.abs(whole - cell).max() > ON_SYSTEM:
            raise UserError(
                f"the cell {cell.tolist()} is not {self.group.system}, as space group {self.space_group} is"
            )
        object.__setattr__(self, "lengths", whole[:3])
        object.__setattr__(self, "angles", whole[3:])
        exact = tuple(
            Orbit(o.species, o.letter, tuple(self.group.position(o.letter).representative(np.array(o.frac_coords))))
            for o in self.orbits
        )
        object.__setattr__(self, "orbits", exact)
        _ = self._points

    @property
    def group(self) -> Group:
        """Its space group."""
        return group(self.space_group)

    @property
    def free_parameters(self) -> list[int]:
        """Which of a, b, c, α, β, γ are free."""
        return list(SYSTEMS[self.group.system][0])

    @property
    def parameters(self) -> Float[np.ndarray, "free"]:
        """The free lattice parameters, in the order a, b, c, α, β, γ: Å and degrees."""
        return np.concatenate([self.lengths, self.angles])[self.free_parameters]

    @property
    def composition(self) -> dict[str, int]:
        """Atoms of each element in the primitive cell; elements as formulas order them."""
        counts = Counter[str]()
        for orbit in self.orbits:
            counts[orbit.symbol] += self.group.atoms(orbit.letter)
        return {symbol: counts[symbol] for symbol in ordered(counts)}

    @property
    def formula(self) -> str:
        """As `Crystal.formula`."""
        return formula_of(self.composition)

    def position(self, orbit: Orbit) -> Position:
        """The Wyckoff position of an orbit."""
        return self.group.position(orbit.letter)

    @cached_property
    def _points(self) -> tuple[Float[np.ndarray, "atoms 3"], ...]:
        """Of each orbit, in the primitive cell."""
        found = tuple(orbit_points(self.group, orbit) for orbit in self.orbits)
        for orbit, points in zip(self.orbits, found, strict=True):
            if len(points) != self.group.atoms(orbit.letter):
                raise UserError(
                    f"the orbit of {orbit.symbol} on {orbit.letter} of space group {self.space_group} collapses: it "
                    f"has {len(points)} atoms in the primitive cell, not {self.group.atoms(orbit.letter)}"
                )
        for i, (orbit, points) in enumerate(zip(self.orbits, found, strict=True)):
            for other, theirs in zip(self.orbits[:i], found, strict=False):
                if orbit.letter == other.letter and same(points[0], theirs).any():
                    raise UserError(
                        f"{other.symbol} and {orbit.symbol} lie on the same points of {orbit.letter} of space group "
                        f"{self.space_group}"
                    )
        return found

    def to_crystal(self, niggli: bool = False) -> Crystal:
        """All atoms, in a primitive cell: half of a centred one, say, or the Niggli cell."""
        lattice, points = primitive_vectors(self.group, self.lengths, self.angles), np.concatenate(self._points)
        if niggli:
            reduced, change = moyopy.niggli_reduce(lattice.tolist())
            lattice, points = np.array(reduced), points @ np.linalg.inv(np.array(change, np.float64).T)
        counts = [len(points) for points in self._points]
        species = np.repeat([orbit.species for orbit in self.orbits], counts)
        return Crystal.from_vectors(lattice, species, points)

    def sorted(self) -> SymmetricCrystal:
        """The same, its orbits as texts order them: elements as formulas do, then by letter, then by coordinates."""
        order = {symbol: i for i, symbol in enumerate(self.composition)}
        key = lambda o: (order[o.symbol], LETTERS.index(o.letter), o.frac_coords)  # noqa: E731
        return SymmetricCrystal(self.space_group, self.lengths, self.angles, tuple(sorted(self.orbits, key=key)))


def orbit_points(space_group: Group, orbit: Orbit) -> Float[np.ndarray, "points 3"]:
    """Of an orbit in the primitive cell, each once, as fractions of its edges."""
    representative = space_group.position(orbit.letter).representative(np.array(orbit.frac_coords))
    points = _images(space_group, representative, _making(space_group.number, orbit.letter))
    return points[_first(points)]


@cache
def _making(number: int, letter: str) -> Int[np.ndarray, "atoms"]:
    """Which operations make an orbit of the primitive cell, each atom once: those that do for any point but a few."""
    here = group(number)
    point = here.position(letter).representative(np.array([0.1234567, 0.2718282, 0.5772157]))
    return np.flatnonzero(_first(_images(here, point, slice(None))))


def _images(
    space_group: Group, point: Float[np.ndarray, "3"], which: slice | Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n 3"]:
    """Of a point in the conventional cell, by these operations, in the primitive one."""
    return space_group.operations[which].images(point) @ INVERSE[space_group.symbol[0]] % 1


def _first(points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n"]:
    """Which points lie where no earlier one does."""
    return ~np.tril(same(points[:, None], points), -1).any(1)


def same(one: Float[np.ndarray, "*n 3"], other: Float[np.ndarray, "*n 3"]) -> Bool[np.ndarray, "*n"]:
    """Whether points lie in the same place, modulo 1."""
    away = one - other
    return (np.abs(away - np.round(away)) < TOGETHER).all(-1)


def cell_of(system: str, parameters: Float[np.ndarray, "free"]) -> Float[np.ndarray, "6"]:
    """a, b, c, α, β, γ of a crystal system's cell with these free parameters."""
    free, equal, fixed = SYSTEMS[system]
    cell = np.zeros(6)
    cell[list(free)] = parameters
    cell[:3] = cell[list(equal)]
    cell[3:] = [mine if given is None else given for mine, given in zip(cell[3:], fixed, strict=True)]
    return cell


def primitive_vectors(
    space_group: Group, lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3 3"]:
    """Of a primitive cell, as rows in Å, from the conventional one. Raises LinAlgError as `vectors`."""
    return PRIMITIVE[space_group.symbol[0]] @ vectors(lengths, angles)


def vectors(lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Cell vectors as rows, in Å; right-handed. Their scalar products say all, and Cholesky's factor has these.

    Raises LinAlgError for a cell so flat that float64 finds no third direction.
    """
    ca, cb, cg = np.cos(np.radians(angles))
    return np.linalg.cholesky(np.array([[1, cg, cb], [cg, 1, ca], [cb, ca, 1]]) * np.outer(lengths, lengths))
