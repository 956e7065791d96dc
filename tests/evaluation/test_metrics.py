"""The numbers against a count by hand and scipy; what was not asked for is absent."""

import itertools
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest, bootstrap

from jaxcrystal.evaluation.evaluation import summary
from jaxcrystal.evaluation.intervals import bootstrap_median, bootstrap_percentile, wilson
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.table import Provenance, read_table, write_table
from jaxcrystal.reader.inputs import Input

ASKED = Provenance("cdvae", {"jaxcrystal": "0"}, potential="a potential", hull="a hull")


def attempts():
    """Eight attempts, each with another fate."""
    return pd.DataFrame(
        {
            "id": list("abcdefgh"),
            "outcome": ["ok", "ok", "ok", "ok", "ok", "truncated", "cell_error", "ok"],
            "structural_valid": [True, True, True, True, True, False, False, False],
            "compositional_valid": [True, True, True, True, False, False, False, True],
            "unique": [True, True, False, True, True, False, False, False],
            "group": pd.array([0, 1, 0, 2, 3, None, None, None], "Int64"),
            "novel": [True, False, True, True, True, False, False, False],
            "relaxation": ["converged"] * 3 + ["not_converged", "diverged", "no_crystal", "no_crystal", "invalid"],
            "converged": [True, True, True, False, False, False, False, False],
            "energy_per_atom": [-1.0, -2.0, -3.0, -4.0] + [np.nan] * 4,
            "e_above_hull": [0.0, -0.1, 0.0999, 0.1] + [np.nan] * 4,
            "rmsd": [0.1, 0.2, 0.3, 0.4] + [np.nan] * 4,
        }
    )


def test_every_number_equals_the_count_by_hand():
    metrics = metrics_from_table(attempts(), ASKED)
    assert metrics["counts"] == {
        "attempts": 8,
        "parsed": 7,
        "constructed": 6,
        "valid": 4,
        "unique": 4,
        "novel": 4,
        "outcomes": {"cell_error": 1, "ok": 6, "truncated": 1},
        "relaxed": 4,
        "converged": 3,
        "relaxations": {"converged": 3, "diverged": 1, "invalid": 1, "no_crystal": 2, "not_converged": 1},
        "metastable": 3,
        "stable": 2,
    }
    assert metrics["validity"] == {"structural": 5 / 8, "compositional": 5 / 8, "both": 4 / 8}
    assert metrics["uniqueness"] == {"rate": 4 / 8}
    assert metrics["novelty"] == {"by_matching": 4 / 8}
    # LeMat-GenBench's stable are "a" and "b", which is known; its metastable "c", which repeats, and, at 0.1, "d".
    sun = metrics["sun"]
    assert (sun["rate"], sun["metastable_rate"]) == (1 / 8, 1 / 8)
    assert (sun["lemat_rate"], sun["lemat_metastable_rate"]) == (1 / 8, 1 / 8)
    stability = metrics["stability"]
    assert (stability["potential"], stability["hull"]) == ("a potential", "a hull")
    assert (stability["metastable_rate"], stability["stable_rate"]) == (3 / 8, 2 / 8)
    assert (stability["lemat_metastable_rate"], stability["lemat_stable_rate"]) == (2 / 8, 2 / 8)
    assert stability["e_above_hull"]["median"] == pytest.approx(0.04995)
    assert stability["e_above_hull"]["p10"] == pytest.approx(-0.07)
    assert stability["e_above_hull"]["p90"] == pytest.approx(0.09997)
    assert stability["relaxation_rmsd"] == {"median": 0.25}
    assert metrics["confidence_95"]["stability.metastable_rate"] == list(wilson(3, 8))
    assert metrics["confidence_95"]["stability.e_above_hull.p90"] == list(
        bootstrap_percentile(np.array([0.0, -0.1, 0.0999, 0.1]), 90)
    )
    assert metrics["versions"] == {"jaxcrystal": "0"} and metrics["protocol"] == "cdvae"


def test_sun_asks_for_all_three_of_every_attempt():
    # Every choice of stable, metastable or neither; unique or not; novel or not; and two attempts that came to nothing.
    fates = [*itertools.product([-0.1, 0.05, 0.2], [True, False], [True, False]), *[(np.nan, False, False)] * 2]
    distance, unique, novel = zip(*fates, strict=True)
    columns = {"e_above_hull": distance, "unique": unique, "novel": novel, "rmsd": np.nan, "energy_per_atom": distance}
    told = dict.fromkeys(["outcome", "relaxation"], "ok")
    table = pd.DataFrame(columns | told | dict.fromkeys(["structural_valid", "compositional_valid", "converged"], True))
    metrics = metrics_from_table(table, ASKED)
    assert metrics["sun"] == {
        "rate": 1 / 14,
        "metastable_rate": 2 / 14,
        "lemat_rate": 1 / 14,
        "lemat_metastable_rate": 1 / 14,
    }
    assert metrics["confidence_95"]["sun.rate"] == list(wilson(1, 14))
    assert metrics["confidence_95"]["sun.metastable_rate"] == list(wilson(2, 14))


def test_words_differ_at_the_hull_at_its_edge_and_far_below_it():
    distance = [np.nan, -0.1, 0.0, 1e-9, 0.05, 0.1, 0.1 + 1e-9, np.nan]
    outcomes = ["far_below_hull", *["converged"] * 6, "uncovered"]
    columns = {"e_above_hull": distance, "relaxation": outcomes, "unique": True, "novel": True}
    told = dict.fromkeys(["structural_valid", "compositional_valid", "converged"], True)
    table = pd.DataFrame(columns | told | {"outcome": "ok", "rmsd": np.nan, "energy_per_atom": -1.0})
    metrics = metrics_from_table(table, ASKED)
    # Below 0.1, those on and below the hull among them.
    assert metrics["stability"]["metastable_rate"] == metrics["sun"]["metastable_rate"] == 4 / 8
    assert metrics["stability"]["stable_rate"] == metrics["sun"]["rate"] == 2 / 8
    assert metrics["stability"]["lemat_stable_rate"] == metrics["sun"]["lemat_rate"] == 3 / 8  # however far below
    assert metrics["stability"]["lemat_metastable_rate"] == metrics["sun"]["lemat_metastable_rate"] == 3 / 8


def test_a_relaxed_crystal_is_judged_as_relaxed_and_as_sampled_beside_it():
    # Of the first four, which have energies, two relax to one crystal and one to a known one; the others did not relax.
    relaxed = attempts().assign(
        unique_relaxed=[True, True, True, False] + [False] * 4, novel_relaxed=[True, False, True, True] + [False] * 4
    )
    metrics, sampled = metrics_from_table(relaxed, ASKED), metrics_from_table(attempts(), ASKED)
    assert metrics["uniqueness"] == {"rate": 3 / 8, "rate_as_sampled": sampled["uniqueness"]["rate"]}
    assert metrics["novelty"] == {"by_matching": 3 / 8, "by_matching_as_sampled": sampled["novelty"]["by_matching"]}
    assert metrics["sun"] == {
        "rate": 1 / 8,
        "metastable_rate": 2 / 8,
        "lemat_rate": 1 / 8,
        "lemat_metastable_rate": 1 / 8,
        **{f"{name}_as_sampled": rate for name, rate in sampled["sun"].items()},
    }
    assert metrics["confidence_95"]["sun.metastable_rate"] == list(wilson(2, 8))
    assert (metrics["counts"]["unique"], metrics["counts"]["novel"]) == (3, 3)
    assert (metrics["counts"]["unique_as_sampled"], metrics["counts"]["novel_as_sampled"]) == (4, 4)
    assert metrics["stability"] == sampled["stability"] and metrics["validity"] == sampled["validity"]


EVERYTHING = replace(ASKED, protocol="crystal-text-llm", cutoffs="mp_20")


def everything(rows=8):
    """The first `rows` attempts, with every column that an evaluation may add."""
    table = attempts().head(rows).assign(truth_displacement=0.1, truth_valid=True, no_match_because="")
    table = table.assign(drawn=True, no_fingerprint_because="", density=5.0, num_elements=2)
    for kind in ("structure", "composition"):
        table = table.assign(**{f"{side}_{kind}_distance": 0.2 for side in ("train", "reference", "generated")})
        table[f"mean_{kind}_distance"] = 0.3
    return table.assign(**{f"{name}_relaxed": table[name] for name in ("group", "unique", "novel")})


def nothing(rows):
    """The same of attempts that all failed at once."""
    table = everything(rows)
    numbers = [name for name in table.select_dtypes("number") if not name.startswith("generated")]
    masks = table.select_dtypes(bool).columns
    return table.assign(**dict.fromkeys(numbers, np.nan), **dict.fromkeys(masks, False), no_match_because="none")


@pytest.mark.parametrize(
    "table",
    [
        nothing(1),
        nothing(8),
        nothing(8).assign(structural_valid=True, outcome="ok", relaxation="diverged"),  # valid, but none relaxed
        everything(1),
        everything(1).assign(e_above_hull=np.nan),
    ],
    ids=["one that failed", "none valid", "none relaxed", "one crystal", "one that is not covered"],
)
def test_small_and_empty_sets_have_rates_and_no_made_up_numbers(table):
    metrics = metrics_from_table(table, EVERYTHING, everything())
    flat = {name: _at(metrics, name) for name in metrics["confidence_95"]}
    for name, value in flat.items():
        low, high = metrics["confidence_95"][name]
        assert np.isfinite([low, value, high]).all() and low <= value <= high, name
    rates = {"validity.both", "uniqueness.rate", "novelty.by_matching", "sun.rate", "stability.metastable_rate"}
    assert rates | {f"{name}_as_sampled" for name in ("uniqueness.rate", "sun.rate")} <= set(flat)
    placed = table["e_above_hull"].notna().any()
    assert ("stability.e_above_hull.median" in flat) == placed
    assert (flat["stability.metastable_rate"] > 0) == placed
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert f"{len(table)} attempts" in summary(metrics)


def _at(metrics, name):
    for part in name.split("."):
        metrics = metrics[part]
    return metrics


def test_what_was_not_asked_for_is_absent():
    bare = attempts().drop(columns=["novel", "relaxation", "converged", "energy_per_atom", "e_above_hull", "rmsd"])
    metrics = metrics_from_table(bare, Provenance("cdvae", {}))
    assert set(metrics) == {"protocol", "counts", "inputs", "validity", "uniqueness", "confidence_95", "versions"}
    assert metrics["inputs"] == {}
    relaxed = metrics_from_table(attempts().drop(columns=["novel", "e_above_hull"]), Provenance("cdvae", {}, "chgnet"))
    assert set(relaxed["stability"]) == {"potential", "relaxation_rmsd"} and "sun" not in relaxed
    none = attempts().assign(e_above_hull=np.nan, rmsd=np.nan)
    rates = {f"{words}stable_rate" for words in ("", "meta", "lemat_", "lemat_meta")}
    assert set(metrics_from_table(none, ASKED)["stability"]) == {"potential", "hull"} | rates


def test_the_page_names_every_number():
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    metrics = metrics_from_table(everything(), EVERYTHING, everything())
    sections = {"validity", "uniqueness", "novelty", "coverage", "distribution", "diversity"}
    assert {name.split(".")[0] for name in metrics["confidence_95"]} == sections | {"prediction", "stability", "sun"}
    for name in metrics["confidence_95"]:
        assert f"`{re.sub('_of_all|_of_constructed|_if_valid|_of_valid|_as_sampled', '', name)}`" in page, name
    for suffix in ("_of_all", "_of_constructed", "_if_valid", "_as_sampled"):
        assert f"`…{suffix}`" in page and any(name.endswith(suffix) for name in metrics["confidence_95"])


def test_every_interval_belongs_to_a_number():
    metrics = metrics_from_table(attempts(), ASKED)
    for name, (low, high) in metrics["confidence_95"].items():
        value = metrics
        for part in name.split("."):
            value = value[part]
        assert low <= value <= high, name


def test_the_stored_table_gives_the_same_numbers(tmp_path):
    counted = Input("train.csv", "0" * 64, 12, 3, {"cif_error": 9}, {"cif_error": "no cell"}, {"D is read as H": 2})
    asked = replace(ASKED, inputs={"train": counted})
    write_table(attempts(), asked, tmp_path / "structures.parquet")
    table, provenance = read_table(tmp_path / "structures.parquet")
    assert provenance == asked
    assert metrics_from_table(table, provenance) == metrics_from_table(attempts(), asked)
    assert metrics_from_table(table, provenance)["inputs"]["train"]["left_out"] == {"cif_error": 9}
    # What was written before inputs were counted.
    old = {k: v for k, v in asdict(ASKED).items() if k != "inputs"}
    arrow = pq.read_table(tmp_path / "structures.parquet")
    pq.write_table(arrow.replace_schema_metadata({b"jaxcrystal": json.dumps(old).encode()}), tmp_path / "old.parquet")
    assert read_table(tmp_path / "old.parquet")[1] == ASKED


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 300), (1, 3), (150, 300), (8322, 10_000), (300, 300)])
def test_wilson_equals_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= wilson(k, n)[0] <= k / n <= wilson(k, n)[1] <= 1


def test_the_bootstrap_of_the_median_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=400)
    expected = bootstrap((values,), np.median, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert bootstrap_median(values) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert bootstrap_median(values) == bootstrap_median(values)
    tenth = bootstrap(
        (values,), lambda x: np.percentile(x, 10), n_resamples=4000, method="percentile", rng=1, vectorized=False
    ).confidence_interval
    assert bootstrap_percentile(values, 10) == pytest.approx((tenth.low, tenth.high), abs=0.01)
