"""The descent against ase's FIRE on ase's FrechetCellFilter, step by step."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from scipy.linalg import expm

from jaxcrystal.evaluate.fire import Fire


def crystal(seed: int) -> Atoms:
    """A triclinic crystal of one to nine atoms, far from rest."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    edge = (13.0 * n) ** (1 / 3)
    cell = edge * (np.eye(3) + rng.normal(0, 0.12, (3, 3)))
    atoms = Atoms(rng.choice(["Al", "Cu", "Ni", "Ag"], n), scaled_positions=rng.random((n, 3)), cell=cell, pbc=True)
    atoms.calc = EMT()
    return atoms


@pytest.mark.parametrize("seed", range(12))
def test_forces_and_steps_are_ases(seed):
    """Cells strained by several per cent and rotated by the way: to 1e-8 relative over 25 steps, from then on the
    rounding of two orders of operations is carried along by a descent that multiplies it."""
    ours, theirs = crystal(seed), crystal(seed)
    descent, cell = Fire(ours), FrechetCellFilter(theirs)
    optimizer = FIRE(cell, logfile=None)
    for step in range(25):
        found, expected = descent.forces(), cell.get_forces()
        largest = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * largest, err_msg=f"step {step}")
        descent.step(found)
        optimizer.step()
        np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-8)
        np.testing.assert_allclose(ours.cell.array, theirs.cell.array, rtol=0, atol=1e-8)
    strain = ours.cell.array @ np.linalg.inv(crystal(seed).cell.array)
    assert np.abs(strain - np.eye(3)).max() > 0.01  # the cell has been put to the test


def test_forces_are_slopes_of_the_energy():
    """Central differences along the unstrained positions and the logarithm of the strain, away from the start."""
    descent = Fire(crystal(3))
    for _ in range(5):
        descent.step(descent.forces())
    n, x = len(descent.atoms), descent._x.copy()
    forces, shift = descent.forces(), 1e-5

    def energy(at):
        atoms = descent.atoms.copy()
        deformation = expm(at[n:] / n)
        atoms.set_cell(descent._cell @ deformation.T)
        atoms.positions = at[:n] @ deformation.T
        atoms.calc = EMT()
        return atoms.get_potential_energy()

    for row, axis in ((0, 0), (n - 1, 2), (n, 0), (n + 1, 2), (n + 2, 0)):
        plus, minus = x.copy(), x.copy()
        plus[row, axis] += shift
        minus[row, axis] -= shift
        slope = (energy(plus) - energy(minus)) / (2 * shift)
        assert -slope == pytest.approx(forces[row, axis], rel=1e-4, abs=1e-4)
