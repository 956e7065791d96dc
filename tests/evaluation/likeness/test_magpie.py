"""Features of compositions by hand, against plain loops over the table, and against matminer where it is installed."""

import json

import numpy as np
import pytest
from pymatgen.core import Composition

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.evaluation.likeness import magpie

COMPOSITIONS = ["NaCl", "Fe2O3", "LiFePO4", "He", "Al2Cu3", "CsPbI3", "XeF2", "LrO", "OgO"]


def atoms(formula):
    return [ATOMIC_NUMBER[str(e)] for e, count in Composition(formula).items() for _ in range(int(count))]


def test_rock_salt_by_hand():
    found = dict(zip(magpie.names(), magpie.features(atoms("NaCl")), strict=True))
    assert len(found) == 132
    assert (found["minimum Number"], found["maximum Number"], found["range Number"]) == (11, 17, 6)
    assert (found["mean Number"], found["avg_dev Number"], found["mode Number"]) == (14, 3, 11)
    assert found["mean Electronegativity"] == pytest.approx((0.93 + 3.16) / 2)
    rust = dict(zip(magpie.names(), magpie.features(atoms("Fe2O3")), strict=True))
    assert (rust["mode Number"], rust["mean Number"]) == (8, pytest.approx(0.4 * 26 + 0.6 * 8))
    assert rust["avg_dev Number"] == pytest.approx(0.4 * (26 - 15.2) + 0.6 * (15.2 - 8))


def test_what_is_unknown_is_average():
    features = magpie.features(atoms("He"))
    unknown = np.isnan(features)
    assert {name.split()[1] for name, gone in zip(magpie.names(), unknown, strict=True) if gone} == {
        "MeltingT",
        "Electronegativity",
    }
    assert (magpie.standardised(features)[unknown] == 0).all() and np.isfinite(magpie.standardised(features)).all()
    assert np.isnan(magpie.features(atoms("Og"))).all()


def test_the_scale_is_cdvaes(shared):
    figures = json.loads((shared / "data/cdvae_composition_scaler.json").read_text())
    mean, deviation = magpie._scale()
    assert (mean.tolist(), deviation.tolist()) == (figures["means"], figures["stds"])


def test_order_and_multiples_of_a_formula_do_not_matter():
    once = magpie.features(atoms("LiFePO4"))
    assert magpie.features(atoms("LiFePO4")[::-1] * 3) == pytest.approx(once)


def test_features_equal_matminers():
    composition = pytest.importorskip(
        "matminer.featurizers.composition", reason="needs matminer, which is not installed: it asks for pandas < 3"
    )
    theirs = composition.ElementProperty.from_preset("magpie", impute_nan=False)
    assert [label.removeprefix("MagpieData ") for label in theirs.feature_labels()] == magpie.names()
    for formula in COMPOSITIONS:
        expected = np.array(theirs.featurize(Composition(formula)), float)
        assert magpie.features(atoms(formula)) == pytest.approx(expected, abs=1e-9, nan_ok=True), formula
