"""From the table of attempts to `metrics.json`: every rate is a sum over rows, divided by the number of all rows.

The function is pure: whoever reads `structures.parquet` gets the same numbers, to the last digit. What was not asked
for (no potential, no hull, no training set) has no column in the table and no key in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.evaluation import conditions, coverage, shots, variety
from jaxcrystal.evaluation.intervals import bootstrap_median, bootstrap_percentile, wilson
from jaxcrystal.evaluation.own_judges import unsaid
from jaxcrystal.evaluation.prediction import prediction
from jaxcrystal.evaluation.protocols import coverage_cutoffs, protocol_named
from jaxcrystal.evaluation.table import Provenance
from jaxcrystal.reader.rows import PARSED

LEFT_OUT = "left_out"  #: outcome of crystals that `sample --keep` did not keep, and that nobody judges
METASTABLE = 0.1  #: eV/atom above the hull; below it a crystal is metastable (arXiv 2402.04379, section 5)
STABLE = 0.0  #: eV/atom; on the hull or below it

#: Known phases of a chemical system, fewer than which say little about what else would exist in it.
FEW = 3


def metrics_from_table(
    table: pd.DataFrame,
    provenance: Provenance,
    reference: pd.DataFrame | None = None,
    unconditional: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """The contents of `metrics.json` (DESIGN.md's contract); energies in eV/atom, RMSD in Å, densities in g/cm³.

    `reference` is the table of `reference.parquet`, `unconditional` that of `unconditional.parquet`, if there are any.
    A rate is over all attempts. So are those of `validity` where a protocol leaves out what is no crystal at all;
    `_of_constructed` is without those. What `coverage.py` counts has the protocol's own denominator, and is counted
    over all rows too, as `_of_all`. Where a sampler kept the likeliest crystals alone, each rate is also given among
    those kept, as `_of_kept`. What was asked for is counted by `conditions.py`.

    Uniqueness, novelty and S.U.N. are of the relaxed crystals where crystals were relaxed, as the field has it (Zeni et
    al., Nature 639, 624, 2025); one that did not relax is neither unique nor novel. What they are before the
    relaxation is in `_as_sampled`. Without a potential there is no relaxed crystal, and they are of the sampled ones.
    """
    attempts = len(table)
    valid = table["structural_valid"] & table["compositional_valid"]
    unique, novel = _relaxed_and_sampled(table, "unique"), _relaxed_and_sampled(table, "novel")
    masks = {
        "validity.structural": table["structural_valid"],
        "validity.compositional": table["compositional_valid"],
        "validity.both": valid,
    }
    if "plausible" in table:
        masks |= {"validity.distances": table["distances_valid"], "validity.plausibility": table["plausible"]}
    masks |= {f"uniqueness.rate{suffix}": mask for suffix, mask in unique.items()}
    masks |= {f"novelty.by_matching{suffix}": mask for suffix, mask in novel.items()}
    counts: dict[str, Any] = {
        "attempts": attempts,
        "parsed": int(table["outcome"].isin(PARSED).sum()),
        "constructed": int((table["outcome"] == "ok").sum()),
        "valid": int(valid.sum()),
        "outcomes": _tally(table["outcome"]),
    }
    counts |= {f"unique{suffix}": int(mask.sum()) for suffix, mask in unique.items()}
    counts |= {f"novel{suffix}": int(mask.sum()) for suffix, mask in novel.items()}
    medians: dict[str, Float[np.ndarray, "n"]] = {}
    percentiles: dict[str, float] = {}
    of_percentiles: dict[str, tuple[float, float]] = {}
    names: dict[str, str] = {}
    if "relaxation" in table:
        counts["relaxed"] = int(table["energy_per_atom"].notna().sum())
        counts["converged"] = int(table["converged"].sum())
        counts["relaxations"] = _tally(table["relaxation"])
        names["stability.potential"] = provenance.potential
        medians["stability.relaxation_rmsd.median"] = _known(table["rmsd"])
    if "e_above_hull" in table:
        names["stability.hull"] = provenance.hull
        metastable, stable = metastable_rows(table), stable_rows(table)
        counts |= {"metastable": int(metastable.sum()), "stable": int(stable.sum())}
        if "phases_of_system" in table:  # not in a table of an earlier version
            of_system = table["phases_of_system"]
            counts |= {
                "placed": int(of_system.notna().sum()),
                "no_phase_of_system": int(of_system.eq(0).sum()),
                "few_phases_of_system": int(of_system.between(1, FEW - 1).sum()),
                "metastable_and_no_phase_of_system": int((metastable & of_system.eq(0)).sum()),
            }
        on, near = lemat_stable_rows(table), lemat_metastable_rows(table)
        masks |= {"stability.metastable_rate": metastable, "stability.stable_rate": stable}
        masks |= {"stability.lemat_metastable_rate": near, "stability.lemat_stable_rate": on}
        for suffix in novel:
            new = unique[suffix] & novel[suffix]
            masks |= {f"sun.rate{suffix}": stable & new, f"sun.metastable_rate{suffix}": metastable & new}
            masks |= {f"sun.lemat_rate{suffix}": on & new, f"sun.lemat_metastable_rate{suffix}": near & new}
        distances = medians["stability.e_above_hull.median"] = _known(table["e_above_hull"])
        if len(distances):
            for name, q in (("p10", 10), ("p90", 90)):
                percentiles[f"stability.e_above_hull.{name}"] = float(np.percentile(distances, q))
                of_percentiles[f"stability.e_above_hull.{name}"] = bootstrap_percentile(distances, q)
    if reference is not None and "reference_structure_distance" in table:
        names["coverage.cutoffs"] = provenance.cutoffs
    medians = {name: values for name, values in medians.items() if len(values)}
    flat = names | {name: int(mask.sum()) / attempts for name, mask in masks.items()}
    flat |= {name: float(np.median(values)) for name, values in medians.items()} | percentiles
    intervals = {name: wilson(int(mask.sum()), attempts) for name, mask in masks.items()}
    intervals |= {name: bootstrap_median(values) for name, values in medians.items()} | of_percentiles
    if protocol_named(provenance.protocol).leaves_out_failures and counts["constructed"]:
        for name in [name for name in masks if name.startswith("validity.")]:
            valid_ones = int(masks[name].sum())
            flat[f"{name}_of_constructed"] = valid_ones / counts["constructed"]
            intervals[f"{name}_of_constructed"] = wilson(valid_ones, counts["constructed"])
    if counts["outcomes"].get(LEFT_OUT) and (kept := counts["constructed"]):
        for name, mask in masks.items():
            if not name.endswith("_as_sampled"):
                flat[f"{name}_of_kept"] = int(mask.sum()) / kept
                intervals[f"{name}_of_kept"] = wilson(int(mask.sum()), kept)
    if without := conditions.unjudged(table):
        counts["not_judged"] = without
    if silent := unsaid(table):
        counts["judge_could_not_say"] = silent
    for numbers, ranges in chain(_compared(table, reference, provenance), conditions.met(table, unconditional)):
        flat, intervals = flat | numbers, intervals | ranges
    if "truth_displacement" in table:
        counts["no_match"] = _tally(table["no_match_because"][table["truth_displacement"].isna()])
    if "truth_id" in table:
        counts["truth"] = shots.counts(table)
    if "drawn" in table:
        counts["fingerprints"] = int((table["no_fingerprint_because"] == "").sum())
        counts["drawn"] = int(table["drawn"].sum())
    return {
        "protocol": provenance.protocol,
        "counts": counts,
        "inputs": {role: asdict(counted) for role, counted in provenance.inputs.items()},
        **_nested(flat),
        "confidence_95": {name: list(interval) for name, interval in intervals.items()},
        "versions": dict(provenance.versions),
    }


def _compared(
    table: pd.DataFrame, reference: pd.DataFrame | None, provenance: Provenance
) -> Iterator[tuple[coverage.Numbers, coverage.Intervals]]:
    """Numbers and their intervals, of whatever the tables have columns for."""
    protocol = protocol_named(provenance.protocol)
    if "truth_displacement" in table:
        yield prediction(table)
    if "truth_id" in table:  # not in a table of an earlier version
        yield from shots.shots(table)
    if "drawn" in table:
        yield coverage.diversity(table)
    if reference is not None and "reference_structure_distance" in table:
        yield coverage.coverage(table, reference, protocol, coverage_cutoffs(provenance.cutoffs))
        yield coverage.distribution(table, reference)
    if protocol.rules == "lemat":
        yield variety.lemat(table)
    if protocol.novelty is not None and "train_structure_distance" in table:
        yield coverage.novelty(table, protocol, protocol.novelty)


def metastable_rows(table: pd.DataFrame) -> pd.Series:
    """Which attempts lie less than 0.1 eV/atom above the hull; one without a distance does not."""
    return table["e_above_hull"] < METASTABLE


def stable_rows(table: pd.DataFrame) -> pd.Series:
    """Which attempts lie on the hull or below it; one without a distance does not."""
    return table["e_above_hull"] <= STABLE


def lemat_stable_rows(table: pd.DataFrame) -> pd.Series:
    """E ≤ 0, however far below the hull: what LeMat-GenBench (arXiv 2512.04562) calls stable."""
    from jaxcrystal.evaluation.stability import StabilityOutcome

    return stable_rows(table) | table["relaxation"].eq(StabilityOutcome.FAR_BELOW_HULL)


def lemat_metastable_rows(table: pd.DataFrame) -> pd.Series:
    """0 < E ≤ 0.1 eV/atom: what LeMat-GenBench calls metastable. Stable ones are not among them."""
    return table["e_above_hull"].gt(STABLE) & table["e_above_hull"].le(METASTABLE)


def _relaxed_and_sampled(table: pd.DataFrame, column: str) -> dict[str, pd.Series]:
    """A column of the relaxed crystals and, `_as_sampled`, before that; of the sampled ones alone if none was relaxed.

    By the suffix that the numbers have which are made of it. Empty where the table has no such column.
    """
    if column not in table:
        return {}
    if f"{column}_relaxed" not in table:
        return {"": table[column]}
    return {"": table[f"{column}_relaxed"], "_as_sampled": table[column]}


def _known(column: pd.Series) -> Float[np.ndarray, "n"]:
    values = column.to_numpy(np.float64)
    return values[np.isfinite(values)]


def _tally(column: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in sorted(column.value_counts().items())}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
