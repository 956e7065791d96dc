"""The numbers against a count by hand and scipy; what was not asked for is absent."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, bootstrap

from jaxcrystal.evaluation.intervals import bootstrap_median, bootstrap_percentile, wilson
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.table import Provenance, read_table, write_table

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
        "outcomes": {"cell_error": 1, "ok": 6, "truncated": 1},
        "novel": 4,
        "relaxed": 4,
        "converged": 3,
        "relaxations": {"converged": 3, "diverged": 1, "invalid": 1, "no_crystal": 2, "not_converged": 1},
        "metastable": 3,
        "stable": 2,
    }
    assert metrics["validity"] == {"structural": 5 / 8, "compositional": 5 / 8, "both": 4 / 8}
    assert metrics["uniqueness"] == {"rate": 4 / 8}
    assert metrics["novelty"] == {"by_matching": 4 / 8}
    assert metrics["sun"] == {"rate": 1 / 8, "metastable_rate": 1 / 8}
    stability = metrics["stability"]
    assert (stability["potential"], stability["hull"]) == ("a potential", "a hull")
    assert (stability["metastable_rate"], stability["stable_rate"]) == (3 / 8, 2 / 8)
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
    assert metrics["sun"] == {"rate": 1 / 14, "metastable_rate": 2 / 14}
    assert metrics["confidence_95"]["sun.rate"] == list(wilson(1, 14))
    assert metrics["confidence_95"]["sun.metastable_rate"] == list(wilson(2, 14))


def test_what_was_not_asked_for_is_absent():
    bare = attempts().drop(columns=["novel", "relaxation", "converged", "energy_per_atom", "e_above_hull", "rmsd"])
    metrics = metrics_from_table(bare, Provenance("cdvae", {}))
    assert set(metrics) == {"protocol", "counts", "validity", "uniqueness", "confidence_95", "versions"}
    relaxed = metrics_from_table(attempts().drop(columns=["novel", "e_above_hull"]), Provenance("cdvae", {}, "chgnet"))
    assert set(relaxed["stability"]) == {"potential", "relaxation_rmsd"} and "sun" not in relaxed
    none = attempts().assign(e_above_hull=np.nan, rmsd=np.nan)
    assert set(metrics_from_table(none, ASKED)["stability"]) == {"potential", "hull", "metastable_rate", "stable_rate"}


def test_the_page_names_every_number():
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    asked = attempts().assign(truth_displacement=0.1, truth_valid=True, drawn=True, no_fingerprint_because="")
    for kind in ("structure", "composition"):
        asked = asked.assign(**{f"{side}_{kind}_distance": 0.2 for side in ("train", "reference", "generated")})
        asked[f"mean_{kind}_distance"] = 0.3
    asked = asked.assign(density=5.0, num_elements=2)
    metrics = metrics_from_table(asked, replace(ASKED, protocol="crystal-text-llm", cutoffs="mp_20"), asked)
    sections = {"validity", "uniqueness", "novelty", "coverage", "distribution", "diversity"}
    assert {name.split(".")[0] for name in metrics["confidence_95"]} == sections | {"prediction", "stability", "sun"}
    for name in metrics["confidence_95"]:
        assert f"`{re.sub('_of_all|_of_constructed|_if_valid', '', name)}`" in page, name


def test_every_interval_belongs_to_a_number():
    metrics = metrics_from_table(attempts(), ASKED)
    for name, (low, high) in metrics["confidence_95"].items():
        value = metrics
        for part in name.split("."):
            value = value[part]
        assert low <= value <= high, name


def test_the_stored_table_gives_the_same_numbers(tmp_path):
    write_table(attempts(), ASKED, tmp_path / "structures.parquet")
    table, provenance = read_table(tmp_path / "structures.parquet")
    assert provenance == ASKED
    assert metrics_from_table(table, provenance) == metrics_from_table(attempts(), ASKED)


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
