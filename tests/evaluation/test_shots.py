"""n-shot figures against a count crystal by crystal; ranks, and parts of the true crystals."""

from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.evaluation import evaluate, summary
from jaxcrystal.evaluation.intervals import BOOTSTRAP_DRAWS, bootstrap_mean, wilson
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.shots import SHOTS, shots
from jaxcrystal.evaluation.table import read_table


def told(table, draws=20):
    numbers, intervals = {}, {}
    with patch("jaxcrystal.evaluation.intervals.BOOTSTRAP_DRAWS", draws):
        for some, of in shots(table):
            numbers, intervals = numbers | some, intervals | of
    return numbers, intervals


def table_of(truths, shuffle=0):
    """A row a prediction: its displacement, or None, of each true crystal's predictions in the order of their rank."""
    rows = [
        {
            "truth_id": f"mp-{i}",
            "rank": rank,
            "truth_displacement": np.nan if found is None else found,
            "structural_valid": rank % 2 == 1,
            "compositional_valid": True,
            "truth_valid": i % 3 != 0,
            "truth_new_formula": i % 2 == 0,
            "truth_lowest": i % 4 == 1,
        }
        for i, predictions in enumerate(truths)
        for rank, found in enumerate(predictions, start=1)
    ]
    order = np.random.default_rng(shuffle).permutation(len(rows))
    return pd.DataFrame([rows[i] for i in order])


PREDICTIONS = st.lists(st.one_of(st.none(), st.floats(0, 0.5)), min_size=1, max_size=22)
TRUTHS = st.lists(PREDICTIONS, min_size=1, max_size=9)


@settings(deadline=None, max_examples=50)
@given(TRUTHS, st.integers(0, 99))
def test_every_number_is_that_of_a_count(truths, shuffle):
    numbers, intervals = told(table_of(truths, shuffle))
    parts = {"": lambda i: True, "new_formulas.": lambda i: i % 2 == 0, "lowest.": lambda i: i % 4 == 1}
    expected = {}
    for part, belongs in parts.items():
        for suffix in ("", "_if_valid") if not part else ("",):
            for n in SHOTS:
                if not any(belongs(i) for i in range(len(truths))) or n > max(map(len, truths)):
                    continue
                found, of = [], 0
                for i, predictions in enumerate(truths):
                    if belongs(i):
                        of += 1
                        good = [
                            x
                            for rank, x in enumerate(predictions[:n], start=1)
                            if x is not None and (not suffix or (rank % 2 == 1 and i % 3 != 0))
                        ]
                        found += [min(good)] if good else []
                expected[f"prediction.{part}match_rate_at_{n}{suffix}"] = len(found) / of
                assert intervals[f"prediction.{part}match_rate_at_{n}{suffix}"] == wilson(len(found), of)
                if found:
                    expected[f"prediction.{part}rmse_at_{n}{suffix}"] = pytest.approx(sum(found) / len(found))
    assert numbers == expected and intervals.keys() == numbers.keys()


@settings(deadline=None, max_examples=50)
@given(TRUTHS, PREDICTIONS, st.integers(0, 8), st.integers(0, 99))
def test_more_predictions_never_find_less_and_rows_may_stand_in_any_order(truths, more, which, shuffle):
    before, intervals = told(table_of(truths))
    again = told(table_of(truths, shuffle))
    assert again == (before, intervals)
    rates = [before[f"prediction.match_rate_at_{n}"] for n in SHOTS if f"prediction.match_rate_at_{n}" in before]
    assert rates == sorted(rates)
    truths[which % len(truths)] = truths[which % len(truths)] + more
    after, _ = told(table_of(truths, shuffle))
    assert all(after[name] >= value for name, value in before.items() if "match_rate" in name)


def test_the_interval_of_rmse_is_the_bootstrap_over_crystals_found():
    numbers, intervals = told(table_of([[0.1, None], [None, 0.3], [0.2, 0.05], [None, None]]), BOOTSTRAP_DRAWS)
    assert numbers["prediction.rmse_at_1"] == pytest.approx(0.15)
    assert intervals["prediction.rmse_at_1"] == bootstrap_mean(np.array([0.1, 0.2]))
    assert sorted(numbers)[0] == "prediction.lowest.match_rate_at_1" and "prediction.lowest.rmse_at_1" not in numbers


def rock_salt(metal, anion="O", edge=4.2):
    lattice = Lattice.from_parameters(edge * 0.7071, edge * 0.7071, edge * 0.7071, 60, 60, 60)
    return Structure(lattice, [metal, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def caesium_chloride(metal, anion="O", edge=2.6):
    return Structure(Lattice.cubic(edge), [metal, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def csv(path, rows, **columns):
    """Rows of an id and a crystal, with more columns."""
    table = pd.DataFrame({"material_id": [i for i, _ in rows], "cif": [str(CifWriter(s)) for _, s in rows]})
    table.assign(**columns).to_csv(path, index=False)
    return path


@pytest.fixture
def truth(tmp_path):
    """MgO as it is and as it is not, CaO, and MnO, of which there is no prediction."""
    rows = [
        ("mp-1", rock_salt("Mg")),
        ("mp-2", caesium_chloride("Mg")),
        ("mp-3", rock_salt("Ca")),
        ("mp-4", rock_salt("Mn")),
    ]
    return csv(tmp_path / "truth.csv", rows, formation_energy_per_atom=[-3.0, -2.9, "", -2.0])


WRONG, RIGHT = caesium_chloride("Mg"), rock_salt("Mg")


def test_by_the_column_rank_or_else_by_rows(truth, tmp_path):
    rows = [("mp-1", WRONG), ("mp-1", RIGHT), ("mp-3", rock_salt("Ca")), ("mp-3", rock_salt("Ca")), ("mp-2", RIGHT)]
    train = csv(tmp_path / "train.csv", [("t", rock_salt("Ca"))], formation_energy_per_atom=[-9.0])
    by_row = evaluate(csv(tmp_path / "a.csv", rows), tmp_path / "a", truth=truth, train=train)
    assert by_row["prediction"]["match_rate"] == 3 / 5 and by_row["prediction"]["match_rate_at_1"] == 1 / 3
    assert by_row["prediction"]["new_formulas"] == {"match_rate_at_1": 0.0}
    assert by_row["prediction"]["lowest"] == {"match_rate_at_1": 0.0}  # mp-1; nothing is known of mp-3
    expected = {"crystals": 3, "new_formulas": 2, "lowest": 1, "fewest_predictions": 1, "most_predictions": 2}
    assert by_row["counts"]["truth"] == expected and "3 true crystals, of 1 to 2 predictions each" in summary(by_row)
    ranked = csv(tmp_path / "b.csv", rows, rank=[7, 3, 1, 2, 1])
    by_rank = evaluate(ranked, tmp_path / "b", truth=truth, train=train)
    assert by_rank["prediction"]["match_rate"] == 3 / 5 and by_rank["prediction"]["match_rate_at_1"] == 2 / 3
    assert by_rank["prediction"]["lowest"]["match_rate_at_1"] == 1.0
    assert "rank" not in by_rank["inputs"]["samples"]["unread"]
    assert by_rank == metrics_from_table(*read_table(tmp_path / "b" / "structures.parquet"))
    alone = evaluate(ranked, tmp_path / "c", truth=truth)["prediction"]
    assert "new_formulas" not in alone and alone["lowest"]["match_rate_at_1"] == 1.0


def test_one_prediction_of_each_is_counted_as_before(truth, tmp_path):
    rows = [("mp-1", WRONG), ("mp-2", WRONG), ("mp-3", rock_salt("Ca", edge=4.8))]
    found = evaluate(csv(tmp_path / "a.csv", rows), tmp_path / "a", truth=truth)["prediction"]
    assert found["match_rate"] == found["match_rate_at_1"] == 2 / 3
    assert found["rmse"] == found["rmse_at_1"] and "match_rate_at_5" not in found


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ([1, 1], r"p\.csv, row 1: another prediction of 'mp-1' has the rank 1 too; give each its own, or remove"),
        ([1, ""], r"p\.csv, row 1: the rank is None; give a number"),
        (["first", 2], r"p\.csv, row 0: the rank is 'first'; give a number"),
    ],
)
def test_ranks_that_say_no_order(truth, tmp_path, rank, message):
    with pytest.raises(UserError, match=message):
        evaluate(csv(tmp_path / "p.csv", [("mp-1", WRONG)] * 2, rank=rank), tmp_path / "a", truth=truth)
