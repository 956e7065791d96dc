"""FIRE (Phys. Rev. Lett. 97, 170201) on the atoms and the cell of a crystal together.

The cell is the start's, strained by F = exp(A): cell = cell₀ Fᵀ, positions = u Fᵀ. The descent moves the unstrained
positions u and, as three more atoms, n·A (n: number of atoms), so that one threshold holds for forces and stress and
no step can turn the cell inside out. With the virial W = -V σ, the forces on them are

    on u:    f F              on n·A:    L(Aᵀ, W F⁻ᵀ) / n

where L(X, G) is the derivative of exp at X in the direction G, the upper right block of exp [[X, G], [0, X]].

These are ase's FIRE and FrechetCellFilter, step for step. ase takes nine such derivatives and two matrix logarithms a
step, which cost nearly as much as CHGNet does. Here A is what is kept and L what is asked for: a step takes the
exponentials of one 3 x 3 and one 6 x 6 matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from ase import Atoms

#: FIRE's constants, as ase has them. Times are in ase's units (Å √(u/eV), with masses of 1), lengths in Å.
FIRST_TIME_STEP, LONGEST_TIME_STEP, LONGEST_MOVE = 0.1, 1.0, 0.2
FASTER, SLOWER, PATIENCE = 1.1, 0.5, 5
FIRST_MIXING, MIXING_DECAY = 0.1, 0.99


class Fire:
    """The descent of `atoms`, whose calculator gives energy, forces and stress. `step` moves them in place."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self._cell = atoms.cell.array.copy()
        # The unstrained positions, then n·A; and F.
        self._x = np.concatenate([atoms.positions, np.zeros((3, 3))])
        self._deformation = np.eye(3)
        self._velocity: Float[np.ndarray, "n+3 3"] | None = None
        self._time_step, self._mixing, self._downhill = FIRST_TIME_STEP, FIRST_MIXING, 0

    def forces(self) -> Float[np.ndarray, "n+3 3"]:
        """Forces in eV/Å: of the atoms, then of the cell's three. NaN throughout where the stress is not finite."""
        from scipy.linalg import expm

        n = len(self.atoms)
        strain = self._x[n:] / n
        virial = -self.atoms.get_volume() * self.atoms.get_stress(voigt=False)
        if not np.isfinite(virial).all():
            return np.full_like(self._x, np.nan)
        direction = virial @ np.linalg.inv(self._deformation).T
        # L is linear in G: of length 1, it leaves the accuracy of the exponential to A.
        size = float(np.linalg.norm(direction)) or 1.0
        derivative = expm(np.block([[strain.T, direction / size], [np.zeros((3, 3)), strain.T]]))[:3, 3:]
        return np.concatenate([self.atoms.get_forces() @ self._deformation, derivative * (size / n)])

    def step(self, forces: Float[np.ndarray, "n+3 3"]) -> None:
        """One step along `forces`, which are `forces()` of where the atoms are."""
        from scipy.linalg import expm

        if self._velocity is None:
            self._velocity = np.zeros_like(forces)
        elif np.vdot(forces, self._velocity) > 0:
            speed = np.linalg.norm(self._velocity) / np.linalg.norm(forces)
            self._velocity = (1 - self._mixing) * self._velocity + self._mixing * speed * forces
            if self._downhill > PATIENCE:
                self._time_step = min(self._time_step * FASTER, LONGEST_TIME_STEP)
                self._mixing *= MIXING_DECAY
            self._downhill += 1
        else:
            self._velocity[:] = 0
            self._time_step, self._mixing, self._downhill = self._time_step * SLOWER, FIRST_MIXING, 0
        self._velocity = self._velocity + self._time_step * forces
        move = self._time_step * self._velocity
        self._x += move * min(1.0, LONGEST_MOVE / np.linalg.norm(move))
        n = len(self.atoms)
        self._deformation = expm(self._x[n:] / n)
        self.atoms.set_cell(self._cell @ self._deformation.T)
        self.atoms.positions = self._x[:n] @ self._deformation.T
