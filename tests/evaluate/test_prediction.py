import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.evaluate.intervals import wilson
from jaxcrystal.evaluate.prediction import compare


def caesium_chloride(edge=4.12, shift=0.0):
    structure = Structure(Lattice.cubic(edge), ["Cs", "Cl"], [[shift, 0, 0], [0.5, 0.5, 0.5]])
    return Crystal.from_structure(structure)


def test_matches_are_counted_over_all_and_measured_over_matches():
    true = caesium_chloride()
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    predicted = [caesium_chloride(4.5), caesium_chloride(shift=0.1), Crystal.from_structure(salt), None]
    found = compare(predicted, [true] * 4)
    assert found.match_rate == 2 / 4 and found.match_rate_95 == wilson(2, 4)
    # Both atoms move by half of 0.1 · 4.12 Å, and (V/N)^⅓ is 4.12 Å/2^⅓.
    assert found.displacements[:2] == pytest.approx([0.0, 0.05 * 2 ** (1 / 3)], abs=1e-6)
    assert np.isnan(found.displacements[2:]).all()
    assert found.rmse == pytest.approx(0.025 * 2 ** (1 / 3), abs=1e-6) and found.rmse_95[0] <= found.rmse


def test_without_a_match_there_is_no_displacement():
    found = compare([None], [caesium_chloride()])
    assert (found.match_rate, found.rmse, found.rmse_95) == (0.0, None, None)
