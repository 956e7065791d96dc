from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.evaluation.intervals import wilson
from jaxcrystal.evaluation.prediction import displacements, prediction


def caesium_chloride(edge=4.12, shift=0.0):
    structure = Structure(Lattice.cubic(edge), ["Cs", "Cl"], [[shift, 0, 0], [0.5, 0.5, 0.5]])
    return Crystal.from_structure(structure)


def test_displacements_are_those_of_a_shift():
    true = caesium_chloride()
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    predicted = [caesium_chloride(4.5), caesium_chloride(shift=0.1), Crystal.from_structure(salt), None]
    found, reasons = displacements(predicted, [true] * 4)
    assert reasons == ["", "", "it is another crystal", "there is no crystal"]
    # Both atoms move by half of 0.1 · 4.12 Å, and (V/N)^⅓ is 4.12 Å/2^⅓.
    assert found[:2] == pytest.approx([0.0, 0.05 * 2 ** (1 / 3)], abs=1e-6) and np.isnan(found[2:]).all()
    bromide = replace(true, species=[55, 35])
    assert displacements([bromide], [true])[1] == ["it has another composition"]
    assert displacements([], [])[0].shape == (0,)
    # Of five atoms one moves by d: d/5 for four of them and 4d/5 for the one, from where they fit best.
    perovskite = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    true = Crystal([3.9] * 3, [90] * 3, [38, 22, 8, 8, 8], perovskite)
    moved = replace(true, frac_coords=[[0, 0, 0], [0.5, 0.5, 0.55], *perovskite[2:]])
    expected = 0.05 * np.sqrt(0.8 / 5) * 5 ** (1 / 3)
    assert displacements([moved], [true])[0] == pytest.approx([expected], abs=1e-6)


def test_the_tolerances_are_cdvaes():
    """Those of uniqueness take none of these: a length a quarter too long, 8° too many, sites moved by 0.31 (V/N)^⅓."""
    true = Crystal([4, 4, 4], [90, 90, 90], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    stretched = Crystal([4, 4, 5.6], [90, 90, 90], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    leaning = Crystal([4, 4, 4], [90, 90, 98], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    moved = Crystal([4, 4, 4], [90, 90, 90], [11, 17], [[0, 0, 0], [0.5, 0.5, 0]])
    assert np.isfinite(displacements([stretched, leaning, moved], [true] * 3)[0]).all()
    further = [
        Crystal([4, 4, 7], [90, 90, 90], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Crystal([4, 4, 4], [90, 90, 105], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    ]
    assert np.isnan(displacements(further, [true] * 2)[0]).all()


def test_matches_are_counted_over_all_and_measured_over_matches():
    table = pd.DataFrame(
        {
            "truth_displacement": [0.1, 0.3, 0.5, 0.2, np.nan],
            "structural_valid": [True, True, False, True, False],
            "compositional_valid": [True, False, True, True, False],
            "truth_valid": [True, True, True, False, True],
        }
    )
    numbers, intervals = prediction(table)
    assert numbers == {
        "prediction.match_rate": 4 / 5,
        "prediction.rmse": pytest.approx(1.1 / 4),
        "prediction.match_rate_if_valid": 1 / 5,
        "prediction.rmse_if_valid": 0.1,
    }
    assert intervals["prediction.match_rate"] == wilson(4, 5)
    assert all(low <= numbers[name] <= high for name, (low, high) in intervals.items())
    numbers, intervals = prediction(table.assign(truth_displacement=np.nan))
    assert numbers == {"prediction.match_rate": 0.0, "prediction.match_rate_if_valid": 0.0}
    assert set(intervals) == set(numbers)
