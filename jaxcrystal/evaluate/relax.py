"""Relaxation of one crystal: atoms and cell follow the potential's forces downhill until the forces are small.

The way down is `fire.py`'s: the cell's deformation counts as three more atoms, so that one threshold holds for forces
and stress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from jaxcrystal.evaluate.fire import Fire
from jaxcrystal.evaluate.potentials import Potential, to_atoms

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

#: A cell that grows or shrinks by more than this factor has come apart or fallen into a hole of the potential.
VOLUME_FACTOR = 5.0


class RelaxationStatus(StrEnum):
    """How a relaxation ended."""

    CONVERGED = "converged"
    NOT_CONVERGED = "not_converged"  # the steps ran out; the energy is an upper bound
    DIVERGED = "diverged"  # a number was not finite, or the volume exploded
    UNKNOWN_ELEMENT = "unknown_element"  # the potential does not know an element
    FAILED = "failed"  # the potential raised an error; the reason names it
    TIMEOUT = "timeout"  # it took longer than a crystal may
    CRASHED = "crashed"  # the process died


@dataclass(frozen=True)
class Relaxation:
    """Where a crystal went. What could not be known is None."""

    status: RelaxationStatus
    reason: str = ""  #: in words, where the status is not `converged`
    structure: Structure | None = None  #: the last one
    energy: float | None = None  #: eV per cell
    steps: int = 0
    fmax: float | None = None  #: largest force at the end, of atoms and of the cell's three, in eV/Å
    rmsd: float | None = None  #: `displacement` from start to end, in Å
    volume_change: float | None = None  #: end over start, minus 1

    @property
    def converged(self) -> bool:
        return self.status is RelaxationStatus.CONVERGED


def relax(structure: Structure, potential: Potential, fmax: float = 0.1, max_steps: int = 500) -> Relaxation:
    """Relaxes positions and cell until no force exceeds `fmax` (eV/Å) or `max_steps` are done.

    Never raises for a crystal: whatever happens to it is a status with a reason.
    """
    if unknown := potential.unknown([element.symbol for element in structure.composition]):
        return Relaxation(RelaxationStatus.UNKNOWN_ELEMENT, f"{potential.name} does not know {', '.join(unknown)}")
    try:
        return _relax(structure, potential, fmax, max_steps)
    except Exception as error:  # ase, torch and the graph builders raise what they like: it is this crystal's reason
        return Relaxation(RelaxationStatus.FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _relax(structure: Structure, potential: Potential, fmax: float, max_steps: int) -> Relaxation:
    from pymatgen.core import Structure

    atoms = to_atoms(structure)
    start = atoms.copy()
    atoms.calc = potential.calculator()
    descent = Fire(atoms)
    status, reason, steps, largest = RelaxationStatus.NOT_CONVERGED, f"{max_steps} steps were not enough", 0, math.nan
    # The first turn looks at the crystal as it came; each later one follows a step.
    for steps in range(max_steps + 1):
        forces = descent.forces()
        largest = float(np.linalg.norm(forces, axis=1).max())
        if divergence := _divergence(atoms, start, largest):
            return Relaxation(RelaxationStatus.DIVERGED, f"{divergence} after {steps} steps", steps=steps)
        if largest <= fmax:
            status, reason = RelaxationStatus.CONVERGED, ""
            break
        if steps < max_steps:
            descent.step(forces)
    return Relaxation(
        status,
        reason,
        structure=Structure(atoms.cell.array, atoms.get_chemical_symbols(), atoms.get_scaled_positions()),
        energy=float(atoms.get_potential_energy()),
        steps=steps,
        fmax=largest,
        rmsd=displacement(start, atoms),
        volume_change=float(atoms.get_volume() / start.get_volume()) - 1,
    )


def _divergence(atoms: Atoms, start: Atoms, largest_force: float) -> str:
    """Why this can lead nowhere, or nothing."""
    if not (math.isfinite(largest_force) and math.isfinite(atoms.get_potential_energy())):
        return "energy or forces are not finite"
    factor = atoms.get_volume() / start.get_volume()
    if not 1 / VOLUME_FACTOR <= factor <= VOLUME_FACTOR:
        return f"the volume changed by a factor of {factor:.3g}"
    return ""


def displacement(start: Atoms, end: Atoms) -> float:
    """Root mean square displacement of the atoms, in Å.

    Fractional coordinates are compared, each with its nearest image, so that the strain of the cell does not count;
    the mean shift of all atoms is taken out, and lengths are measured in the mean of the two cells.
    """
    shift = end.get_scaled_positions(wrap=False) - start.get_scaled_positions(wrap=False)
    shift -= np.round(shift)
    shift -= shift.mean(axis=0)
    cartesian = shift @ ((start.cell.array + end.cell.array) / 2)
    return float(np.sqrt((cartesian**2).sum(axis=1).mean()))
