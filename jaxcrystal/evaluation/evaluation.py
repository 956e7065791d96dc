"""The way of a set of crystals through the evaluator: read, judge, compare, relax, place against the hull, write.

What is written is `results.py`'s: `structures.parquet`, one row an attempt; `metrics.json`, sums over that table; and
what the crystals were compared with. The page is made of these files (`jaxcrystal.report`). Relaxations and
fingerprints are kept in `relaxations/` and `fingerprints/`, so that a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetry import SYMPREC, space_group
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import conditions, likelihoods, results, shots
from jaxcrystal.evaluation.coverage import only_valid, valid_rows, with_diversity, with_nearest
from jaxcrystal.evaluation.likeness.fingerprints import Fingerprints, store, stored_fingerprints
from jaxcrystal.evaluation.likeness.uniqueness import group_ids, matches
from jaxcrystal.evaluation.metrics import FEW, metrics_from_table
from jaxcrystal.evaluation.own_judges import Judge, judged
from jaxcrystal.evaluation.prediction import displacements, paired
from jaxcrystal.evaluation.protocols import Protocol, coverage_cutoffs, protocol_named
from jaxcrystal.evaluation.table import Provenance, describe
from jaxcrystal.reader.inputs import Input, count, name_as_text, require_crystals
from jaxcrystal.reader.reading import crystal_from_cif, read
from jaxcrystal.reader.rows import Rows
from jaxcrystal.workers import Workers, each

if TYPE_CHECKING:
    from jaxcrystal.hull.hull import Hull
    from jaxcrystal.relaxation.potentials import PotentialCard

#: What is in the names of those numbers of metrics.json that are no rates.
_NO_RATES = ("diversity.", "hhi.", "_wasserstein", ".ams", ".amc", ".median", ".p10", ".p90", ".rmse")


def evaluate(
    samples_path: str | Path,
    out_dir: str | Path,
    *,
    train: str | Path | None = None,
    nearest: bool = False,
    truth: str | Path | None = None,
    reference: str | Path | None = None,
    unconditional: str | Path | None = None,
    scores: str | Path | pd.DataFrame | None = None,
    protocol: str = "cdvae",
    cutoffs: str = "mp_20",
    potential: str | None = None,
    hull: str | Path | Sequence[str | Path] = (),
    references: str | Path | None = None,
    hull_labels: str = "relaxed",
    fmax: float = 0.1,
    max_steps: int = 500,
    symprec: float = SYMPREC,
    judges: Mapping[str, Judge] = MappingProxyType({}),
    workers: Workers | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluates the first `limit` crystals of `samples_path` into `out_dir`; returns what `metrics.json` holds.

    - `train`: crystals that count as known; adds novelty, by matching.
    - `nearest`: adds of each attempt the training crystal that is most like it, and those numbers of the protocol that
      need the training set's fingerprints. They take minutes for tens of thousands of crystals, once.
    - `truth`: the true crystals, of which the samples are predictions, paired by the ids of both files, or by row where
      neither has ids; adds match rate and RMSE, also of the first 1, 5, 20 of several predictions of one crystal.
    - `reference`: crystals to compare with; adds coverage, within the `cutoffs` of a data set, and distributions.
    - `unconditional`: the folder of an evaluation of crystals for which nothing was asked; adds how many of these meet
      what was asked of the samples.
    - `scores`: what `jaxcrystal score` wrote of the samples; adds how probable the model found each. A ledger's own
      samples have that anyway.
    - `potential`: name or directory; adds relaxation until no force exceeds `fmax` eV/Å, or for `max_steps` steps.
    - `hull`: competing phases; adds the distance to their hull. One file that `jaxcrystal hull build` wrote; or, with
      `references` (elemental reference entries), one table of formation energies on their scale; or sets of crystals,
      which the potential itself labels, `relaxed` or by a `single-point` (`hull_labels`).
    - `symprec`: in Å, within which space groups are found.
    - `judges`: functions from a Structure to a property, by its name.
    - `workers`: where the work on single crystals is done (`workers.local`, `workers.dask`); None: in this process,
      which then dies of whatever crystal kills it.

    What was read of each input, and what could not be used, is in `inputs` of the result.

    Raises UserError if an input cannot be read or has no crystal that can be used (the samples may), the output cannot
    be written, or options do not go together.
    """
    convention = protocol_named(protocol)
    coverage_cutoffs(cutoffs)
    unasked = None if unconditional is None else results.read(Path(unconditional))
    if nearest and train is None:
        raise UserError("nearest needs a training set: it looks for the training crystal most like each sample")
    hull = [hull] if isinstance(hull, str | Path) else list(hull)
    _require_together(potential, hull, references, hull_labels)
    out = _writable(Path(out_dir))
    judge, phases = _judge_and_hull(potential, hull, references, hull_labels, workers)

    # Every input is read before hours of relaxation begin: one of them may be refused.
    samples = read(samples_path, workers=workers, limit=limit)
    versions = _programs() | {"samples": _fingerprint(samples), "space groups": f"within {symprec:g} Å"}
    inputs = {"samples": count(samples)}
    probable = likelihoods.of_samples(samples, scores)
    if isinstance(scores, str | Path):
        digest = hashlib.sha256(Path(scores).read_bytes()).hexdigest()
        versions["scores"] = f"{name_as_text(Path(scores))} sha256:{digest}"
    true = known = others = None
    if truth is not None:
        true = read(truth, workers=workers)
        versions["truth"] = _fingerprint(true)
        truths = paired(samples, true, limit)
        inputs["truth"] = count(true, set(range(len(true.rows))) - set(truths))
    if train is not None:
        known = _told_apart(read(train, workers=workers))
        versions["train"] = _fingerprint(known)
        inputs["train"] = require_crystals("training set", known)
    if reference is not None:
        others = read(reference, workers=workers)
        versions["reference"] = _fingerprint(others)
        inputs["reference"] = require_crystals("reference", others)
    told = {} if true is None else shots.columns(samples, true, truths, known)

    table = describe(samples.rows, convention, symprec=symprec, workers=workers)
    if probable is not None:
        table = table.join(probable)
    versions |= {f"judge of {name}": f"{fn.__module__}:{fn.__qualname__}" for name, fn in judges.items()}
    table = judged(table, [sample.crystal for sample in samples.rows], judges)
    if true is not None:
        table = _with_truth(table, samples, true, truths, convention, workers).assign(**told)
    sound = [s.crystal if ok else None for s, ok in zip(samples.rows, table["structural_valid"], strict=True)]
    table = _with_likeness(table, sound, known)
    if judge is not None:
        from jaxcrystal.evaluation.stability import assess
        from jaxcrystal.hull.sources import label_settings, labelled

        structures = [crystal.to_structure() for crystal in sound if crystal is not None]
        kept = {"workers": workers, "cache_dir": out / "relaxations"}
        if hull and phases is None:
            phases = labelled(hull, judge, structures, label_settings(hull_labels, fmax, max_steps), **kept)
        rows = assess(structures, judge, phases, fmax=fmax, max_steps=max_steps, **kept)
        table = _with_stability(table, rows, placed=phases is not None)
        table = _with_relaxed(table, known, judges, symprec, workers)
        versions["potential"] = f"{judge.name} sha256:{judge.sha256}"
        if judge.check.unchecked:
            versions["potential not checked"] = f"for {', '.join(judge.check.unchecked)}"
        versions["relaxation"] = f"until forces are below {fmax:g} eV/Å, at most {max_steps} steps"
    if phases is not None:
        versions["hull"] = f"{phases.name} sha256:{phases.sha256}"
        inputs |= _hull_inputs(phases, hull, references)
        versions["hull scale"] = phases.scale
    compared = None
    if nearest or others is not None:
        near = known if nearest else None
        table, compared = _with_neighbours(table, samples, near, others, convention, out / "fingerprints", workers)

    base = None
    if unasked is not None:
        base = conditions.comparable(unasked, table, versions)
        versions["unconditional"] = unasked.metrics["versions"]["samples"]
    provenance = Provenance(convention.name, versions, judge and judge.name, phases and phases.name, cutoffs, inputs)
    metrics = metrics_from_table(table, provenance, compared, base)
    rows_known = None if known is None else known.rows
    results.write(out, table, metrics, provenance, reference=compared, known=rows_known, unconditional=base)
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """Lines for a terminal: the rates with their 95 % intervals, what failed, and what of each input was not used."""
    counts = metrics["counts"]
    lines = [f"{counts['attempts']} attempts, protocol {metrics['protocol']}"]
    if note := protocol_named(metrics["protocol"]).note:
        lines.append(f"  {note}")
    width = max(map(len, metrics["confidence_95"]))
    for name, (low, high) in metrics["confidence_95"].items():
        value: Any = metrics
        for part in name.split("."):
            value = value[part]
        form = ".3f" if any(word in name for word in _NO_RATES) else ".1%"
        lines.append(f"  {name:<{width}} {value:>8{form}}   95 %: {low:{form}} to {high:{form}}")
    inputs = {role: Input(**counted) for role, counted in metrics["inputs"].items()}
    reasons = inputs["samples"].reasons if "samples" in inputs else {}
    failed = {name: n for name, n in counts["outcomes"].items() if name != "ok"}
    lines += [f"  {n:>6} {name}" + (f" ({reasons[name]})" if reasons.get(name) else "") for name, n in failed.items()]
    relaxations = counts.get("relaxations", {})
    lines += [f"  {n:>6} relaxation: {name}" for name, n in relaxations.items() if name != "converged"]
    if "placed" in counts:
        none, few = counts["no_phase_of_system"], counts["few_phases_of_system"]
        lines.append(
            f"  {none:>6} of {counts['placed']} placed where the hull knows no phase of their elements together"
        )
        lines.append(f"  {few:>6} where it knows fewer than {FEW}")
    lines += [f"  {n:>6} asked for {name}, which nothing judged" for name, n in counts.get("not_judged", {}).items()]
    silent = counts.get("judge_could_not_say", {})
    lines += [f"  {n:>6} of which the judge of {name} could not say anything" for name, n in silent.items()]
    if (truth := counts.get("truth")) and truth["most_predictions"] > 1:
        each_has = " to ".join(map(str, sorted({truth["fewest_predictions"], truth["most_predictions"]})))
        lines.append(f"  {truth['crystals']:>6} true crystals, of {each_has} predictions each")
    lines += [f"  {n:>6} without a match: {reason}" for reason, n in counts.get("no_match", {}).items()]
    for role, counted in inputs.items():
        if (counted.left_out and role != "samples") or counted.unread:
            lines.append(f"  {role}: {counted.sentence}")
        lines += [f"  {role}: {n} rows of {counted.file}: {note}" for note, n in counted.notes.items()]
    return "\n".join(lines)


def _require_together(
    potential: str | None, hull: Sequence[str | Path], references: str | Path | None, hull_labels: str
) -> None:
    if hull and potential is None:
        raise UserError(
            f"the hull {hull[0]} needs a potential: what is placed against it is a relaxed crystal's energy"
        )
    if references is not None and not hull:
        raise UserError(f"the element references {references} need a hull: they place energies on its scale")
    if hull_labels != "relaxed" and not hull:
        raise UserError("hull labels need a hull: they say how the potential labels its crystals")


def _judge_and_hull(
    potential: str | None,
    hull: Sequence[str | Path],
    references: str | Path | None,
    hull_labels: str,
    workers: Workers | None,
) -> tuple[PotentialCard | None, Hull | None]:
    """The potential, which has proved itself, and the hull: None as well where the potential is yet to label it."""
    judge = phases = None
    if potential is not None:
        from jaxcrystal.relaxation.relaxations import potential_card

        judge = potential_card(potential, workers)
    if hull:
        from jaxcrystal.hull.sources import known_hull

        phases = known_hull(hull, references, hull_labels)
        if phases is not None:
            phases.require_same_scale(judge)
    return judge, phases


def _told_apart(known: Rows) -> Rows:
    """The same crystals, with the row in an id that several have."""
    often = Counter(row.id for row in known.rows)
    if all(count == 1 for count in often.values()):
        return known
    rows = (replace(row, id=f"{row.id}, row {row.row}") if often[row.id] > 1 else row for row in known.rows)
    return replace(known, rows=tuple(rows))


def _with_likeness(
    table: pd.DataFrame, crystals: Sequence[Crystal | None], known: Rows | None, suffix: str = ""
) -> pd.DataFrame:
    """Adds `group` and `unique`, the first of its group; `novel` and `known_as`, the training crystal that it matches.

    `crystals` are those of the rows, None where there is none, which is neither unique nor novel.
    """
    group = pd.array(group_ids(crystals), dtype="Int64")
    columns = {"group": group, "unique": ~(group.isna() | pd.Series(group).duplicated().to_numpy())}
    if known is not None:
        found = matches(crystals, [sample.crystal for sample in known.rows])
        columns["novel"] = [crystal is not None and i is None for crystal, i in zip(crystals, found, strict=True)]
        columns["known_as"] = [None if i is None else known.rows[i].id for i in found]
    return table.assign(**{f"{name}{suffix}": values for name, values in columns.items()})


def _with_truth(
    table: pd.DataFrame,
    samples: Rows,
    true: Rows,
    positions: Sequence[int],
    protocol: Protocol,
    workers: Workers | None,
) -> pd.DataFrame:
    """Adds `truth_displacement` or why there is none, and `truth_valid`; `positions` are those of the true crystals."""
    needed = sorted(set(positions))
    truths = describe([true.rows[i] for i in needed], protocol, symmetry=False, workers=workers)
    valid = dict(zip(needed, valid_rows(truths), strict=True))
    predicted, truth = [s.crystal for s in samples.rows], [true.rows[i].crystal for i in positions]
    found, reasons = displacements(predicted, truth, workers=workers)
    return table.assign(
        truth_displacement=found, no_match_because=reasons, truth_valid=[bool(valid[i]) for i in positions]
    )


def _hull_inputs(phases: Hull, paths: Sequence[str | Path], references: str | Path | None) -> dict[str, Input]:
    """What is in the hull, whose rows are its phases and what was left out of it; and its element references."""
    used, left_out = sum(map(len, phases.phases.values())), dict(sorted((phases.left_out or {}).items()))
    file = ", ".join(map(name_as_text, paths))
    found = {"hull": Input(file, phases.sha256, used + sum(left_out.values()), used, left_out)}
    if references is not None:
        digest, known = hashlib.sha256(Path(references).read_bytes()), len(phases.references.energies)
        found["references"] = Input(name_as_text(references), digest.hexdigest(), known, known)
    return found


def _with_neighbours(
    table: pd.DataFrame,
    samples: Rows,
    known: Rows | None,
    others: Rows | None,
    protocol: Protocol,
    folder: Path,
    workers: Workers | None,
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Adds diversity, and what is most like each attempt among the known crystals and among the others; beside it the
    table of the others, with what is most like each among the attempts. `folder` keeps the samples' fingerprints."""
    own = stored_fingerprints([sample.crystal for sample in samples.rows], folder, workers=workers)
    own = only_valid(own, table) if protocol.fingerprints_of_valid else own
    table, compared = with_diversity(table, own, protocol), None
    if known is not None:
        theirs = _known_fingerprints(known, protocol, workers)
        table = with_nearest(table, own, theirs, [sample.id for sample in known.rows], "train")
    if others is not None:
        compared = describe(others.rows, protocol, symmetry=False, workers=workers)
        theirs = _known_fingerprints(others, protocol, workers, compared)
        table = with_nearest(table, own, theirs, compared["id"], "reference")
        compared = with_nearest(compared, theirs, own, table["id"], "generated")
    return table, compared


def _known_fingerprints(
    known: Rows, protocol: Protocol, workers: Workers | None, table: pd.DataFrame | None = None
) -> Fingerprints:
    """Fingerprints of crystals to compare with, stored for the next time; `table` is what `describe` says of them."""
    found = stored_fingerprints([sample.crystal for sample in known.rows], store(), workers=workers)
    if not protocol.fingerprints_of_valid:
        return found
    return only_valid(
        found, describe(known.rows, protocol, symmetry=False, workers=workers) if table is None else table
    )


def _with_stability(table: pd.DataFrame, rows: Sequence[Any], *, placed: bool) -> pd.DataFrame:
    """Adds the columns of `StabilityRow`; `rows` are those of the structurally valid attempts, in their order.

    Without a hull (`placed` false) its columns are absent.
    """
    from jaxcrystal.evaluation.stability import StabilityRow

    columns = [column.name for column in fields(StabilityRow)]  # there may be no row to read them off
    found = pd.DataFrame([asdict(row) for row in rows], table.index[table["structural_valid"]], columns)
    names = {"outcome": "relaxation", "reason": "relaxation_reason", "cif": "relaxed_cif", "fmax": "largest_force"}
    found = found.rename(columns=names).reindex(table.index)
    # Why an attempt was not relaxed: there is no crystal, or its atoms overlap.
    unsent = pd.Series("no_crystal", table.index).where(table["outcome"] != "ok", "invalid")
    found["relaxation"] = found["relaxation"].map(str, na_action="ignore").fillna(unsent)
    found["relaxation_reason"] = found["relaxation_reason"].fillna("")
    found["converged"] = found["converged"].eq(True)
    of_hull, numbers = ["formation_energy_per_atom", "e_above_hull"], ["competing_phases", "phases_of_system"]
    measures = ["energy_per_atom", *of_hull, "largest_force", "rmsd", "volume_change"]
    found = found.astype(dict.fromkeys(measures, "float64") | dict.fromkeys(["steps", *numbers], "Int64"))
    return table.join(found if placed else found.drop(columns=[*of_hull, *numbers]))


def _with_relaxed(
    table: pd.DataFrame, known: Rows | None, judges: Mapping[str, Judge], symprec: float, workers: Workers | None
) -> pd.DataFrame:
    """Adds to what `_with_stability` gave what is said of crystals as sampled, of them as relaxed."""
    relaxed = [None if pd.isna(cif) else crystal_from_cif(cif) for cif in table["relaxed_cif"]]
    table = _with_likeness(table, relaxed, known, "_relaxed")
    find = partial(_group, symprec=symprec)
    groups = each(find, relaxed, workers, label="space groups", lost=lambda crystal, why: None)
    table = table.assign(spacegroup_relaxed=pd.array(groups, dtype="Int64"))
    return judged(table, relaxed, judges, "_relaxed")


def _group(crystal: Crystal | None, symprec: float) -> int | None:
    return None if crystal is None else space_group(crystal, symprec)


def _programs() -> dict[str, str]:
    try:
        packages = {
            name: importlib.metadata.version(name) for name in ("jaxcrystal", "moyopy", "pymatgen", "smact", "spglib")
        }
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'jaxcrystal[evaluate]'") from None
    return packages | {"python": platform.python_version()}


def _fingerprint(samples: Rows) -> str:
    return f"{name_as_text(samples.path)} sha256:{samples.sha256}"


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
