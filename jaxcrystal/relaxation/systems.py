"""Many crystals as one state: flat arrays, end to end, with an index that says which crystal an atom belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    from pymatgen.core import Structure


@dataclass(frozen=True)
class Systems:
    """Crystals end to end. Positions are not wrapped into their cells, so that an image stays the same image."""

    numbers: Int[np.ndarray, "atoms"]  #: atomic numbers
    positions: Float[np.ndarray, "atoms 3"]  #: Å
    cells: Float[np.ndarray, "systems 3 3"]  #: a row a lattice vector, Å
    system: Int[np.ndarray, "atoms"]  #: the crystal of each atom, ascending

    @classmethod
    def of(cls, structures: Sequence[Structure]) -> Systems:
        """The same crystals; charges and site properties, which no potential here reads, stay behind."""
        return cls(
            np.array([site.specie.Z for structure in structures for site in structure], dtype=np.int64),
            np.concatenate([np.empty((0, 3)), *(s.frac_coords @ s.lattice.matrix for s in structures)]),
            np.array([structure.lattice.matrix for structure in structures]).reshape(-1, 3, 3),
            np.repeat(np.arange(len(structures)), [len(structure) for structure in structures]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def counts(self) -> Int[np.ndarray, "systems"]:
        """Atoms of each crystal."""
        return np.bincount(self.system, minlength=len(self))

    @property
    def volumes(self) -> Float[np.ndarray, "systems"]:
        """Å³."""
        return np.abs(np.linalg.det(self.cells))

    @property
    def frac_coords(self) -> Float[np.ndarray, "atoms 3"]:
        """Not wrapped."""
        return np.einsum("ai,aij->aj", self.positions, np.linalg.inv(self.cells)[self.system])

    def select(self, keep: Bool[np.ndarray, "systems"]) -> Systems:
        """Those crystals that `keep` marks."""
        atoms = keep[self.system]
        system = (np.cumsum(keep) - 1)[self.system[atoms]]
        return Systems(self.numbers[atoms], self.positions[atoms], self.cells[keep], system)


@dataclass(frozen=True)
class Edges:
    """Pairs within the cutoff, in both directions, ordered by source. The two directions of a pair are one bond."""

    source: Int[np.ndarray, "edges"]
    target: Int[np.ndarray, "edges"]
    image: Float[np.ndarray, "edges 3"]  #: the cell of the target, in lattice vectors
    vector: Float[np.ndarray, "edges 3"]  #: from the source to the target, Å
    length: Float[np.ndarray, "edges"]  #: Å
    bond: Int[np.ndarray, "edges"]  #: which of the bonds
    edge_of_bond: Int[np.ndarray, "bonds"]  #: one of its two edges

    def angles(self, cutoff: float) -> Int[np.ndarray, "2 angles"]:
        """Ordered pairs of two edges that leave the same atom, both at most `cutoff` Å long."""
        short = np.flatnonzero(self.length <= cutoff)
        source = self.source[short]
        counts = np.bincount(source)
        each = counts[source]  # pairs that begin with this edge, the one with itself among them
        first = np.repeat(np.arange(len(short)), each)
        start = (np.cumsum(counts) - counts)[source]  # where this edge's atom begins
        second = np.arange(len(first)) + np.repeat(start - (np.cumsum(each) - each), each)
        return short[np.stack([first, second])[:, first != second]]


@dataclass(frozen=True)
class SinglePoints:
    """What a potential says of crystals as they are. A crystal that it has no answer for has NaN."""

    energies: Float[np.ndarray, "systems"]  #: eV per cell
    forces: Float[np.ndarray, "atoms 3"]  #: eV/Å
    stresses: Float[np.ndarray, "systems 3 3"]  #: eV/Å³, symmetric

    @classmethod
    def join(cls, parts: Sequence[SinglePoints]) -> SinglePoints:
        """Crystals of several answers, in their order."""
        return cls(
            np.concatenate([part.energies for part in parts]),
            np.concatenate([part.forces for part in parts]),
            np.concatenate([part.stresses for part in parts]),
        )

    @classmethod
    def of_slopes(
        cls,
        systems: Systems,
        energies: Float[np.ndarray, "systems"],
        edges: Edges,
        slopes: Float[np.ndarray, "edges 3"],
    ) -> SinglePoints:
        """Of energies that depend on the vectors r of edges alone, with slopes g = ∂E/∂r in eV/Å.

        An edge pulls its source by g and its target by -g, and its crystal's virial ∂E/∂ε is the sum of r ⊗ g.
        """
        forces = np.zeros((len(systems.numbers), 3))
        for atom, pulls in ((edges.source, slopes), (edges.target, -slopes)):
            for axis in range(3):
                forces[:, axis] += np.bincount(atom, pulls[:, axis], len(forces))
        virials = np.zeros((len(systems), 9))
        of = systems.system[edges.source]
        for entry, value in enumerate((edges.vector[:, :, None] * slopes[:, None, :]).reshape(-1, 9).T):
            virials[:, entry] = np.bincount(of, value, len(systems))
        virials = virials.reshape(-1, 3, 3)
        return cls(energies, forces, (virials + virials.transpose(0, 2, 1)) / 2 / systems.volumes[:, None, None])

    @classmethod
    def unknown(cls, systems: Systems) -> SinglePoints:
        """No answer for any."""
        atoms, count = len(systems.numbers), len(systems)
        return cls(np.full(count, np.nan), np.full((atoms, 3), np.nan), np.full((count, 3, 3), np.nan))
