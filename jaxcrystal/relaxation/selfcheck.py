"""Does a potential predict what it was trained to predict? Known crystals against known energies.

A potential whose weights and code disagree still returns smooth, plausible numbers: M3GNet weights from before
matgl 3.0, read by later code, are right for every element and wrong by eV/atom for every compound; one wrong row of an
embedding is wrong for one element only. So before any number of a potential is used, its energies of some 170 crystals,
of all elements that it supports, are compared with the Materials Project's:

- if nearly all agree, without or with the MP2020 corrections, the potential stands on that scale, and all must;
- else its total energies stand on a scale of their own. Then only differences between elements' energies can be the
  scale's: one shift an element is fitted to all crystals (least squares), and with these all must agree.

On a scale of its own a constant that is added to an element's energy cannot be seen; it cancels in a hull of the
potential's own energies, which is the only one that such a potential may be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from jaxcrystal.relaxation.known_crystals import KnownCrystal, known_crystals

if TYPE_CHECKING:
    from pymatgen.core import Structure

#: Largest error in eV/atom. CHGNet's and M3GNet-MP's worst is 0.11; 0.5 eV too much an atom is at least 0.17 where
#: half of the atoms are of that element.
TOLERANCE = 0.15

#: Share of the crystals within the tolerance, from which on a potential stands on a scale of the Materials Project.
#: M3GNet-MatPES, of the same functional and other pseudopotentials, has 0.68; two elements exchanged leave 0.93.
AGREEING = 0.85

#: Known crystals, of whose elements a potential must know all, that it can be checked at all.
FEWEST = 10


class EnergyReference(StrEnum):
    """The scale of a potential's total energies."""

    MP = "mp"  # Materials Project PBE and PBE+U, without corrections
    MP2020 = "mp2020"  # the same with the MP2020 corrections of compounds
    OWN = "own"  # another functional or other pseudopotentials: comparable with itself only


@dataclass(frozen=True)
class CheckRow:
    """The energy of one crystal."""

    crystal: str
    expected: float  #: eV/atom
    found: float  #: eV/atom
    elements: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """|found - expected| in eV/atom; infinite where the potential returned no number."""
        difference = abs(self.found - self.expected)
        return difference if difference == difference else float("inf")


@dataclass(frozen=True)
class SelfCheck:
    """What the potential returned for the known crystals."""

    rows: tuple[CheckRow, ...]  #: must hold; on a scale of its own, the expected energies have fitted shifts
    total: tuple[CheckRow, ...]  #: against the nearer of the Materials Project's two scales
    reference: EnergyReference
    unchecked: tuple[str, ...] = ()  #: elements of the potential about which the crystals say nothing

    @property
    def worst(self) -> float:
        """Largest error in eV/atom; infinite if there is no crystal to check with."""
        return max((row.error for row in self.rows), default=float("inf"))

    @property
    def passed(self) -> bool:
        return len(self.rows) >= FEWEST and self.worst <= TOLERANCE

    @property
    def suspects(self) -> list[str]:
        """Elements of which no crystal is within the tolerance."""
        right = {symbol for row in self.rows if row.error <= TOLERANCE for symbol in row.elements}
        return sorted({symbol for row in self.rows for symbol in row.elements} - right)

    def __str__(self) -> str:
        if len(self.rows) < FEWEST:
            return f"it knows the elements of only {len(self.rows)} of the known crystals, {FEWEST} are needed"
        wrong = sorted((row for row in self.rows if row.error > TOLERANCE), key=lambda row: -row.error)
        shown = "; ".join(f"{r.crystal}: expected {r.expected:.3f}, found {r.found:.3f} eV/atom" for r in wrong[:4])
        more = f"; and {len(wrong) - 4} more of {len(self.rows)} crystals" if len(wrong) > 4 else ""
        suspects = f"; every crystal of {', '.join(self.suspects)} is wrong" if 0 < len(self.suspects) < 9 else ""
        return shown + more + suspects


def check(energies: Callable[[Sequence[Structure]], Sequence[float]], elements: Collection[str]) -> SelfCheck:
    """Compares `energies`, which gives eV per cell, on the known crystals of these elements (one to four atoms)."""
    elements = set(elements)
    known = [crystal for crystal in known_crystals() if elements.issuperset(crystal.symbols)]
    if not known:
        return SelfCheck((), (), EnergyReference.OWN, tuple(sorted(elements)))
    sizes = np.array([len(crystal.symbols) for crystal in known])
    found = np.array(energies([crystal.structure() for crystal in known])) / sizes
    plain = np.array([crystal.energy for crystal in known])
    scales = {
        EnergyReference.MP: plain,
        EnergyReference.MP2020: plain + [crystal.correction for crystal in known],
    }
    totals = {scale: _rows(known, expected, found) for scale, expected in scales.items()}
    # An error counts for no more than 1 eV/atom, so that one broken element does not decide about the scale.
    reference = min(totals, key=lambda scale: sum(min(row.error, 1.0) for row in totals[scale]))
    total = totals[reference]
    if np.mean([row.error <= TOLERANCE for row in total]) >= AGREEING:
        return SelfCheck(total, total, reference, _held_by_fewer_than(1, known, elements))
    shifted = _rows(known, scales[reference] + _shifts(known, found - scales[reference]), found)
    return SelfCheck(shifted, total, EnergyReference.OWN, _held_by_fewer_than(2, known, elements))


def _rows(known: Sequence[KnownCrystal], expected: np.ndarray, found: np.ndarray) -> tuple[CheckRow, ...]:
    return tuple(
        CheckRow(str(crystal), float(right), float(energy), tuple(sorted({*crystal.symbols})))
        for crystal, right, energy in zip(known, expected, found, strict=True)
    )


def _shifts(known: Sequence[KnownCrystal], differences: np.ndarray) -> np.ndarray:
    """What shifts of the elements' energies, by least squares, make of the differences: eV/atom, a crystal each."""
    symbols = sorted({symbol for crystal in known for symbol in crystal.symbols})
    fractions = np.array([[c.symbols.count(s) / len(c.symbols) for s in symbols] for c in known])
    finite = np.isfinite(differences)
    shifts, *_ = np.linalg.lstsq(fractions[finite], differences[finite], rcond=None)
    return fractions @ shifts


def _held_by_fewer_than(count: int, known: Sequence[KnownCrystal], elements: set[str]) -> tuple[str, ...]:
    held = [symbol for crystal in known for symbol in set(crystal.symbols)]
    return tuple(sorted(symbol for symbol in elements if held.count(symbol) < count))
