"""How large the cells of a set are, by size of formula unit; kept beside the model that was trained on it."""

import numpy as np
import pytest
from pymatgen.core import Composition
from symmetric_crystals import random_symmetric

from jaxcrystal.crystals import known_formulas, num_atoms
from jaxcrystal.crystals.crystal import Crystal, CrystalBatch
from jaxcrystal.crystals.dataset import load
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.errors import UserError


def test_ranges_are_those_of_pymatgens_formula_units(monkeypatch):
    monkeypatch.setattr(num_atoms, "BLOCK", 100)
    batch = load("prototypes").batch
    expected = {}
    for i in range(len(batch)):
        crystal = batch.crystal(i)
        counts = Composition(crystal.formula)
        assert len(crystal) % counts.num_atoms == 0
        expected.setdefault(int(counts.num_atoms), set()).add(len(crystal))
    assert num_atoms.ranges(batch) == {unit: (min(found), max(found)) for unit, found in sorted(expected.items())}


def test_an_orbit_counts_with_all_its_atoms():
    crystals = [random_symmetric(number, seed, orbits=2) for number in range(1, 231, 7) for seed in range(3)]
    batch = SymmetricBatch.of([[crystal] for crystal in crystals])
    whole = CrystalBatch.from_crystals([crystal.to_crystal() for crystal in crystals])
    assert num_atoms.ranges(batch) == num_atoms.ranges(whole)
    assert (
        known_formulas.found(batch) == known_formulas.found(whole) == sorted({crystal.formula for crystal in crystals})
    )


def test_they_are_read_as_they_were_written(tmp_path):
    def cell(*species):
        coords = np.random.default_rng(0).random((len(species), 3))
        return Crystal(np.full(3, 9.0), np.full(3, 90.0), np.array(species), coords)

    batch = CrystalBatch.from_crystals([cell(1, 1, 8), cell(*[1, 1, 8] * 6), cell(14, 14), cell(14)])
    assert num_atoms.load(tmp_path) == {}
    num_atoms.store(batch, tmp_path)
    assert num_atoms.load(tmp_path) == {1: (1, 2), 3: (3, 18)}
    (tmp_path / num_atoms.FILE).write_text("[1")
    with pytest.raises(UserError, match=r"num_atoms\.json cannot be read"):
        num_atoms.load(tmp_path)
