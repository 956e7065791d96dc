"""The convex hull of formation energies, and how far above it a crystal lies.

    E_hull(x) = min Σ_i λ_i E_i   subject to   Σ_i λ_i x_i = x,  λ ≥ 0

over the known phases i of the crystal's elements, with atomic fractions x and formation energies E in eV/atom: the
cheapest mixture of phases that holds the same atoms. The crystal itself is not among them, so the distance
E_f - E_hull is negative for one that the known phases cannot match.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.formation import ElementReferences, Uncovered
from jaxcrystal.evaluate.relax import RelaxationSettings
from jaxcrystal.evaluate.relaxations import relax_all
from jaxcrystal.evaluate.selfcheck import EnergyReference
from jaxcrystal.evaluate.workers import Workers

if TYPE_CHECKING:
    from pymatgen.core import Composition, Structure

    from jaxcrystal.evaluate.potentials import Potential

COLUMNS = ("formula", "formation_energy_per_atom")


@dataclass(frozen=True)
class Phase:
    """One known crystal of the hull."""

    fractions: Mapping[str, float]  #: atomic fraction by element symbol
    energy: float  #: formation energy in eV/atom


@dataclass(frozen=True)
class Hull:
    """Known phases by chemical system, and the element references on which their formation energies rest."""

    name: str
    sha256: str  #: of what made it
    phases: Mapping[frozenset[str], Sequence[Phase]]
    references: ElementReferences
    potential_sha256: str | None = None  #: of the potential that labelled it; None: the Materials Project
    left_out: Mapping[str, int] | None = None  #: crystals that were given but gave no phase, by reason

    @classmethod
    def from_table(cls, path: str | Path, references: ElementReferences) -> Hull:
        """From parquet or CSV with the columns `formula` and `formation_energy_per_atom` (eV/atom, MP2020 scale).

        `references` turn a candidate's total energy into a formation energy on that scale.
        Every element that a formula names is a phase of energy 0.
        Raises UserError for a file that cannot be read, a missing column, or a row without formula or energy.
        """
        path = Path(path)
        try:
            table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no table of formation energies: {' '.join(str(error).split())}") from error
        for column in COLUMNS:
            if column not in table:
                raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(table.columns)}")
        energies = pd.to_numeric(table[COLUMNS[1]], errors="coerce").to_numpy(np.float64)
        phases = []
        for row, (formula, energy) in enumerate(zip(table[COLUMNS[0]], energies, strict=True)):
            if not np.isfinite(energy):
                raise UserError(f"{path}, row {row} ({formula}): {table[COLUMNS[1]][row]!r} is no energy in eV/atom")
            phases.append(Phase(_fractions(formula, f"{path}, row {row}"), energy))
        # An element's reference is its own phase at zero, whether or not the table repeats it.
        phases += [Phase({symbol: 1.0}, 0.0) for symbol in {s for phase in phases for s in phase.fractions}]
        return cls(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), _by_system(phases), references)

    @classmethod
    def from_crystals(
        cls,
        crystals: Sequence[Structure],
        potential: Potential,
        *,
        candidates: Iterable[Structure] | None = None,
        settings: RelaxationSettings = RelaxationSettings(),  # noqa: B008
        workers: Workers | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> Hull:
        """Relaxes crystals with the potential and labels them itself: a hull that needs no calculation of others.

        Element references are the lowest of the elemental crystals among them. With `candidates`, only crystals of
        their chemical systems and of subsets of these are relaxed. Crystals that give no phase are counted in
        `left_out`; one whose steps ran out enters with the energy it reached.
        """
        if candidates is not None:
            systems = {frozenset(_symbols(candidate)) for candidate in candidates}
            crystals = [c for c in crystals if any(set(_symbols(c)) <= system for system in systems)]
        relaxed = relax_all(
            crystals, potential, settings, workers=workers, cache_dir=cache_dir, progress=progress, label="hull"
        )
        left_out: Counter[str] = Counter(r.status.value for r in relaxed if r.energy is None)
        ends = [(r.structure, r.energy) for r in relaxed if r.structure is not None and r.energy is not None]
        references = ElementReferences.from_energies(ends, potential.sha256)
        phases = []
        for structure, energy in ends:
            try:
                formation = references.formation_energy_per_atom(structure, energy, potential.reference)
            except Uncovered:
                left_out["no_element_reference"] += 1
            else:
                fractions = {s: structure.composition.get_atomic_fraction(s) for s in _symbols(structure)}
                phases.append(Phase(fractions, formation))
        digest = hashlib.sha256(repr([(sorted(p.fractions.items()), p.energy) for p in phases]).encode()).hexdigest()
        return cls(
            f"{len(phases)} crystals, {potential.name}",
            digest,
            _by_system(phases),
            references,
            potential.sha256,
            dict(left_out),
        )

    def require_same_scale(self, potential: Potential) -> None:
        """Raises UserError if energies of this potential may not be compared with this hull."""
        if self.potential_sha256 is not None and self.potential_sha256 != potential.sha256:
            raise UserError(
                f"the hull {self.name} was labelled by another potential than {potential.name}; label it with this one"
            )
        if self.potential_sha256 is None and potential.reference is EnergyReference.OWN:
            shown = ", ".join(f"{r.crystal} {r.found:.2f} (there {r.expected:.2f})" for r in potential.check.total)
            raise UserError(
                f"{potential.name} does not stand on the energy scale of the Materials Project (eV/atom: {shown}), so "
                f"it cannot be compared with the hull {self.name}; use a hull that this potential labels itself"
            )
        if self.references.potential_sha256 not in (None, potential.sha256):
            raise UserError(f"the element references are those of another potential than {potential.name}")

    def e_above_hull(self, composition: Composition, formation_energy_per_atom: float) -> float:
        """Distance in eV/atom of a crystal from the hull of the phases known; negative below it.

        Raises Uncovered if an element of the composition has no phase of its own.
        """
        from scipy.optimize import linprog

        symbols = sorted(element.symbol for element in composition)
        if missing := [s for s in symbols if frozenset([s]) not in self.phases]:
            raise Uncovered(f"the hull {self.name} holds no crystal of {', '.join(missing)}")
        competing = [
            phase
            for size in range(1, len(symbols) + 1)
            for system in itertools.combinations(symbols, size)
            for phase in self.phases.get(frozenset(system), ())
        ]
        fractions = np.array([[phase.fractions.get(symbol, 0.0) for phase in competing] for symbol in symbols])
        target = [composition.get_atomic_fraction(symbol) for symbol in symbols]
        mixture = linprog([phase.energy for phase in competing], A_eq=fractions, b_eq=target, method="highs")
        # Every pure element is among the phases, so a mixture exists; energies are finite, so a cheapest one does.
        assert mixture.success, mixture.message
        return float(formation_energy_per_atom - mixture.fun)


def _symbols(structure: Structure) -> list[str]:
    return [element.symbol for element in structure.composition.elements]


def _fractions(formula: object, where: str) -> dict[str, float]:
    from pymatgen.core import Composition

    try:
        composition = Composition(formula, strict=True)
        if not composition:
            raise ValueError("it is empty")
    except ValueError as error:
        raise UserError(f"{where}: {formula!r} is no chemical formula ({error})") from error
    return {element.symbol: composition.get_atomic_fraction(element) for element in composition}


def _by_system(phases: Iterable[Phase]) -> dict[frozenset[str], list[Phase]]:
    systems: dict[frozenset[str], list[Phase]] = defaultdict(list)
    for phase in phases:
        systems[frozenset(phase.fractions)].append(phase)
    return dict(systems)
