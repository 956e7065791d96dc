"""The table of attempts, `structures.parquet`: one row for every sample, whatever became of it.

Of a ledger in which something was asked it has `asked` and `forced` too (`conditions.py`); of any ledger, or with
scores, `log_probability` and `log_probability_per_token` (`likelihoods.py`). Later steps of the evaluation add columns:
`group`, `unique`; with a training set `novel`, `known_as`; with the truth `truth_displacement`, `no_match_because`,
`truth_valid`, and `shots.columns`; with a potential `relaxation` (its outcome), what `stability.py` finds, and of the
relaxed crystals `group_relaxed`, `unique_relaxed`, `novel_relaxed`, `known_as_relaxed`, `spacegroup_relaxed`; with a
reference, or fingerprints of the training set, distances to the nearest of it and which one is most like the crystal,
`reference_nearest`, `train_nearest` (`coverage.py`). `reference.parquet`, one row a reference crystal, has the same of
the generated ones. Every published number is a sum over these rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.crystals.crystal import Crystal, reduced_composition
from jaxcrystal.crystals.symmetry import SYMPREC, space_group
from jaxcrystal.evaluation.lemat import judged
from jaxcrystal.evaluation.protocols import Protocol
from jaxcrystal.evaluation.validity import Verdict, compositional, structural
from jaxcrystal.reader.inputs import Input
from jaxcrystal.reader.rows import Row
from jaxcrystal.reader.sources import WISHES
from jaxcrystal.workers import Lost, Workers, each

if TYPE_CHECKING:
    from pymatgen.core import Structure

_METADATA = b"jaxcrystal"


@dataclass(frozen=True)
class Attempt:
    """A row: what can be said of a sample alone. None where there is no crystal."""

    id: str
    row: int  #: in the source, from 0
    outcome: str  #: of reading; `ok` if there is a crystal
    reason: str  #: why not
    structural_valid: bool = False
    compositional_valid: bool = False
    invalid_because: str = ""
    formula: str | None = None  #: reduced
    chemical_system: str | None = None  #: element symbols, sorted, joined by `-`
    num_elements: int | None = None  #: distinct ones
    num_atoms: int | None = None  #: in the cell as sampled
    spacegroup: int | None = None  #: None also where none is found
    a: float | None = None  #: lengths in Å
    b: float | None = None
    c: float | None = None
    alpha: float | None = None  #: angles in degrees
    beta: float | None = None
    gamma: float | None = None
    volume: float | None = None  #: of the cell, Å³
    density: float | None = None  #: g/cm³
    notes: str = ""  #: what reading changed or did not use, joined by `; `
    cif: str = ""  #: as the source had it; written anew where the source holds other than CIF


@dataclass(frozen=True)
class LematAttempt(Attempt):
    """A row by LeMat-GenBench's rules: structurally valid is what keeps its distances and is plausible."""

    distances_valid: bool = False
    plausible: bool = False
    spacegroup_lemat: int | None = None  #: within 0.01 Å
    packing: float | None = None  #: share of the cell within covalent radii
    hhi_production: float | None = None  #: Herfindahl-Hirschman index, 0 to 10
    hhi_reserve: float | None = None


@dataclass(frozen=True)
class Provenance:
    """What a table of attempts depends on, beside the samples themselves."""

    protocol: str
    versions: Mapping[str, str]  #: of programs, and hashes of files
    potential: str | None = None
    hull: str | None = None
    cutoffs: str | None = None  #: the data set whose cut-offs coverage took
    inputs: Mapping[str, Input] = field(default_factory=dict)  #: what was read of each file, by what it is: `train`, …


def describe(
    samples: Sequence[Row],
    protocol: Protocol,
    *,
    symmetry: bool = True,
    symprec: float = SYMPREC,
    workers: Workers | None = None,
) -> pd.DataFrame:
    """The columns of `Attempt`, or `LematAttempt`, and of what was asked, where something was; without `symmetry` space
    groups (within `symprec` Å), the slowest part of it, stay unknown."""
    one = partial(_describe, protocol=protocol, symprec=symprec if symmetry else None)
    rows = each(one, samples, workers, label="validity", lost=partial(_lost, protocol=protocol))
    table = pd.DataFrame([asdict(row) for row in rows])
    wishes = {name: [str(sample.labels.get(name, "")) for sample in samples] for name in WISHES}
    if any(text not in ("", "{}") for text in wishes["asked"]):
        table = table.assign(**wishes)
    whole = dict.fromkeys(("num_elements", "num_atoms", "spacegroup"), "Int64")  # integers that may be missing
    measures = dict.fromkeys(("a", "b", "c", "alpha", "beta", "gamma", "volume", "density"), "float64")
    if protocol.rules == "lemat":
        whole["spacegroup_lemat"] = "Int64"
        measures |= dict.fromkeys(("packing", "hhi_production", "hhi_reserve"), "float64")
    return table.astype(whole | measures)


def _kind(protocol: Protocol) -> type[Attempt]:
    return LematAttempt if protocol.rules == "lemat" else Attempt


def _lost(sample: Row, why: Lost, protocol: Protocol) -> Attempt:
    return _kind(protocol)(sample.id, sample.row, why.value, why.reason, cif=sample.cif)


def _describe(sample: Row, protocol: Protocol, symprec: float | None) -> Attempt:
    notes = "; ".join(sample.notes)
    if sample.crystal is None:
        return _kind(protocol)(sample.id, sample.row, sample.outcome, sample.reason, notes=notes, cif=sample.cif)
    structure = sample.crystal.to_structure()
    shape, charges, beside = _verdicts(sample.crystal, structure, protocol)
    return _kind(protocol)(
        id=sample.id,
        row=sample.row,
        outcome=sample.outcome,
        reason=sample.reason,
        structural_valid=shape.valid,
        compositional_valid=charges.valid,
        invalid_because="; ".join(filter(None, (shape.reason, charges.reason))),
        formula=structure.composition.reduced_formula,
        chemical_system=structure.composition.chemical_system,
        num_elements=len(set(sample.crystal.symbols)),
        num_atoms=len(structure),
        spacegroup=space_group(sample.crystal, symprec) if symprec is not None and shape.valid else None,
        **dict(zip("abc", map(float, sample.crystal.lengths), strict=True)),
        **dict(zip(("alpha", "beta", "gamma"), map(float, sample.crystal.angles), strict=True)),
        volume=float(structure.volume),
        density=float(structure.density),
        notes=notes,
        cif=sample.cif or sample.crystal.to_cif(),
        **beside,
    )


def _verdicts(crystal: Crystal, structure: Structure, protocol: Protocol) -> tuple[Verdict, Verdict, dict[str, Any]]:
    """Of structure and composition, by the protocol's rules, and the columns that only these have."""
    if protocol.rules == "cdvae":
        return structural(structure, protocol), compositional(reduced_composition(crystal.symbols), protocol), {}
    found = judged(crystal, structure, protocol.oxidation_states)
    both = found.distances, found.plausibility
    shape = Verdict(all(one.valid for one in both), "; ".join(filter(None, (one.reason for one in both))))
    beside = {name: getattr(found, name) for name in ("packing", "hhi_production", "hhi_reserve")}
    beside |= {"distances_valid": found.distances.valid, "plausible": found.plausibility.valid}
    return shape, found.charges, beside | {"spacegroup_lemat": found.spacegroup}


def write_table(table: pd.DataFrame, provenance: Provenance, path: Path) -> None:
    """Writes `structures.parquet`: the table, and its provenance as JSON in the file's metadata."""
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {**(arrow.schema.metadata or {}), _METADATA: json.dumps(asdict(provenance)).encode()}
    with path.open("wb") as file:  # pyarrow takes no path that is not UTF-8
        pq.write_table(arrow.replace_schema_metadata(metadata), file)


def read_table(path: str | Path) -> tuple[pd.DataFrame, Provenance]:
    """What `write_table` wrote."""
    with Path(path).open("rb") as file:
        arrow = pq.read_table(file)
    stored = json.loads(arrow.schema.metadata[_METADATA])
    inputs = {role: Input(**counted) for role, counted in stored.pop("inputs", {}).items()}
    return arrow.to_pandas(), Provenance(**stored, inputs=inputs)
