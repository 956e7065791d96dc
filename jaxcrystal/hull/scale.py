"""Are energies on the Materials Project's scale? Those of a hull and of element references against known ones.

A table in kJ/mol, per formula unit or without the MP2020 corrections holds plausible numbers, and so do element
references of another functional; each moves every distance to the hull. Here a hull's energies are compared with those
of some 650 well-known compounds, as far as it holds them, and references with the energies of 89 elements.

`known_compounds.csv` has formation energies with the MP2020 corrections, and the corrections themselves;
`known_elements.csv` the elements' total energies: all in eV/atom, by the Materials Project (PBE and PBE+U; from MP-20
and the element references of 2023-02-07; CC-BY-4.0).
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from jaxcrystal.hull.phases import Phase

#: eV/atom, largest error of an element's energy. Releases of the Materials Project differ by less.
ELEMENT_TOLERANCE = 0.15

#: eV/atom, largest median error of known compounds. Hulls of MP-20's validation or test set alone, where ground states
#: are missing, have a median below 0.001 and no compound above 0.1; the corrections of most compounds are larger.
COMPOUND_TOLERANCE = 0.1

#: Units by what makes eV of them.
UNITS = {"eV": 1.0, "kJ/mol": 96.485, "kcal/mol": 23.061, "Hartree": 1 / 27.2114, "Rydberg": 1 / 13.6057, "meV": 1e3}


@dataclass(frozen=True)
class KnownCompound:
    """A row of the table of compounds."""

    formula: str
    counts: Mapping[str, int]  #: atoms of each element in a formula unit
    energy: float  #: formation energy in eV/atom, with the correction
    correction: float  #: eV/atom

    @property
    def atoms(self) -> int:
        """Of a formula unit."""
        return sum(self.counts.values())


@cache
def known_elements() -> Mapping[str, float]:
    """Energies in eV/atom of the elements' most stable crystals."""
    return {row["element"]: float(row["energy"]) for row in _rows("known_elements.csv")}


@cache
def known_compounds() -> tuple[KnownCompound, ...]:
    """Compounds of known formation energy."""
    return tuple(
        KnownCompound(
            row["formula"],
            {symbol: int(n or 1) for symbol, n in re.findall(r"([A-Z][a-z]?)(\d*)", row["formula"])},
            float(row["formation_energy_per_atom"]),
            float(row["correction"]),
        )
        for row in _rows("known_compounds.csv")
    )


def _rows(name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def require_known_elements(energies: Mapping[str, float], name: str) -> None:
    """Raises UserError if an element's energy (eV/atom) is not the Materials Project's; of others nothing is known."""
    known = known_elements()
    off = [symbol for symbol in sorted(known.keys() & energies.keys()) if not _near(energies[symbol], known[symbol])]
    if off:
        shown = ", ".join(f"{s} has {energies[s]:.3f} eV/atom, there {known[s]:.3f}" for s in off[:4])
        more = f", and {len(off) - 4} more" if len(off) > 4 else ""
        raise UserError(
            f"{name} is of another functional or scale than the Materials Project's PBE: {shown}{more}; element "
            "references are the total energies of its most stable elemental crystals, uncorrected, in eV"
        )


def _near(energy: float, known: float) -> bool:
    return abs(energy - known) <= ELEMENT_TOLERANCE


def compared_with_known(phases: Mapping[frozenset[str], Sequence[Phase]], name: str) -> str:
    """Compares the lowest phase of each known compound; in words for a reader, how many and how well they agree.

    Compounds that the corrections shift and those that they do not are compared apart, so that either shows.
    Raises UserError if the median error of either is more than `COMPOUND_TOLERANCE`.
    """
    found = [(compound, energy) for compound in known_compounds() if (energy := _lowest(phases, compound)) is not None]
    if not found:
        return f"not checked: it holds none of {len(known_compounds())} compounds of known formation energy"
    for group in (
        [(c, energy) for c, energy in found if abs(c.correction) >= COMPOUND_TOLERANCE],
        [(c, energy) for c, energy in found if abs(c.correction) < COMPOUND_TOLERANCE],
    ):
        error = np.median([energy - compound.energy for compound, energy in group]) if group else 0.0
        if abs(error) > COMPOUND_TOLERANCE:
            shown = ", ".join(f"{c.formula} {energy:.3f} (known {c.energy:.3f})" for c, energy in group[:3])
            raise UserError(
                f"{name}: formation energies of {len(group)} known compounds are off by {error:+.3f} eV/atom in the "
                f"median, {shown}; {_likely(group)}"
            )
    errors = {compound.formula: abs(energy - compound.energy) for compound, energy in found}
    worst = max(errors, key=lambda formula: errors[formula])
    return (
        f"checked: {len(found)} compounds of known formation energy, error {np.median([*errors.values()]):.3f} eV/atom "
        f"in the median, at most {errors[worst]:.3f} ({worst})"
    )


def _lowest(phases: Mapping[frozenset[str], Sequence[Phase]], compound: KnownCompound) -> float | None:
    fractions = {symbol: n / compound.atoms for symbol, n in compound.counts.items()}
    return min(
        (
            phase.energy
            for phase in phases.get(frozenset(fractions), ())
            if all(abs(phase.fractions[symbol] - x) < 1e-6 for symbol, x in fractions.items())
        ),
        default=None,
    )


def _likely(group: Sequence[tuple[KnownCompound, float]]) -> str:
    """Which mistake gives such energies, and what to do."""
    found = np.array([energy for _, energy in group])
    misfits = {}
    for words, mistaken in _mistakes().items():
        expected = np.array([mistaken(compound) for compound, _ in group])
        misfits[words] = np.median(np.abs(found - expected)) / np.median(np.abs(expected))
    words = min(misfits, key=lambda words: misfits[words])
    if misfits[words] > 0.1:
        return "they must be in eV/atom, by PBE and PBE+U with the MP2020 corrections, of the most stable crystals"
    return words


def _mistakes() -> dict[str, Callable[[KnownCompound], float]]:
    """What a wrong table holds for a known compound, by what is said of it."""
    mistakes: dict[str, Callable[[KnownCompound], float]] = {
        "they are as without the MP2020 corrections: add these, by pymatgen's MaterialsProject2020Compatibility": (
            lambda c: c.energy - c.correction
        ),
        "they are as total energies: subtract those of the elements": _total,
        "they are as total energies without the MP2020 corrections: add these, and subtract the elements' energies": (
            lambda c: _total(c) - c.correction
        ),
    }
    for (unit, factor), per_atom, sign in itertools.product(UNITS.items(), (True, False), (1, -1)):
        if (unit, per_atom, sign) == ("eV", True, 1):
            continue
        is_of = f"{unit} {'an atom' if per_atom else 'a formula unit'}{'' if sign == 1 else ', with the sign changed'}"
        mistakes[f"they are as in {is_of}: make them formation energies in eV/atom, negative for a stable compound"] = (
            lambda c, factor=factor * sign, per_atom=per_atom: c.energy * factor * (1 if per_atom else c.atoms)
        )
    return mistakes


def _total(compound: KnownCompound) -> float:
    known = known_elements()
    return compound.energy + sum(n * known[symbol] for symbol, n in compound.counts.items()) / compound.atoms
