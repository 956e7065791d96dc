"""Formulas are spelled as pymatgen, and so every training text, spells them."""

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Composition, Element

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.formulas import ELECTRONEGATIVITY, reduced, spelled, unit
from jaxcrystal.errors import UserError


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("NaCl", "NaCl"),
        ("ClNa", "NaCl"),
        ("Na2Cl2", "NaCl"),
        ("Li4Fe4P4O16", "LiFePO4"),
        ("CaN2O6", "Ca(NO3)2"),
        ("O3Ca1C1", "CaCO3"),
        ("LiO", "Li2O2"),
        ("O", "O2"),
        ("Si8", "Si"),
    ],
)
def test_one_spelling(formula, expected):
    assert spelled(formula) == expected == Composition(formula).reduced_formula


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
def test_any_composition_is_spelled_as_pymatgen_does():
    rng = np.random.default_rng()
    for _ in range(500):
        counts = dict(
            zip(rng.choice(ELEMENTS[1:], rng.integers(1, 6), replace=False), rng.integers(1, 7, 5), strict=False)
        )
        formula = "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in counts.items())
        assert spelled(formula) == Composition(formula).reduced_formula, formula
        assert spelled(spelled(formula)) == spelled(formula)


@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
def test_the_table_is_pymatgens():
    theirs = {element.symbol: element.X for element in map(Element, ELEMENTS[1:])}
    assert {symbol: x for symbol, x in theirs.items() if x == x} == ELECTRONEGATIVITY


def test_formulas_of_the_benchmark(shared):
    formulas = pd.read_parquet(shared / "data/mp20/val.parquet", columns=["pretty_formula"])["pretty_formula"]
    assert [formula for formula in formulas if spelled(formula) != formula] == []


def test_counts_are_reduced_and_what_is_no_formula_is_refused():
    assert reduced({"Na": 4, "O": 2}) == {"Na": 2, "O": 1}
    assert [unit(formula) for formula in ("O2", "Li2O2", "Na2Cl2")] == ["O", "LiO", "NaCl"]
    with pytest.raises(UserError, match="the formula 'NaXx' is no chemical element"):
        spelled("NaXx")
