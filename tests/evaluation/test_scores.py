"""How probable a model found the samples stands in the table of attempts, and in the report beside energies."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

import jaxcrystal
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.likelihoods import of_samples
from jaxcrystal.report import plots, report
from jaxcrystal.sampling.attempt import Attempt

STRUCTURES = {
    f"x{edge:g}": Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for edge in (5.5, 5.6, 5.7)
}
SCORES = pd.DataFrame(
    {
        "id": ["x5.7", "none", "x5.5", "other", "x5.6"],
        "row": [2, 3, 0, 9, 1],
        "log_probability": [-57.0, np.nan, -55.0, -1.0, -56.0],
        "log_probability_per_token": [-5.7, np.nan, -5.5, -0.1, -5.6],
    }
)


def samples() -> jaxcrystal.Crystals:
    return jaxcrystal.read({**STRUCTURES, "none": None})


def ledger() -> pd.DataFrame:
    """Two attempts, of which one failed."""
    cif = next(iter(STRUCTURES.values())).to(fmt="cif")
    common = {"seed": 0, "prompt": "", "conditions": "{}", "text": "", "grammar_log_probability": None}
    late = {"formula": None, "space_group": None, "symmetrized_cif": None}
    return pd.DataFrame(
        [
            vars(Attempt(0, 0, status="ok", log_probability=-30.0, tokens=10, cif=cif, **common, **late)),
            vars(Attempt(1, 1, status="truncated", log_probability=-90.0, tokens=45, cif=None, **common, **late)),
        ]
    ).drop(columns="form")


@pytest.mark.parametrize("kind", ["frame", "csv", "parquet"])
def test_scores_are_joined_row_by_row(kind, tmp_path):
    scores = SCORES
    if kind != "frame":
        scores = tmp_path / f"s.{kind}"
        (SCORES.to_csv if kind == "csv" else SCORES.to_parquet)(scores, index=False)
    found = of_samples(samples().source, scores)
    np.testing.assert_array_equal(found["log_probability"], [-55, -56, -57, np.nan])
    np.testing.assert_array_equal(found["log_probability_per_token"], [-5.5, -5.6, -5.7, np.nan])


def test_a_ledger_has_its_own(tmp_path):
    for path in (tmp_path / "l.csv", tmp_path / "l.parquet"):
        (ledger().to_csv if path.suffix == ".csv" else ledger().to_parquet)(path, index=False)
        found = of_samples(jaxcrystal.read(path).source, None)
        assert found.to_numpy().tolist() == [[-30, -3], [-90, -2]]
    assert of_samples(samples().source, None) is None


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("nowhere.csv", "cannot read the scores nowhere.csv: No such file"),
        ("broken.parquet", "cannot read the scores broken.parquet: .*; expected what `jaxcrystal score` wrote"),
        (SCORES.drop(columns="row"), "the table of scores has no column row; expected what `jaxcrystal score` wrote"),
        (SCORES[1:], r"the table of scores has no row 2 \(x5.7\) of .*; score the same samples"),
        (SCORES.assign(id="x"), r"has no row 0 \(x5.5\)"),
    ],
)
def test_what_are_no_scores_of_these_samples_is_refused(scores, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=message) as error:
        jaxcrystal.evaluate(samples(), tmp_path / "out", scores=scores)
    assert "\n" not in str(error.value)


def page_data(out) -> dict:
    text = (out / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S)[1])


def test_the_report_shows_them(tmp_path):
    SCORES.to_csv(tmp_path / "s.csv", index=False)
    found = jaxcrystal.evaluate(samples(), tmp_path / "out", scores=tmp_path / "s.csv")
    assert found.metrics["versions"]["scores"].startswith("s.csv sha256:")
    np.testing.assert_array_equal(found.table["log_probability_per_token"], [-5.5, -5.6, -5.7, np.nan])
    data = page_data(tmp_path / "out")
    at = [heading for heading, *_ in data["columns"]].index("nats/token")
    assert [row[at] for row in data["rows"]] == [5.5, 5.6, 5.7, None]
    assert "nats a token" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")  # there is no energy
    there = results.read(tmp_path / "out")
    placed = there.table.assign(e_above_hull=[0.0, 0.1, 0.3, np.nan])
    drawn = report._histograms(placed, None)
    assert "energy above the hull, eV/atom and nats a token" in drawn
    jaxcrystal.evaluate(samples(), tmp_path / "plain")
    assert "nats/token" not in [heading for heading, *_ in page_data(tmp_path / "plain")["columns"]]


def test_points_lie_where_their_numbers_are():
    drawn = plots.scatter(np.array([0.0, 1.0, 2.0]), np.array([0.0, 4.0, 2.0]), label="x", above="y")
    points = [tuple(map(float, pair)) for pair in re.findall(r"M(\S+) (\S+?)h0", drawn)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=2) and y1 < y2 < y0
    assert y0 - y2 == pytest.approx(y2 - y1, abs=2)
