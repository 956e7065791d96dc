"""Would a crystal exist? Relax it, give it a formation energy, place it against the hull: one row a crystal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcrystal.hull.formation import Uncovered
from jaxcrystal.hull.hull import FAR_BELOW, Hull
from jaxcrystal.relaxation.batch import Relaxation, RelaxationSettings, RelaxationStatus
from jaxcrystal.relaxation.relaxations import relax_all
from jaxcrystal.workers import Workers

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from jaxcrystal.relaxation.potentials import PotentialCard


class StabilityOutcome(StrEnum):
    """How the assessment of a crystal ended: as its relaxation did, or later."""

    CONVERGED = RelaxationStatus.CONVERGED
    NOT_CONVERGED = RelaxationStatus.NOT_CONVERGED
    DIVERGED = RelaxationStatus.DIVERGED
    UNKNOWN_ELEMENT = RelaxationStatus.UNKNOWN_ELEMENT
    ISOLATED = RelaxationStatus.ISOLATED
    FAILED = RelaxationStatus.FAILED
    TIMEOUT = RelaxationStatus.TIMEOUT
    CRASHED = RelaxationStatus.CRASHED
    UNCOVERED = "uncovered"  # relaxed, but the hull does not know an element
    FAR_BELOW_HULL = "far_below_hull"  # by more than `FAR_BELOW`: neither stable nor metastable


@dataclass(frozen=True)
class StabilityRow:
    """What is known of one crystal. None: not known; never a stand-in number."""

    outcome: StabilityOutcome
    reason: str = ""  #: in words, where the outcome is not `converged`
    energy_per_atom: float | None = None  #: eV/atom, on the potential's scale
    formation_energy_per_atom: float | None = None  #: eV/atom
    e_above_hull: float | None = None  #: eV/atom; negative below the hull, but never below -`FAR_BELOW`
    competing_phases: int | None = None  #: known compounds of the crystal's elements, or of some of them
    phases_of_system: int | None = None  #: those of exactly its elements
    cif: str | None = None  #: the relaxed crystal, P1
    converged: bool = False  #: whether the relaxation reached its force threshold
    steps: int = 0
    fmax: float | None = None  #: largest force left, in eV/Å
    rmsd: float | None = None  #: of the atoms from start to end, in Å (`relax.displacement`)
    volume_change: float | None = None  #: end over start, minus 1


def assess(
    structures: Sequence[Structure],
    potential: PotentialCard,
    hull: Hull | None,
    *,
    fmax: float = 0.1,
    max_steps: int = 500,
    timeout: float = 600.0,
    workers: Workers | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> list[StabilityRow]:
    """One row for each structure, in their order. Without a hull, crystals are relaxed and no more.

    `fmax` in eV/Å, `timeout` in seconds a crystal. What is in `cache_dir` from an earlier run is not done again.
    Raises UserError, before anything is relaxed, if the potential's energies and the hull's stand on different scales.
    """
    if hull is not None:
        hull.require_same_scale(potential)
    settings = RelaxationSettings(fmax, max_steps, timeout)
    relaxed = relax_all(structures, potential, settings, workers=workers, cache_dir=cache_dir, progress=progress)
    return [_place(relaxation, potential, hull) for relaxation in relaxed]


def _place(relaxation: Relaxation, potential: PotentialCard, hull: Hull | None) -> StabilityRow:
    from pymatgen.io.cif import CifWriter

    outcome, reason = StabilityOutcome(relaxation.status), relaxation.reason
    structure, energy = relaxation.structure, relaxation.energy
    if structure is None or energy is None:
        return StabilityRow(outcome, reason, steps=relaxation.steps)
    formation = distance = competing = of_system = None
    if hull is not None:
        try:
            formation = hull.references.formation_energy_per_atom(structure, energy, potential.reference)
            distance = hull.e_above_hull(structure.composition, formation)
            competing, of_system = hull.competitors(structure.composition)
        except Uncovered as error:
            outcome, reason = StabilityOutcome.UNCOVERED, str(error)
        if distance is not None and distance < -FAR_BELOW:
            outcome, reason = StabilityOutcome.FAR_BELOW_HULL, f"{-distance:.3f} eV/atom below the hull"
            distance = None
    return StabilityRow(
        outcome,
        reason,
        energy_per_atom=energy / len(structure),
        formation_energy_per_atom=formation,
        e_above_hull=distance,
        competing_phases=competing,
        phases_of_system=of_system,
        cif=str(CifWriter(structure)),
        converged=relaxation.converged,
        steps=relaxation.steps,
        fmax=relaxation.fmax,
        rmsd=relaxation.rmsd,
        volume_change=relaxation.volume_change,
    )
