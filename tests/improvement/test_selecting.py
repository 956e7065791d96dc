"""The rule by which a round keeps its crystals: each reason on its own, and laws on tables of any kind."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrystal.config import from_dict
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.metrics import METASTABLE
from jaxcrystal.improvement.recipe import Improvement, Selection
from jaxcrystal.improvement.selection import Verdict, select

SOUND = {
    "outcome": "ok",
    "structural_valid": True,
    "compositional_valid": True,
    "converged": True,
    "spacegroup_relaxed": 225,
    "e_above_hull": 0.02,
    "num_elements": 2,
    "phases_of_system": 4,
    "novel_relaxed": True,
    "group_relaxed": 0,
    "formula": "NaCl",
}
WHOLE = ("spacegroup_relaxed", "num_elements", "phases_of_system", "group_relaxed")


def table(*rows: dict) -> pd.DataFrame:
    """Rows as evaluations have them: sound ones of a group each, but for what is said."""
    found = pd.DataFrame([SOUND | {"group_relaxed": i} | row for i, row in enumerate(rows)])
    return found.astype(dict.fromkeys(WHOLE, "Int64") | {"e_above_hull": "float64"})


def verdict_of(rule: Selection = Selection(), **row) -> Verdict:  # noqa: B008
    (found,) = select(table(row), rule, {})
    return found


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({}, Verdict.KEPT),
        ({"outcome": "truncated", "num_elements": None, "e_above_hull": None}, Verdict.NO_CRYSTAL),
        ({"structural_valid": False, "converged": False}, Verdict.INVALID),
        ({"compositional_valid": False}, Verdict.INVALID),
        ({"converged": False, "e_above_hull": None}, Verdict.NOT_RELAXED),
        ({"spacegroup_relaxed": None}, Verdict.NO_GROUP),
        ({"e_above_hull": None, "phases_of_system": None}, Verdict.UNPLACED),
        ({"num_elements": 1, "formula": "Na"}, Verdict.ELEMENT),
        ({"phases_of_system": 0}, Verdict.FEW_PHASES),
        ({"e_above_hull": -METASTABLE}, Verdict.KEPT),
        ({"e_above_hull": -METASTABLE - 1e-9}, Verdict.TOO_LOW),
        ({"e_above_hull": METASTABLE}, Verdict.KEPT),
        ({"e_above_hull": METASTABLE + 1e-9}, Verdict.TOO_HIGH),
        ({"novel_relaxed": False}, Verdict.KNOWN),
    ],
)
def test_each_reason_alone(row, verdict):
    assert verdict_of(**row) == verdict


def test_every_number_of_the_rule_counts():
    assert verdict_of(Selection(low=0.03), e_above_hull=0.02) == Verdict.TOO_LOW
    assert verdict_of(Selection(high=0.01), e_above_hull=0.02) == Verdict.TOO_HIGH
    assert verdict_of(Selection(phases_of_system=5)) == Verdict.FEW_PHASES
    assert verdict_of(Selection(phases_of_system=0), phases_of_system=0) == Verdict.KEPT
    blind = Selection(by_energy=False)
    assert verdict_of(blind, e_above_hull=3.0, phases_of_system=0) == Verdict.KEPT
    assert verdict_of(blind, e_above_hull=None, phases_of_system=None) == Verdict.KEPT
    assert verdict_of(blind, novel_relaxed=False) == Verdict.KNOWN


def test_the_lowest_of_duplicates_and_of_a_composition_are_kept():
    rows = [{"e_above_hull": energy, "group_relaxed": group} for energy, group in ((0.05, 0), (0.01, 0), (0.03, 1))]
    rows += [{"e_above_hull": 0.02, "group_relaxed": 2}, {"e_above_hull": 0.04, "group_relaxed": 3}]
    found = list(select(table(*rows), Selection(per_composition=2), {}))
    assert found == [Verdict.DUPLICATE, Verdict.KEPT, Verdict.CROWDED, Verdict.KEPT, Verdict.CROWDED]
    found = list(select(table(*rows), Selection(per_composition=2), {"NaCl": 1, "KCl": 5}))
    assert found == [Verdict.DUPLICATE, Verdict.KEPT, Verdict.CROWDED, Verdict.CROWDED, Verdict.CROWDED]


rows = st.fixed_dictionaries(
    {
        "structural_valid": st.booleans(),
        "converged": st.booleans(),
        "e_above_hull": st.one_of(st.none(), st.floats(-0.3, 0.3)),
        "phases_of_system": st.integers(0, 3),
        "novel_relaxed": st.booleans(),
        "group_relaxed": st.integers(0, 5),
        "formula": st.sampled_from(["NaCl", "KCl"]),
    }
)


@given(st.lists(rows, min_size=1, max_size=30), st.integers(1, 3), st.integers(0, 4), st.randoms())
@settings(max_examples=200, deadline=None)
def test_laws(rows, per_composition, there, random):
    """What is kept obeys the rule, each once; what is not could not be added; the order of rows is of no account."""
    rows = [row | {"formula": "NaCl" if row["group_relaxed"] < 3 else "KCl"} for row in rows]  # a group has one formula
    energies = iter(np.random.default_rng(0).permutation(len(rows)) * 1e-9)  # no two are alike
    rows = [row | {"e_above_hull": row["e_above_hull"] and row["e_above_hull"] + next(energies)} for row in rows]
    rule, found = Selection(per_composition=per_composition), table(*rows)
    verdicts = select(found, rule, {"NaCl": there})
    kept = found[verdicts == Verdict.KEPT]
    assert kept["group_relaxed"].is_unique and kept["e_above_hull"].between(rule.low, rule.high).all()
    counts = Counter(kept["formula"]) + Counter({"NaCl": there})
    assert all(counts[formula] <= max(per_composition, there) for formula in counts)
    fit = [
        row["structural_valid"]
        and row["converged"]
        and row["e_above_hull"] is not None
        and rule.low <= row["e_above_hull"] <= rule.high
        and row["phases_of_system"] >= 1
        and row["novel_relaxed"]
        for row in rows
    ]
    for row, verdict, good in zip(rows, verdicts, fit, strict=True):
        assert good == (verdict in (Verdict.KEPT, Verdict.DUPLICATE, Verdict.CROWDED))
        full = counts[row["formula"]] >= per_composition
        assert verdict != Verdict.CROWDED or full
        assert verdict != Verdict.DUPLICATE or row["group_relaxed"] in set(kept["group_relaxed"])
    order = random.sample(range(len(rows)), len(rows))
    again = select(found.iloc[order].reset_index(drop=True), rule, {"NaCl": there})
    assert list(again) == [verdicts[i] for i in order]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"selection": {"low": 0.2}}, "selection.low is 0.2, above high, 0.1"),
        (
            {"selection": {"low": -0.5}},
            "selection.low is -0.5; what lies further than 0.1 below",
        ),
        ({"selection": {"per_compositions": 2}}, "did you mean 'per_composition'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"sampling": {"warmer": -1}}, "sampling.warmer is -1"),
    ],
)
def test_settings_that_make_no_sense(data, words):
    with pytest.raises(UserError, match=words):
        from_dict(Improvement, data, "improve.yaml")
