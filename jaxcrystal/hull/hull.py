"""The convex hull of formation energies, and how far above it a crystal lies.

    E_hull(x) = min Σ_i λ_i E_i   subject to   Σ_i λ_i x_i = x,  λ ≥ 0

over the known phases i of the crystal's elements, with atomic fractions x and formation energies E in eV/atom: the
cheapest mixture of phases that holds the same atoms. The crystal itself is not among them, so the distance
E_f - E_hull is negative for one that the known phases cannot match.

A hull stands on one scale: the Materials Project's (PBE and PBE+U with MP2020 corrections), or that of the potential
which labelled it. Its file says which, and a potential of another scale is refused.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal import __version__
from jaxcrystal.errors import UserError
from jaxcrystal.hull.formation import ElementReferences, Uncovered, corrected_energy
from jaxcrystal.hull.phases import COLUMNS, Phase, fractions_of, parsed, table_phases
from jaxcrystal.hull.scale import compared_with_known
from jaxcrystal.relaxation.batch import RelaxationSettings
from jaxcrystal.relaxation.relaxations import relax_all
from jaxcrystal.relaxation.selfcheck import EnergyReference
from jaxcrystal.workers import Workers

if TYPE_CHECKING:
    from pymatgen.core import Composition, Structure

    from jaxcrystal.relaxation.potentials import PotentialCard

#: The scale of a hull that no potential of ours labelled.
MP_SCALE = "mp2020"
_METADATA = b"jaxcrystal hull"

#: eV/atom, what the linear programme leaves of 0.
SOLVED = 1e-8

#: eV/atom below a hull, from which on a distance says more about the hull (a phase that it lacks) or the potential (a
#: crystal that it never learnt) than about the crystal: it is then neither stable nor metastable.
FAR_BELOW = 0.1


@dataclass(frozen=True)
class Hull:
    """Known phases by chemical system, and the element references on which their formation energies rest."""

    name: str
    sha256: str  #: of phases and references
    phases: Mapping[frozenset[str], Sequence[Phase]]
    references: ElementReferences
    potential_sha256: str | None = None  #: of the potential that labelled it; None: the Materials Project's scale
    left_out: Mapping[str, int] | None = None  #: crystals that were given but gave no phase, by reason
    systems: frozenset[frozenset[str]] | None = None  #: what it was built for, subsets included; None: no such limit
    sources: tuple[str, ...] = ()  #: what it was made from, with hashes
    scale: str = ""  #: in words: how its energies compare with known ones

    @classmethod
    def from_phases(
        cls,
        name: str,
        phases: Iterable[Phase],
        references: ElementReferences,
        *,
        potential_sha256: str | None = None,
        left_out: Mapping[str, int] | None = None,
        systems: Iterable[frozenset[str]] | None = None,
        sources: Sequence[str] = (),
    ) -> Hull:
        """Every element that a phase names is a phase of energy 0, once, whether or not it is among them.

        Raises UserError if no potential labelled it and its energies, or its references, are not on the Materials
        Project's scale (`scale.py`).
        """
        phases = list(phases)
        elements = sorted({symbol for phase in phases for symbol in phase.fractions})
        phases = [phase for phase in phases if len(phase.fractions) > 1 or phase.energy != 0]
        phases += [Phase(symbol, {symbol: 1.0}, 0.0) for symbol in elements]
        made_of = [sorted((p.formula, p.energy) for p in phases), sorted(references.energies.items())]
        by_system: dict[frozenset[str], list[Phase]] = defaultdict(list)
        for phase in phases:
            by_system[frozenset(phase.fractions)].append(phase)
        scale = f"labelled by the potential of sha256 {potential_sha256}"
        if potential_sha256 is None:
            references.require_mp_scale(name)
            scale = compared_with_known(by_system, name)
        return cls(
            name,
            hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
            dict(by_system),
            references,
            potential_sha256,
            left_out,
            None if systems is None else frozenset(systems),
            tuple(sources),
            scale,
        )

    @classmethod
    def from_table(cls, path: str | Path, references: ElementReferences) -> Hull:
        """From parquet or CSV with the columns `formula` and `formation_energy_per_atom` (eV/atom, MP2020 scale).

        `references` turn a candidate's total energy into a formation energy on that scale.
        Raises UserError for a file that cannot be read, a missing column, or a row without formula or energy.
        """
        path = Path(path)
        return cls.from_phases(path.name, table_phases(path), references, sources=[source(path)])

    @classmethod
    def from_entries(
        cls,
        name: str,
        entries: Iterable[Any],
        references: ElementReferences | None = None,
        *,
        systems: Iterable[frozenset[str]] | None = None,
        sources: Sequence[str] = (),
    ) -> Hull:
        """From pymatgen's entries: `ComputedEntry` as the Materials Project has it, or `PDEntry` of a phase diagram.

        Total energies, corrected or not (`formation.corrected_energy`), or formation energies, which need
        `references`: those of total energies are the lowest of each element's own entries. Of each composition the
        lowest is kept; every other entry is counted in `left_out`.
        Raises UserError if no entry can be used, or its references are not on the Materials Project's scale.
        """
        left_out: Counter[str] = Counter()
        lowest: dict[str, tuple[float, Composition]] = {}
        for entry in entries:
            composition = entry.composition.element_composition
            try:
                energy = corrected_energy(entry) / composition.num_atoms
            except UserError as error:
                left_out[str(error)] += 1
                continue
            formula = composition.reduced_formula
            if formula in lowest:
                left_out["not the lowest of its composition"] += 1
            if formula not in lowest or energy < lowest[formula][0]:
                lowest[formula] = energy, composition
        totals = {c.elements[0].symbol: energy for energy, c in lowest.values() if len(c) == 1}
        if not totals:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in left_out.items()) or "there are none"
            raise UserError(f"{name} holds no elemental entries on the Materials Project's scale ({reasons})")
        if all(abs(energy) < 1e-9 for energy in totals.values()):
            if references is None:
                raise UserError(f"{name} holds formation energies, which need element references: add --references")
        elif references is not None:
            raise UserError(f"{name} holds total energies, with the elements' own: leave --references out")
        else:
            references = ElementReferences(totals)
        phases = []
        for formula, (energy, composition) in lowest.items():
            fractions = fractions_of(composition)
            if fractions.keys() <= totals.keys():
                energy -= sum(x * totals[symbol] for symbol, x in fractions.items())
                phases.append(Phase(formula, fractions, energy))
            else:
                left_out["no element reference"] += 1
        return cls.from_phases(name, phases, references, left_out=left_out, systems=systems, sources=sources)

    @classmethod
    def from_crystals(
        cls,
        crystals: Sequence[Structure],
        potential: PotentialCard,
        *,
        candidates: Iterable[Structure] | None = None,
        settings: RelaxationSettings = RelaxationSettings(),  # noqa: B008
        workers: Workers | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> Hull:
        """Relaxes crystals with the potential and labels them itself: a hull that needs no calculation of others.

        Settings of no steps label the crystals as they are. Element references are the lowest of the elemental
        crystals among them. With `candidates`, only crystals of their chemical systems and of subsets of these are
        relaxed. Crystals that give no phase are counted in `left_out`, those of other systems as `other_system`; one
        whose steps ran out enters with the energy it reached. What is in `cache_dir` from an earlier run is not done
        again.
        """
        systems = None
        left_out: Counter[str] = Counter()
        if candidates is not None:
            systems = {frozenset(fractions_of(candidate.composition)) for candidate in candidates}
            inside = {frozenset(part) for system in systems for part in _subsystems(system)}
            known = list(crystals)
            crystals = [c for c in known if frozenset(fractions_of(c.composition)) in inside]
            left_out["other_system"] = len(known) - len(crystals)
        relaxed = relax_all(
            crystals, potential, settings, workers=workers, cache_dir=cache_dir, progress=progress, label="hull"
        )
        left_out.update(r.status.value for r in relaxed if r.energy is None)
        ends = [(r.structure, r.energy) for r in relaxed if r.structure is not None and r.energy is not None]
        references = ElementReferences.from_energies(ends, potential.sha256)
        phases = []
        for structure, energy in ends:
            try:
                formation = references.formation_energy_per_atom(structure, energy, potential.reference)
            except Uncovered:
                left_out["no_element_reference"] += 1
            else:
                composition = structure.composition
                phases.append(Phase(composition.reduced_formula, fractions_of(composition), formation))
        name = f"{len(phases)} crystals, {potential.name}"
        return cls.from_phases(
            name, phases, references, potential_sha256=potential.sha256, left_out=+left_out, systems=systems
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Hull:
        """What `write` wrote. Raises UserError for another file, or a scale that is not known here."""
        path = Path(path)
        try:
            table = pq.read_table(path)
            metadata = json.loads(table.schema.metadata[_METADATA])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no hull that `jaxcrystal hull build` wrote ({reason})") from error
        if metadata["scale"] != MP_SCALE and metadata["scale"] != metadata["potential_sha256"]:
            raise UserError(
                f"{path} stands on the scale {metadata['scale']!r}; known are {MP_SCALE!r} (PBE and PBE+U with MP2020 "
                "corrections) and the scale of a potential that labelled it"
            )
        columns = (table[name].to_pylist() for name in COLUMNS)
        phases = [Phase(f, parsed(f, str(path)), energy) for f, energy in zip(*columns, strict=True)]
        systems = metadata["systems"] and [frozenset(system) for system in metadata["systems"]]
        try:
            hull = cls.from_phases(
                metadata["name"],
                phases,
                ElementReferences(metadata["references"], metadata["references_potential_sha256"]),
                potential_sha256=metadata["potential_sha256"],
                left_out=metadata["left_out"],
                systems=systems,
                sources=metadata["sources"],
            )
        except UserError as error:  # it was built before energies were compared with known ones
            raise UserError(f"{path} is not to be used: {error}") from None
        if hull.sha256 != metadata["sha256"]:
            raise UserError(f"{path} was changed after it was built: build it again")
        return hull

    def write(self, path: str | Path) -> None:
        """One parquet: a row a phase; references, scale, sources, date, and what was left out as JSON in its metadata.

        Raises UserError if it cannot be written.
        """
        phases = [phase for system in self.phases.values() for phase in system]
        phases.sort(key=lambda phase: phase.formula)  # neighbours that share a beginning take half the room
        columns = [
            pa.array([p.formula for p in phases], pa.string()),
            pa.array([p.energy for p in phases], pa.float64()),
        ]
        table = pa.table(columns, names=list(COLUMNS))
        metadata = {
            "name": self.name,
            "sha256": self.sha256,
            "scale": self.potential_sha256 or MP_SCALE,
            "potential_sha256": self.potential_sha256,
            "references": dict(self.references.energies),
            "references_potential_sha256": self.references.potential_sha256,
            "compared with known energies": self.scale,
            "systems": self.systems and sorted(sorted(system) for system in self.systems),
            "sources": self.sources,
            "left_out": self.left_out,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "jaxcrystal": __version__,
        }
        try:
            pq.write_table(
                table.replace_schema_metadata({_METADATA: json.dumps(metadata).encode()}),
                path,
                compression="zstd",
                compression_level=19,
                use_dictionary=False,
                column_encoding=dict(zip(COLUMNS, ("DELTA_BYTE_ARRAY", "PLAIN"), strict=True)),
            )
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def require_same_scale(self, potential: PotentialCard) -> None:
        """Raises UserError if energies of this potential may not be compared with this hull."""
        if self.potential_sha256 is not None and self.potential_sha256 != potential.sha256:
            raise UserError(
                f"the hull {self.name} was labelled by another potential than {potential.name}; label it with this one"
            )
        if self.potential_sha256 is None and potential.reference is EnergyReference.OWN:
            farthest = sorted(potential.check.total, key=lambda row: -row.error)[:3]
            shown = ", ".join(f"{row.crystal} {row.found:.2f} (there {row.expected:.2f})" for row in farthest)
            raise UserError(
                f"{potential.name} does not stand on the energy scale of the Materials Project (eV/atom: {shown}), so "
                f"it cannot be compared with the hull {self.name}; use a hull that this potential labels itself"
            )
        if self.references.potential_sha256 not in (None, potential.sha256):
            raise UserError(f"the element references are those of another potential than {potential.name}")

    def e_above_hull(self, composition: Composition, formation_energy_per_atom: float) -> float:
        """Distance in eV/atom of a crystal from the hull of the phases known; negative below it.

        Raises Uncovered if an element of the composition has no phase of its own, or the hull was built for other
        chemical systems.
        """
        from scipy.optimize import linprog

        symbols = sorted(fractions_of(composition))
        competing = self._covering(symbols)
        fractions = np.array([[phase.fractions.get(symbol, 0.0) for phase in competing] for symbol in symbols])
        target = [composition.get_atomic_fraction(symbol) for symbol in symbols]
        mixture = linprog([phase.energy for phase in competing], A_eq=fractions, b_eq=target, method="highs")
        # Every pure element is among the phases, so a mixture exists; energies are finite, so a cheapest one does.
        assert mixture.success, mixture.message
        distance = float(formation_energy_per_atom - mixture.fun)
        return 0.0 if abs(distance) < SOLVED else distance  # a phase of the hull is on it

    def competitors(self, composition: Composition) -> tuple[int, int]:
        """How many compounds compete with a crystal: of its elements or some of them; and of exactly its elements.

        A compound is a formula of two or more elements, whatever number of its crystals is known. An element's own
        phase counts as the one of exactly its elements. Raises Uncovered as `e_above_hull` does.
        """
        symbols = sorted(fractions_of(composition))
        competing = self._covering(symbols)
        compounds = {_key(phase) for phase in competing if len(phase.fractions) > 1}
        return len(compounds), len({_key(phase) for phase in competing if len(phase.fractions) == len(symbols)})

    def _covering(self, symbols: Sequence[str]) -> list[Phase]:
        """All phases of these elements or some of them."""
        if missing := [s for s in symbols if frozenset([s]) not in self.phases]:
            raise Uncovered(f"the hull {self.name} holds no crystal of {', '.join(missing)}")
        if self.systems is not None and not any(system.issuperset(symbols) for system in self.systems):
            raise Uncovered(f"the hull {self.name} was not built for the chemical system {'-'.join(symbols)}")
        return [phase for system in _subsystems(symbols) for phase in self.phases.get(frozenset(system), ())]


def is_hull_file(path: str | Path) -> bool:
    """Whether `Hull.write` made it."""
    try:
        return _METADATA in (pq.read_schema(path).metadata or {})
    except (OSError, ValueError):
        return False


def source(path: Path) -> str:
    """A file by its name and hash."""
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _subsystems(symbols: Iterable[str]) -> Iterable[tuple[str, ...]]:
    symbols = sorted(symbols)
    return itertools.chain.from_iterable(itertools.combinations(symbols, n) for n in range(1, len(symbols) + 1))


def _key(phase: Phase) -> tuple[tuple[str, float], ...]:
    """The same for every crystal of a composition."""
    return tuple(sorted((symbol, round(fraction, 6)) for symbol, fraction in phase.fractions.items()))
