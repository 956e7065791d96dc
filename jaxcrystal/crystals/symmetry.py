"""Finds the space group of a crystal, and writes the crystal by it.

moyo (Shinohara; spglib's successor) finds the group of a crystal that is symmetric to within a tolerance, and refines
it: cell and positions become exactly symmetric, in `Setting.standard()`. Orbits and letters are then read off the
refined cell by our own tables, so that the two agree or the tolerance is made smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import moyopy
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.descriptions import descriptions, masked, traced
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, vectors
from jaxcrystal.crystals.symmetric_cif import to_cif
from jaxcrystal.crystals.wyckoff import Group, group
from jaxcrystal.errors import UserError

SYMPREC = 0.1  #: Å; usual for crystals that are not relaxed, and texts often have two decimals
#: Tolerances that are tried, as shares of the one asked for.
SMALLER = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4)
FOUND = 1e-4  #: fractions of an edge: how near refined atoms lie to where they belong

logging.getLogger("moyo").setLevel(logging.ERROR)  # it warns of operations in the given cell, which nobody asks for


@dataclass(frozen=True, eq=False)
class Symmetrized:
    """A crystal, made exactly symmetric."""

    descriptions: tuple[SymmetricCrystal, ...]  #: all ways to write it, the canonical one first
    symprec: float  #: Å, the tolerance at which its group was found
    moved: float  #: Å, how far the atom that moved most is from where it was

    @property
    def crystal(self) -> SymmetricCrystal:
        """The canonical description."""
        return self.descriptions[0]

    @cached_property
    def masked(self) -> tuple[SymmetricCrystal, ...]:
        """The descriptions in which infilling hides one element after the other, in the order of the composition."""
        return tuple(masked(self.crystal))

    def exceeds(self, number: int, atoms: int) -> bool:
        """Whether it is more symmetric than a crystal of that space group with so many atoms in the primitive cell: it
        has more operations for each atom, be they of the point group or translations."""
        return self.crystal.group.order * atoms > group(number).order * sum(self.crystal.composition.values())

    def to_cif(self) -> str:
        """The conventional cell with operations and letters (`symmetric_cif`)."""
        return to_cif(self.crystal, self.symprec)


def symmetrize(crystal: Crystal, symprec: float = SYMPREC) -> Symmetrized | None:
    """The crystal written by its space group; None where no group is found at any tolerance.

    `symprec`, in Å, is how far atoms and cell may be from symmetric; where no group fits, an atom would have to move
    further than that, or the cell is much thinner than crystals are, smaller ones are tried. None is rare, and means
    that atoms of one element lie on each other or that the cell is flat to within float64. A crystal without symmetry
    is not None but of space group 1.

    Raises UserError if `symprec` is not a positive number.
    """
    found = _search(crystal, symprec)
    return None if found is None else Symmetrized(tuple(descriptions(found.crystal)), found.symprec, found.moved)


def space_group(crystal: Crystal, symprec: float = SYMPREC) -> int | None:
    """The number of the group that `symmetrize` finds, in a tenth of the time; None and errors as there."""
    found = _search(crystal, symprec)
    return None if found is None else found.crystal.space_group


def orbit_of(crystal: Crystal, atom: int) -> Bool[np.ndarray, "atoms"] | None:
    """Which atoms of the cell its group, as `symmetrize` finds it, makes of one; None where it finds none."""
    found = _search(crystal, SYMPREC)
    if found is None:
        return None
    orbits = np.array(_dataset(crystal, vectors(crystal.lengths, crystal.angles), found.symprec).orbits)
    return orbits == orbits[atom]


def orbits_of_atoms(
    crystal: Crystal, symprec: float = SYMPREC
) -> tuple[SymmetricCrystal, Int[np.ndarray, "atoms"]] | None:
    """The crystal's canonical description, as `symmetrize` finds it, and on which of its orbits each given atom lies;
    None and errors as there."""
    found = _search(crystal, symprec)
    if found is None:
        return None
    images = [found.crystal.group.operations.images(np.array(orbit.frac_coords)) for orbit in found.crystal.orbits]
    away = found.points[:, None, None] - np.stack(images)  # [atoms, orbits, images, 3]
    away -= np.round(away)
    distances = np.linalg.norm(away @ vectors(found.crystal.lengths, found.crystal.angles), axis=-1).min(2)
    distances[crystal.species[:, None] != [orbit.species for orbit in found.crystal.orbits]] = np.inf
    description, before = traced(found.crystal)[0]
    return description, np.argsort(before)[distances.argmin(1)]


class _Refined(NamedTuple):
    crystal: SymmetricCrystal  #: in the setting, origin and axes that moyo chose
    symprec: float
    moved: float
    points: Float[np.ndarray, "atoms 3"]  #: the given atoms there


def _search(crystal: Crystal, symprec: float) -> _Refined | None:
    if not 0 < symprec < np.inf:
        raise UserError(f"symprec is a distance in Å above 0, found {symprec}")
    try:
        lattice = vectors(crystal.lengths, crystal.angles)
        symprec = min(symprec, _largest_symprec(lattice))
    except (np.linalg.LinAlgError, ValueError):  # flat
        return None
    for tolerance in (round(symprec * share, 12) for share in SMALLER):
        if (found := _refined(crystal, lattice, tolerance)) is not None:
            return found
    return None


def _largest_symprec(lattice: Float[np.ndarray, "3 3"]) -> float:
    """A tolerance above this one can keep moyo for ever, in a lattice that no crystal has.

    A shear by the shortest translation a lengthens an edge b of the reduced cell by a²/b at most. A tolerance that
    takes this for nothing lets shears pass for symmetries, and they never close to a group. Shorter edges than 20 Å
    count as such: in cells of less than an Å the same was seen, below a²/b. In those of crystals, with translations of
    2 Å or more, this is 0.2 Å or more up to edges of 20 Å.
    """
    reduced, _ = moyopy.minkowski_reduce(lattice.tolist())
    a, _, b = sorted(np.linalg.norm(reduced, axis=1))
    return float(a * a / max(b, 20.0))


def _refined(crystal: Crystal, lattice: Float[np.ndarray, "3 3"], symprec: float) -> _Refined | None:
    try:
        dataset = _dataset(crystal, lattice, symprec)
    except ValueError:  # no group at this tolerance
        return None
    if dataset.symprec < symprec:  # moyo halves it at once
        return None
    refined = dataset.std_cell
    rows, points, species = np.array(refined.basis), np.array(refined.positions), np.array(refined.numbers)
    given = (crystal.frac_coords - dataset.std_origin_shift) @ np.linalg.inv(np.array(dataset.std_linear)).T
    moved = _moved(given, crystal, rows, points, species)
    if moved > symprec:
        return None
    orbits = tuple(_orbits(group(dataset.number), points, species))
    lengths = np.linalg.norm(rows, axis=1)
    a, b, c = rows / lengths[:, None]
    angles = np.degrees(np.arccos(np.clip([b @ c, c @ a, a @ b], -1, 1)))
    try:
        exact = SymmetricCrystal(dataset.number, lengths, angles, orbits)
    except UserError:  # atoms that lie on each other
        return None
    atoms = len(crystal) * abs(np.linalg.det(dataset.std_linear))  # that the conventional cell must have
    if abs(sum(exact.composition.values()) * exact.group.centring - atoms) > 0.5:
        return None
    return _Refined(exact, symprec, moved, given)


def _dataset(crystal: Crystal, lattice: Float[np.ndarray, "3 3"], symprec: float) -> moyopy.MoyoDataset:
    cell = moyopy.Cell(lattice.tolist(), crystal.frac_coords.tolist(), crystal.species.tolist())
    return moyopy.MoyoDataset(cell, symprec=symprec, setting=moyopy.Setting.standard())


def _moved(
    before: Float[np.ndarray, "atoms 3"],
    crystal: Crystal,
    rows: Float[np.ndarray, "3 3"],
    points: Float[np.ndarray, "atoms 3"],
    species: Int[np.ndarray, "atoms"],
) -> float:
    """How far, in Å of the refined cell, the given atoms are from the refined ones of their element, at most."""
    away = before[:, None] - points
    away -= np.round(away)
    distances = np.linalg.norm(away @ rows, axis=-1)
    distances[crystal.species[:, None] != species] = np.inf
    return float(distances.min(1).max())


def _orbits(here: Group, points: Float[np.ndarray, "atoms 3"], species: Int[np.ndarray, "atoms"]) -> Iterator[Orbit]:
    """One of every orbit of the refined atoms; those that belong nowhere are left out."""
    left = np.ones(len(points), bool)
    while left.any():
        first = int(np.argmax(left))
        images = here.operations.images(points[first])
        away = images[:, None] - points
        together = (np.abs(away - np.round(away)) < FOUND).all(-1).any(0) & (species == species[first])
        left[first] = False
        left &= ~together
        own = points[together]
        for position in here.positions:
            if position.multiplicity == len(own):
                off = position.representative(own) - own
                near = (np.abs(off - np.round(off)) < FOUND).all(1)
                if near.any():
                    yield Orbit(int(species[first]), position.letter, tuple(own[np.argmax(near)].tolist()))
                    break
