"""Many crystals by their symmetry, as arrays: what is stored of them, and what the device writes them from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, UInt8, UInt32

from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, Crystal
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal
from jaxcrystal.crystals.wyckoff import LETTERS, group
from jaxcrystal.errors import UserError

Row: TypeAlias = tuple[int, Sequence[float], Sequence[int], Sequence[str], np.ndarray, int]


@struct.dataclass
class SymmetricBatch:
    """Crystals with all their descriptions, padded; any leading shape (`*n`). Units are those of `CrystalBatch`.

    The orbits of every description stand in the order of texts, so that their elements are the same.
    """

    space_group: Int[Array, "*n"]
    cell: UInt32[Array, "*n 6"]  #: a, b, c in 2⁻²⁴ Å and α, β, γ in 2⁻²⁴ degrees, of the conventional cell
    elements: Int[Array, "*n elements"]  #: atomic numbers in the order of the composition, 0 beyond
    counts: Int[Array, "*n elements"]  #: their atoms in the primitive cell
    species: Int[Array, "*n orbits"]  #: atomic numbers, 0 beyond the last orbit
    letters: UInt8[Array, "*n descriptions orbits"]  #: places in `wyckoff.LETTERS`
    frac_coords: UInt32[Array, "*n descriptions orbits 3"]  #: of representatives, in 2⁻³² of the edge
    num_descriptions: Int[Array, "*n"]  #: the first is the canonical one
    #: Whether behind them stand those in which infilling hides an element, one for each of the composition.
    hides: Bool[Array, "*n"]

    @classmethod
    def of(
        cls, crystals: Sequence[Sequence[SymmetricCrystal]], masked: Sequence[Sequence[SymmetricCrystal]] = ()
    ) -> SymmetricBatch:
        """Of the descriptions of each crystal, the canonical one first, and those that hide an element, if they are
        known."""
        rows = []
        for each, hiding in itertools.zip_longest(crystals, masked, fillvalue=()):
            each = [*each, *hiding]
            first = each[0]
            letters = ["".join(orbit.letter for orbit in one.orbits) for one in each]
            coords = np.array([[orbit.frac_coords for orbit in one.orbits] for one in each])
            species = [orbit.species for orbit in first.orbits]
            rows.append((first.space_group, [*first.lengths, *first.angles], species, letters, coords, len(hiding)))
        return cls.read(rows)

    def __len__(self) -> int:
        return len(self.space_group)

    def __getitem__(self, index: object) -> SymmetricBatch:
        return jax.tree.map(lambda x: x[index], self)

    def crystal(self, index: int, description: int = 0) -> SymmetricCrystal:
        """One description of one of them, on the host."""
        cell = np.asarray(self.cell[index], np.float64) / 2**CELL_BITS
        orbits = tuple(
            Orbit(int(z), LETTERS[letter], tuple((coords.astype(np.float64) / 2**COORD_BITS).tolist()))
            for z, letter, coords in zip(
                np.asarray(self.species[index]),
                np.asarray(self.letters[index, description]),
                np.asarray(self.frac_coords[index, description]),
                strict=True,
            )
            if z
        )
        return SymmetricCrystal(int(self.space_group[index]), cell[:3], cell[3:], orbits)

    @classmethod
    def read(cls, rows: Sequence[Row]) -> SymmetricBatch:
        """Of space group, cell, species, letters of each description, coordinates of each orbit, and how many of the
        descriptions, the last ones, hide an element; as stored."""
        n = len(rows)
        compositions = [_composition(number, species, letters[0]) for number, _, species, letters, *_ in rows]
        elements = max(map(len, compositions), default=0)
        orbits = max((len(species) for _, _, species, *_ in rows), default=0)
        most = max((len(letters) for *_, letters, _, _ in rows), default=0)
        batch = cls(
            space_group=np.array([row[0] for row in rows], np.int32),
            cell=np.round(np.reshape([row[1] for row in rows], (n, 6)) * 2**CELL_BITS).astype(np.uint32),
            elements=np.zeros((n, elements), np.int32),
            counts=np.zeros((n, elements), np.int32),
            species=np.zeros((n, orbits), np.int32),
            letters=np.zeros((n, most, orbits), np.uint8),
            frac_coords=np.zeros((n, most, orbits, 3), np.uint32),
            num_descriptions=np.array([len(letters) - hiding for *_, letters, _, hiding in rows], np.int32),
            hides=np.array([hiding > 0 for *_, hiding in rows], bool),
        )
        for i, ((_, _, species, letters, coords, _), composition) in enumerate(zip(rows, compositions, strict=True)):
            batch.elements[i, : len(composition)] = list(composition)
            batch.counts[i, : len(composition)] = list(composition.values())
            batch.species[i, : len(species)] = species
            batch.letters[i, : len(letters), : len(species)] = [[LETTERS.index(x) for x in each] for each in letters]
            batch.frac_coords[i, : len(letters), : len(species)] = np.round(coords * 2**COORD_BITS) % 2**COORD_BITS
        return batch

    @classmethod
    def found(cls, crystals: Sequence[Crystal], names: Sequence[str]) -> SymmetricBatch:
        """Of crystals whose symmetry is looked for now: some hundredths of a second each.

        Raises UserError for one of which no group is found.
        """
        from jaxcrystal.crystals.symmetry import symmetrize

        found: list[Any] = [symmetrize(crystal) for crystal in crystals]
        for name, one in zip(names, found, strict=True):
            if one is None:
                raise UserError(f"{name} has no space group at any tolerance: its atoms lie on each other")
        return cls.of([one.descriptions for one in found], [one.masked for one in found])


def _composition(number: int, species: Sequence[int], letters: str) -> dict[int, int]:
    """Atoms of each element in the primitive cell, by atomic number, in the order of the orbits."""
    counts: dict[int, int] = {}
    for z, letter in zip(species, letters, strict=True):
        counts[z] = counts.get(z, 0) + group(number).atoms(letter)
    return counts
