"""Relaxation: atoms and cells of many crystals follow the potential's forces downhill until the forces are small.

The way down is `fire.py`'s: the cell's deformation counts as three more atoms, so that one threshold holds for forces
and stress. The crystals of a batch share the potential's passes and nothing else: each has a way of its own, leaves
when it ends, and costs only itself if the potential cannot take it.

    waiting ──▶ the batch ──▶ single points of all ──▶ one step of each ──┐
                    ▲                   │                                 │
                    └───────────────────┼─────────────────────────────────┘
                                        └──▶ a Relaxation of each that has ended
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxcrystal.errors import UserError
from jaxcrystal.relaxation.fire import Descent
from jaxcrystal.relaxation.fragments import isolated
from jaxcrystal.relaxation.neighbours import Candidates
from jaxcrystal.relaxation.potentials import Potential
from jaxcrystal.relaxation.systems import SinglePoints, Systems

if TYPE_CHECKING:
    from pymatgen.core import Structure

#: A cell that grows or shrinks by more than this factor has come apart or fallen into a hole of the potential.
VOLUME_FACTOR = 5.0


class RelaxationStatus(StrEnum):
    """How a relaxation ended."""

    CONVERGED = "converged"
    NOT_CONVERGED = "not_converged"  # the steps ran out; the energy is an upper bound
    DIVERGED = "diverged"  # a number was not finite, or the volume exploded
    UNKNOWN_ELEMENT = "unknown_element"  # the potential does not know an element
    ISOLATED = "isolated"  # an atom or a molecule without neighbours, at the start or at the end: no crystal
    FAILED = "failed"  # the potential raised an error; the reason names it
    TIMEOUT = "timeout"  # it took longer than a crystal may
    CRASHED = "crashed"  # the process died, or the machine had no memory for it: another time it may go well


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


@dataclass(frozen=True)
class RelaxationSettings:
    """What a relaxation's outcome depends on beside the crystal and the potential."""

    fmax: float = 0.1  #: largest force left, in eV/Å
    max_steps: int = 500
    timeout: float = 600.0  #: seconds that one crystal may take; a step of many is shared out by atoms

    def __post_init__(self) -> None:
        if not (self.fmax > 0 and self.max_steps >= 0 and self.timeout > 0):
            raise UserError(f"{self}: fmax and timeout must be positive, max_steps not negative")


@dataclass
class _Member:
    """A crystal of a batch: what is not in the flat arrays."""

    index: int
    start: Structure
    candidates: Candidates | None = None
    seconds: float = 0.0  #: spent on it
    failure: Relaxation | None = None  #: what it ends with, if the potential raised an error for it


class Batch:
    """Crystals that relax together: `add` them at any time; `step` moves each and returns those that have ended."""

    def __init__(self, potential: Potential, settings: RelaxationSettings) -> None:
        self.potential, self.settings = potential, settings
        self.limit = potential.atoms_at_once  #: atoms; halved when there is no memory for a pass of so many
        self._members: list[_Member] = []
        self._descent = Descent.of(Systems.of([]))

    @property
    def atoms(self) -> int:
        """Of all crystals that have not ended."""
        return sum(len(member.start) for member in self._members)

    def add(self, index: int, structure: Structure) -> Relaxation | None:
        """Takes the crystal in: `index` comes back with its Relaxation. If it cannot be taken in, that is returned."""
        if not len(structure):
            return Relaxation(RelaxationStatus.FAILED, "there are no atoms")
        try:
            if unknown := self.potential.unknown([element.symbol for element in structure.composition.elements]):
                reason = f"{self.potential.name} does not know {', '.join(unknown)}"
                return Relaxation(RelaxationStatus.UNKNOWN_ELEMENT, reason)
            systems = Systems.of([structure])
            if alone := isolated(systems):
                return Relaxation(RelaxationStatus.ISOLATED, f"{alone} without neighbours")
            self._descent = Descent.join([self._descent, Descent.of(systems)])
        except Exception as error:  # pymatgen's, for a site that holds no single element
            return Relaxation(RelaxationStatus.FAILED, _words(error))
        self._members.append(_Member(index, structure))
        return None

    def step(self) -> list[tuple[int, Relaxation]]:
        """Never raises for a crystal: whatever happens to it is a status with a reason."""
        began = time.monotonic()
        systems = self._descent.systems
        found = self._single_points(systems, self._members)
        forces = self._descent.forces(found)
        ends = self._ends(systems, found, self._descent.largest(forces))
        ended = [(m.index, end) for m, end in zip(self._members, ends, strict=True) if end is not None]
        stay = np.array([end is None for end in ends])
        forces = forces[stay[self._descent.system]]
        self._descent = self._descent.select(stay)
        if stay.any():
            self._descent = self._descent.step(forces)
        for member, atoms in zip(self._members, systems.counts, strict=True):
            member.seconds += (time.monotonic() - began) * atoms / len(systems.numbers)
        self._members = [member for member, staying in zip(self._members, stay, strict=True) if staying]
        return ended

    def _single_points(self, systems: Systems, members: Sequence[_Member]) -> SinglePoints:
        """Asks about all at once; if that raises, about each half. One that raises alone has NaN and a failure."""
        if len(members) == 1 or len(systems.numbers) <= self.limit:
            try:
                return self._ask(systems, members)
            except Exception as error:  # torch and the search for neighbours raise what they like
                short = _of_the_machine(error)
                if len(members) == 1:
                    status = RelaxationStatus.CRASHED if short else RelaxationStatus.FAILED
                    members[0].failure = Relaxation(status, _words(error))
                    return SinglePoints.unknown(systems)
                if short:
                    self.limit = len(systems.numbers) // 2
        first = np.arange(len(members)) < len(members) // 2
        halves = ((first, members[: first.sum()]), (~first, members[first.sum() :]))
        return SinglePoints.join([self._single_points(systems.select(half), own) for half, own in halves])

    def _ask(self, systems: Systems, members: Sequence[_Member]) -> SinglePoints:
        found, candidates = self.potential.single_points(systems, [member.candidates for member in members])
        for member, mine in zip(members, candidates, strict=True):
            member.candidates = mine
        return found

    def _ends(
        self, systems: Systems, found: SinglePoints, largest: Float[np.ndarray, "systems"]
    ) -> list[Relaxation | None]:
        """How the relaxation of each crystal has ended; None where it has not."""
        return [
            self._end(i, systems, float(energy), float(force), float(factor))
            for i, (energy, force, factor) in enumerate(
                zip(found.energies, largest, np.linalg.det(self._descent.deformation), strict=True)
            )
        ]

    def _end(self, i: int, systems: Systems, energy: float, largest: float, factor: float) -> Relaxation | None:
        """`largest`: force in eV/Å; `factor`: of the volume since the start."""
        member, steps, settings = self._members[i], int(self._descent.steps[i]), self.settings
        if member.failure is not None:
            return self._isolated(i, systems, steps) or replace(member.failure, steps=steps)
        if not np.isfinite([energy, largest]).all():
            reason = f"energy or forces are not finite after {steps} steps"
            return Relaxation(RelaxationStatus.DIVERGED, reason, steps=steps)
        if not 1 / VOLUME_FACTOR <= factor <= VOLUME_FACTOR:
            reason = f"the volume changed by a factor of {factor:.3g} after {steps} steps"
            return Relaxation(RelaxationStatus.DIVERGED, reason, steps=steps)
        if largest > settings.fmax and steps < settings.max_steps:
            if member.seconds > settings.timeout:
                return Relaxation(RelaxationStatus.TIMEOUT, f"over {settings.timeout:g} s", steps=steps)
            return None
        if (apart := self._isolated(i, systems, steps)) is not None:
            return apart
        end = _structure(member.start, systems.cells[i], systems.positions[systems.system == i])
        converged = largest <= settings.fmax
        return Relaxation(
            RelaxationStatus.CONVERGED if converged else RelaxationStatus.NOT_CONVERGED,
            "" if converged else f"{settings.max_steps} steps were not enough",
            structure=end,
            energy=energy,
            steps=steps,
            fmax=largest,
            rmsd=displacement(member.start, end),
            volume_change=factor - 1,
        )

    def _isolated(self, i: int, systems: Systems, steps: int) -> Relaxation | None:
        """The end of a crystal that has come apart."""
        alone = isolated(systems.select(np.arange(len(systems)) == i))
        reason = f"{alone} without neighbours after {steps} steps"
        return Relaxation(RelaxationStatus.ISOLATED, reason, steps=steps) if alone else None


def relax_together(
    structures: Iterable[Structure], potential: Potential, settings: RelaxationSettings = RelaxationSettings()
) -> Iterator[tuple[int, Relaxation] | None]:
    """Yields (index, Relaxation) as they end, and None after each step, as a sign of life.

    As many relax together as the potential takes atoms at once; where one ends the next begins. A structure is taken
    from `structures` only when it is the next.
    Never raises for a crystal: whatever happens to it is a status with a reason.
    """
    batch, waiting = Batch(potential, settings), enumerate(structures)
    first = next(waiting, None)
    while first is not None or batch.atoms:
        while first is not None and (not batch.atoms or batch.atoms + len(first[1]) <= batch.limit):
            if (refused := batch.add(*first)) is not None:
                yield first[0], refused
            first = next(waiting, None)
        if batch.atoms:
            yield from batch.step()
        yield None


def relax(structure: Structure, potential: Potential, fmax: float = 0.1, max_steps: int = 500) -> Relaxation:
    """Relaxes positions and cell until no force exceeds `fmax` (eV/Å) or `max_steps` are done."""
    found = relax_together([structure], potential, RelaxationSettings(fmax, max_steps))
    ((_, relaxation),) = filter(None, found)
    return relaxation


def _structure(start: Structure, cell: Float[np.ndarray, "3 3"], positions: Float[np.ndarray, "atoms 3"]) -> Structure:
    from pymatgen.core import Structure

    symbols = [site.specie.symbol for site in start]
    return Structure(cell, symbols, positions, coords_are_cartesian=True, to_unit_cell=True)


def _of_the_machine(error: Exception) -> bool:
    """Whether it is no fault of the crystal: no memory, or a device that has failed."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in ("CUDA error", "allocate memory"))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def displacement(start: Structure, end: Structure) -> float:
    """Root mean square displacement of the atoms, in Å.

    Fractional coordinates are compared, each with its nearest image, so that the strain of the cell does not count;
    the mean shift of all atoms is taken out, and lengths are measured in the mean of the two cells.
    """
    shift = end.frac_coords - start.frac_coords
    shift -= np.round(shift)
    shift -= shift.mean(axis=0)
    cartesian = shift @ ((start.lattice.matrix + end.lattice.matrix) / 2)
    return float(np.sqrt((cartesian**2).sum(axis=1).mean()))
