"""The way of a set of crystals through the evaluator: read, judge, compare, relax, place against the hull, write.

Three files are written: `structures.parquet`, one row an attempt; `metrics.json`, sums over that table; `report.html`,
for the eye; with a reference also `reference.parquet`, one row a reference crystal. Relaxations and fingerprints are
kept in `relaxations/` and `fingerprints/`, so that a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.coverage import only_valid, valid_rows, with_diversity, with_nearest
from jaxcrystal.evaluation.likeness.fingerprints import Fingerprints, store, stored_fingerprints
from jaxcrystal.evaluation.likeness.uniqueness import group_ids, matches
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.prediction import displacements
from jaxcrystal.evaluation.protocols import Protocol, coverage_cutoffs, protocol_named
from jaxcrystal.evaluation.table import Provenance, describe, write_table
from jaxcrystal.reader.samples import SampleSet, read
from jaxcrystal.report import report
from jaxcrystal.workers import Workers

#: What is in the names of those numbers of metrics.json that are no rates.
_NO_RATES = ("diversity.", "_wasserstein", ".ams", ".amc", ".median", ".p10", ".p90", ".rmse")


def evaluate(
    samples_path: str | Path,
    out_dir: str | Path,
    *,
    train: str | Path | None = None,
    truth: str | Path | None = None,
    reference: str | Path | None = None,
    protocol: str = "cdvae",
    cutoffs: str = "mp_20",
    potential: str | None = None,
    hull: Sequence[str | Path] = (),
    references: str | Path | None = None,
    hull_labels: str = "relaxed",
    fmax: float = 0.1,
    max_steps: int = 500,
    workers: Workers | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluates the first `limit` crystals of `samples_path` into `out_dir`; returns what `metrics.json` holds.

    - `train`: crystals that count as known; adds novelty, and of each attempt the training crystal most like it.
    - `truth`: the true crystals, of which the samples are predictions, in their order; adds match rate and RMSE.
    - `reference`: crystals to compare with; adds coverage, within the `cutoffs` of a data set, and distributions.
    - `potential`: name or directory; adds relaxation until no force exceeds `fmax` eV/Å, or for `max_steps` steps.
    - `hull`: competing phases; adds the distance to their hull. One file that `jaxcrystal hull build` wrote; or, with
      `references` (elemental reference entries), one table of formation energies on their scale; or sets of crystals,
      which the potential itself labels, `relaxed` or by a `single-point` (`hull_labels`).
    - `workers`: where the work on single crystals is done (`workers.local`, `workers.dask`); None: in this process,
      which then dies of whatever crystal kills it.

    Raises UserError if an input cannot be read, the output cannot be written, or options do not go together.
    """
    convention = protocol_named(protocol)
    coverage_cutoffs(cutoffs)
    if hull and potential is None:
        raise UserError(
            f"the hull {hull[0]} needs a potential: what is placed against it is a relaxed crystal's energy"
        )
    if references is not None and not hull:
        raise UserError(f"the element references {references} need a hull: they place energies on its scale")
    out = _writable(Path(out_dir))
    judge = phases = None
    if potential is not None:
        from jaxcrystal.relaxation.relaxations import potential_card

        judge = potential_card(potential, workers)
    if hull:
        from jaxcrystal.hull.sources import known_hull

        phases = known_hull(hull, references, hull_labels)
        if phases is not None:
            phases.require_same_scale(judge)
    elif hull_labels != "relaxed":
        raise UserError("hull labels need a hull: they say how the potential labels its crystals")

    samples = read(samples_path, workers=workers, limit=limit)
    versions = _programs() | {"samples": _fingerprint(samples)}
    table = describe(samples.samples, convention, workers=workers)
    if truth is not None:
        true = read(truth, workers=workers, limit=limit)
        versions["truth"] = _fingerprint(true)
        table = _with_truth(table, samples, true, convention, workers)
    sound = [s.crystal if ok else None for s, ok in zip(samples.samples, table["structural_valid"], strict=True)]
    table["group"] = pd.array(group_ids(sound), dtype="Int64")
    table["unique"] = (table["group"].notna() & ~table["group"].duplicated()).astype(bool)
    if train is not None:
        known = read(train, workers=workers)
        versions["train"] = _fingerprint(known)
        table = _with_novelty(table, sound, known)
    if judge is not None:
        from jaxcrystal.evaluation.stability import assess
        from jaxcrystal.hull.sources import label_settings, labelled

        if hull and phases is None:
            phases = labelled(
                hull,
                judge,
                [crystal.to_structure() for crystal in sound if crystal is not None],
                label_settings(hull_labels, fmax, max_steps),
                workers=workers,
                cache_dir=out / "relaxations",
            )
        rows = assess(
            [crystal.to_structure() for crystal in sound if crystal is not None],
            judge,
            phases,
            fmax=fmax,
            max_steps=max_steps,
            workers=workers,
            cache_dir=out / "relaxations",
        )
        table = _with_stability(table, rows, placed=phases is not None)
        versions["potential"] = f"{judge.name} sha256:{judge.sha256}"
        versions["relaxation"] = f"until forces are below {fmax:g} eV/Å, at most {max_steps} steps"
    if phases is not None:
        versions["hull"] = f"{phases.name} sha256:{phases.sha256}"
        if phases.left_out:
            versions["hull left out"] = ", ".join(f"{n} {reason}" for reason, n in sorted(phases.left_out.items()))
    compared = None
    if train is not None or reference is not None:
        own = stored_fingerprints([sample.crystal for sample in samples.samples], out / "fingerprints", workers=workers)
        own = only_valid(own, table) if convention.fingerprints_of_valid else own
        table = with_diversity(table, own, convention)
    if train is not None:
        theirs = _known_fingerprints(known, convention, workers)
        table = with_nearest(table, own, theirs, [sample.id for sample in known.samples], "train")
    if reference is not None:
        others = read(reference, workers=workers)
        versions["reference"] = _fingerprint(others)
        compared = describe(others.samples, convention, symmetry=False, workers=workers)
        theirs = _known_fingerprints(others, convention, workers, compared)
        table = with_nearest(table, own, theirs, compared["id"], "reference")
        compared = with_nearest(compared, theirs, own, table["id"], "generated")

    provenance = Provenance(convention.name, versions, judge and judge.name, phases and phases.name, cutoffs)
    metrics = metrics_from_table(table, provenance, compared)
    write_table(table, provenance, out / "structures.parquet")
    if compared is not None:
        write_table(compared, provenance, out / "reference.parquet")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    training = None if train is None else report.training_crystals(table, known)
    report.write(out / "report.html", table, metrics, reference=compared, training=training, title=samples.path.name)
    print(summary(metrics))
    print(f"written to {out}: structures.parquet, metrics.json, report.html")
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The rates with their 95 % intervals, and what failed, as lines for a terminal."""
    counts = metrics["counts"]
    lines = [f"{counts['attempts']} attempts, protocol {metrics['protocol']}"]
    width = max(map(len, metrics["confidence_95"]))
    for name, (low, high) in metrics["confidence_95"].items():
        value: Any = metrics
        for part in name.split("."):
            value = value[part]
        form = ".3f" if any(word in name for word in _NO_RATES) else ".1%"
        lines.append(f"  {name:<{width}} {value:>8{form}}   95 %: {low:{form}} to {high:{form}}")
    failed = {name: n for name, n in counts["outcomes"].items() if name != "ok"}
    failed |= {f"relaxation: {name}": n for name, n in counts.get("relaxations", {}).items() if name != "converged"}
    lines += [f"  {n:>6} {name}" for name, n in failed.items()]
    return "\n".join(lines)


def _with_novelty(table: pd.DataFrame, crystals: Sequence[Crystal | None], known: SampleSet) -> pd.DataFrame:
    """Adds `novel`, which only a sound crystal can be, and `known_as`, the training crystal that a sample matches."""
    found = matches(crystals, [sample.crystal for sample in known.samples])
    return table.assign(
        novel=[crystal is not None and i is None for crystal, i in zip(crystals, found, strict=True)],
        known_as=[None if i is None else known.samples[i].id for i in found],
    )


def _with_truth(
    table: pd.DataFrame, samples: SampleSet, true: SampleSet, protocol: Protocol, workers: Workers | None
) -> pd.DataFrame:
    """Adds `truth_displacement` or why there is none, and `truth_valid`.

    Raises UserError unless there is one true crystal for each sample.
    """
    if len(true.samples) != len(samples.samples):
        counts = f"{len(true.samples)} crystals for {len(samples.samples)} predictions"
        raise UserError(f"{true.path} holds {counts}; it must hold the true one of each, in the same order")
    broken = next((sample for sample in true.samples if sample.crystal is None), None)
    if broken is not None:
        raise UserError(f"{true.path}, row {broken.row}: a true crystal cannot be read: {broken.reason}")
    truths = describe(true.samples, protocol, symmetry=False, workers=workers)
    pairs = ([sample.crystal for sample in side.samples] for side in (samples, true))
    found, reasons = displacements(*pairs, workers=workers)
    return table.assign(truth_displacement=found, no_match_because=reasons, truth_valid=valid_rows(truths))


def _known_fingerprints(
    known: SampleSet, protocol: Protocol, workers: Workers | None, table: pd.DataFrame | None = None
) -> Fingerprints:
    """Fingerprints of crystals to compare with, stored for the next time; `table` is what `describe` says of them."""
    found = stored_fingerprints([sample.crystal for sample in known.samples], store(), workers=workers)
    if not protocol.fingerprints_of_valid:
        return found
    return only_valid(
        found, describe(known.samples, protocol, symmetry=False, workers=workers) if table is None else table
    )


def _with_stability(table: pd.DataFrame, rows: Sequence[Any], *, placed: bool) -> pd.DataFrame:
    """Adds the columns of `StabilityRow`; `rows` are those of the structurally valid attempts, in their order.

    Without a hull (`placed` false) nothing was asked of it, and its columns are absent.
    """
    found = pd.DataFrame([asdict(row) for row in rows], index=table.index[table["structural_valid"]])
    names = {"outcome": "relaxation", "reason": "relaxation_reason", "cif": "relaxed_cif", "fmax": "largest_force"}
    found = found.rename(columns=names).reindex(table.index)
    # Why an attempt was not relaxed: there is no crystal, or its atoms overlap.
    unsent = pd.Series("no_crystal", table.index).where(table["outcome"] != "ok", "invalid")
    found["relaxation"] = found["relaxation"].map(str, na_action="ignore").fillna(unsent)
    found["relaxation_reason"] = found["relaxation_reason"].fillna("")
    found["converged"] = found["converged"].eq(True)
    of_hull = ["formation_energy_per_atom", "e_above_hull"]
    measures = ["energy_per_atom", *of_hull, "largest_force", "rmsd", "volume_change"]
    found = found.astype(dict.fromkeys(measures, "float64") | {"steps": "Int64"})
    return table.join(found if placed else found.drop(columns=of_hull))


def _programs() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jaxcrystal", "pymatgen", "smact", "spglib")}
    return packages | {"python": platform.python_version()}


def _fingerprint(samples: SampleSet) -> str:
    return f"{samples.path.name} sha256:{samples.sha256}"


def _writable(out: Path) -> Path:
    """`out`, made if need be. Before hours of work, not after them, is when to learn that it cannot be written."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the output folder {out}: {error.strerror}") from None
    return out
