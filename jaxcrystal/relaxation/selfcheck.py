"""Does a potential predict what it was trained to predict? Known crystals against known energies.

A potential whose weights and code disagree still returns smooth, plausible numbers: M3GNet weights from before
matgl 3.0, read by later code, are right for every element and wrong by eV/atom for every compound. So each potential
is asked two things before any other number of it is believed:

1. formation energies of five intermetallics, from the potential's own energies of their elements. They hold on any
   scale of total energies, and no gas is among the elements. The wrong direction of messages misses them by up to
   1 eV/atom;
2. total energies of five crystals, which tell the scale: Materials Project's, without or with its MP2020
   corrections, or a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymatgen.core import Structure

#: Largest error in eV/atom. CHGNet's worst is 0.11; the two Materials Project scales lie 0.30 apart.
TOLERANCE = 0.15


class EnergyReference(StrEnum):
    """The scale of a potential's total energies."""

    MP = "mp"  # Materials Project PBE and PBE+U, without corrections
    MP2020 = "mp2020"  # the same with the MP2020 corrections of compounds
    OWN = "own"  # another functional or other pseudopotentials: comparable with itself only


@dataclass(frozen=True)
class CheckRow:
    """One question to the potential."""

    crystal: str
    quantity: str  #: `energy` or `formation energy`
    expected: float  #: eV/atom
    found: float  #: eV/atom

    @property
    def error(self) -> float:
        """|found - expected| in eV/atom; infinite where the potential returned no number."""
        difference = abs(self.found - self.expected)
        return difference if difference == difference else float("inf")


@dataclass(frozen=True)
class SelfCheck:
    """What the potential answered."""

    formation: tuple[CheckRow, ...]  #: must hold
    total: tuple[CheckRow, ...]  #: against the nearer of the Materials Project's two scales
    reference: EnergyReference

    @property
    def worst(self) -> float:
        """Largest error of a formation energy, in eV/atom."""
        return max(row.error for row in self.formation)

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE

    def __str__(self) -> str:
        return "; ".join(
            f"{row.quantity} of {row.crystal}: expected {row.expected:.3f}, found {row.found:.3f} eV/atom"
            for row in self.formation
            if row.error > TOLERANCE
        )


#: Formation energies in eV/atom and lattice constants in Å of CsCl-type intermetallics (Materials Project, PBE).
INTERMETALLICS = {
    "AlNi": (2.89, -0.659),
    "AlRh": (3.00, -1.089),
    "CaPd": (3.53, -0.675),
    "CsAu": (4.36, -0.307),
    "ScRh": (3.21, -1.031),
}

#: Their elements: ase's name of the structure, a and c in Å (Materials Project, PBE).
ELEMENTAL = {
    "Al": ("fcc", 4.04, None),
    "Au": ("fcc", 4.17, None),
    "Ca": ("fcc", 5.53, None),
    "Cs": ("bcc", 6.16, None),
    "Ni": ("fcc", 3.51, None),
    "Pd": ("fcc", 3.96, None),
    "Rh": ("fcc", 3.85, None),
    "Sc": ("hcp", 3.32, 5.16),
}

#: ase's name of the structure, a in Å, and the energy in eV/atom: Materials Project's, then with MP2020 corrections
#: (Cl -0.614, O -0.687 eV an anion; Sci. Rep. 11, 15496).
KNOWN = {
    "NaCl": ("rocksalt", 5.69, -3.388, -3.695),
    "MgO": ("rocksalt", 4.24, -5.983, -6.327),
    "Si": ("diamond", 5.44, -5.425, -5.425),
    "Cu": ("fcc", 3.58, -4.099, -4.099),
    "CsCl": ("cesiumchloride", 4.15, -3.320, -3.627),
}


def known_crystals() -> dict[str, Structure]:
    """The five crystals of known total energy, as primitive cells."""
    return {name: _bulk(name, structure, a=a) for name, (structure, a, _, _) in KNOWN.items()}


def known_elements() -> set[str]:
    """Symbols of all elements that the questions name."""
    return {*ELEMENTAL} | {site.specie.symbol for crystal in known_crystals().values() for site in crystal}


def check(energies: Callable[[Sequence[Structure]], Sequence[float]]) -> SelfCheck:
    """Puts the questions to a function that gives energies in eV per cell (eighteen crystals of one to two atoms)."""
    crystals = {name: _bulk(name, s, a=a, c=c) for name, (s, a, c) in ELEMENTAL.items()}
    crystals |= {name: _bulk(name, "cesiumchloride", a=a) for name, (a, _) in INTERMETALLICS.items()}
    asked = [*crystals.values(), *known_crystals().values()]
    answers = [energy / len(crystal) for crystal, energy in zip(asked, energies(asked), strict=True)]
    of, found = dict(zip(crystals, answers, strict=False)), dict(zip(KNOWN, answers[len(crystals) :], strict=True))
    formation = []
    for name, (_, expected) in INTERMETALLICS.items():
        elements = [site.specie.symbol for site in crystals[name]]
        formed = of[name] - sum(of[symbol] for symbol in elements) / len(elements)
        formation.append(CheckRow(name, "formation energy", expected, formed))
    scales = {
        reference: tuple(CheckRow(name, "energy", KNOWN[name][column], energy) for name, energy in found.items())
        for reference, column in ((EnergyReference.MP, 2), (EnergyReference.MP2020, 3))
    }
    reference = min(scales, key=lambda scale: max(row.error for row in scales[scale]))
    total = scales[reference]
    if max(row.error for row in total) > TOLERANCE:
        reference = EnergyReference.OWN
    return SelfCheck(tuple(formation), total, reference)


def _bulk(name: str, structure: str, **lengths: float | None) -> Structure:
    from ase.build import bulk
    from pymatgen.io.ase import AseAtomsAdaptor

    return AseAtomsAdaptor.get_structure(bulk(name, structure, **lengths))
