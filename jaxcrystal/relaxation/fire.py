"""FIRE (Phys. Rev. Lett. 97, 170201) on the atoms and the cells of many crystals at once, each on a way of its own.

A crystal's cell is the start's, strained by F = exp(A): cell = cell₀ Fᵀ, positions = u Fᵀ. The descent moves the
unstrained positions u and, as three more atoms, n·A (n: number of atoms), so that one threshold holds for forces and
stress and no step can turn the cell inside out. With the virial W = -V σ, the forces on them are

    on u:    f F              on n·A:    L(Aᵀ, W F⁻ᵀ) / n

where L(X, G) is the derivative of exp at X in the direction G, the upper right block of exp [[X, G], [0, X]].

These are ase's FIRE and FrechetCellFilter, step for step. ase takes nine such derivatives and two matrix logarithms a
step, which cost nearly as much as CHGNet does. Here A is what is kept and L what is asked for: a step takes the
exponentials of one 3 x 3 and one 6 x 6 matrix a crystal.

All crystals lie in flat arrays of rows, each with its atoms and then the three of its cell:

    system    0   0   0 0 0   1  1  1  1 1 1
    number   11  17   - - -   22 8  8  - - -
    x         u   u    n·A     u  u  u   n·A
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxcrystal.relaxation.systems import SinglePoints, Systems

#: FIRE's constants, as ase has them. Times are in ase's units (Å √(u/eV), with masses of 1), lengths in Å.
FIRST_TIME_STEP, LONGEST_TIME_STEP, LONGEST_MOVE = 0.1, 1.0, 0.2
FASTER, SLOWER, PATIENCE = 1.1, 0.5, 5
FIRST_MIXING, MIXING_DECAY = 0.1, 0.99

#: The fields of a `Descent` that have a value a row; the others have one a crystal.
ROWS = {"system", "numbers", "x", "velocity"}


@dataclass(frozen=True)
class Descent:
    """Where each of many crystals stands on its way down."""

    system: Int[np.ndarray, "rows"]  #: the crystal of each row, ascending
    numbers: Int[np.ndarray, "rows"]  #: atomic numbers; 0 where the row is one of a cell's
    x: Float[np.ndarray, "rows 3"]  #: unstrained positions, and n·A; Å
    velocity: Float[np.ndarray, "rows 3"]
    start: Float[np.ndarray, "systems 3 3"]  #: cells at the start, Å
    deformation: Float[np.ndarray, "systems 3 3"]  #: F
    steps: Int[np.ndarray, "systems"]  #: that were taken
    time_step: Float[np.ndarray, "systems"]
    mixing: Float[np.ndarray, "systems"]
    downhill: Int[np.ndarray, "systems"]  #: steps since the last that had led uphill

    @classmethod
    def of(cls, systems: Systems) -> Descent:
        """Crystals before their first step."""
        count = len(systems)
        system = np.repeat(np.arange(count), systems.counts + 3)
        atoms = np.ones(len(system), dtype=bool)
        atoms[np.cumsum(systems.counts + 3)[:, None] - [3, 2, 1]] = False
        numbers, x = np.zeros(len(system), dtype=int), np.zeros((len(system), 3))
        numbers[atoms], x[atoms] = systems.numbers, systems.positions
        return cls(
            system=system,
            numbers=numbers,
            x=x,
            velocity=np.zeros_like(x),
            start=systems.cells,
            deformation=np.tile(np.eye(3), (count, 1, 1)),
            steps=np.zeros(count, dtype=int),
            time_step=np.full(count, FIRST_TIME_STEP),
            mixing=np.full(count, FIRST_MIXING),
            downhill=np.zeros(count, dtype=int),
        )

    @classmethod
    def join(cls, parts: Sequence[Descent]) -> Descent:
        """The crystals of all parts, in their order."""
        joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        before = np.cumsum([0, *map(len, parts)])[:-1]
        joined["system"] = joined["system"] + np.repeat(before, [len(part.system) for part in parts])
        return cls(**joined)

    def select(self, keep: Bool[np.ndarray, "systems"]) -> Descent:
        """Those crystals that `keep` marks."""
        rows = keep[self.system]
        kept = {f.name: getattr(self, f.name)[rows if f.name in ROWS else keep] for f in fields(self)}
        kept["system"] = (np.cumsum(keep) - 1)[kept["system"]]
        return Descent(**kept)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def systems(self) -> Systems:
        """The crystals where they are now."""
        atoms = self.numbers > 0
        system, transposed = self.system[atoms], self.deformation.transpose(0, 2, 1)
        positions = np.einsum("ai,aij->aj", self.x[atoms], transposed[system])
        return Systems(self.numbers[atoms], positions, self.start @ transposed, system)

    def forces(self, found: SinglePoints) -> Float[np.ndarray, "rows 3"]:
        """Forces in eV/Å, of atoms and cells. NaN in all rows of a crystal whose stress is not finite."""
        from scipy.linalg import expm

        atoms = self.numbers > 0
        sound = np.isfinite(found.stresses).all(axis=(1, 2))
        volume = np.abs(np.linalg.det(self.start @ self.deformation.transpose(0, 2, 1)))
        virial = np.where(sound[:, None, None], -volume[:, None, None] * found.stresses, 0)
        direction = virial @ np.linalg.inv(self.deformation).transpose(0, 2, 1)
        # L is linear in G: of length 1, it leaves the accuracy of the exponential to A.
        size = np.linalg.norm(direction, axis=(1, 2))[:, None, None]
        blocks = np.zeros((len(self), 6, 6))
        blocks[:, :3, :3] = blocks[:, 3:, 3:] = self._strain.transpose(0, 2, 1)
        blocks[:, :3, 3:] = direction / np.where(size > 0, size, 1)
        forces = np.empty_like(self.x)
        forces[atoms] = np.einsum("ai,aij->aj", found.forces, self.deformation[self.system[atoms]])
        forces[~atoms] = (expm(blocks)[:, :3, 3:] * size / self._count).reshape(-1, 3)
        forces[~sound[self.system]] = np.nan
        return forces

    def largest(self, forces: Float[np.ndarray, "rows 3"]) -> Float[np.ndarray, "systems"]:
        """The largest force of each crystal, on an atom or one of its cell's three, in eV/Å; NaN where one is NaN."""
        return np.maximum.reduceat(np.linalg.norm(forces, axis=1), np.searchsorted(self.system, np.arange(len(self))))

    def step(self, forces: Float[np.ndarray, "rows 3"]) -> Descent:
        """One step of each along `forces`, which are `forces()` of where they are."""
        from scipy.linalg import expm

        rows = self.system
        down = self._sums(forces * self.velocity) > 0
        up = ~down & (self.steps > 0)  # before the first step there is no way to have come
        speed = np.sqrt(self._sums(self.velocity**2) / self._sums(forces**2))
        mixed = (1 - self.mixing)[rows, None] * self.velocity + (self.mixing * speed)[rows, None] * forces
        faster = down & (self.downhill > PATIENCE)
        longer = np.minimum(self.time_step * FASTER, LONGEST_TIME_STEP)
        time_step = np.select([faster, up], [longer, self.time_step * SLOWER], self.time_step)
        velocity = np.where(down[rows, None], mixed, 0) + time_step[rows, None] * forces
        move = time_step[rows, None] * velocity
        move *= np.minimum(1.0, LONGEST_MOVE / np.sqrt(self._sums(move**2)))[rows, None]
        moved = replace(
            self,
            x=self.x + move,
            velocity=velocity,
            steps=self.steps + 1,
            time_step=time_step,
            mixing=np.select([faster, up], [self.mixing * MIXING_DECAY, FIRST_MIXING], self.mixing),
            downhill=np.where(down, self.downhill + 1, 0),
        )
        return replace(moved, deformation=expm(moved._strain))

    @property
    def _count(self) -> Int[np.ndarray, "systems 1 1"]:
        """n of each crystal."""
        return (np.bincount(self.system) - 3)[:, None, None]

    @property
    def _strain(self) -> Float[np.ndarray, "systems 3 3"]:
        """A of each crystal."""
        return self.x[self.numbers == 0].reshape(-1, 3, 3) / self._count

    def _sums(self, values: Float[np.ndarray, "rows 3"]) -> Float[np.ndarray, "systems"]:
        return np.bincount(self.system, weights=values.sum(axis=1), minlength=len(self))
