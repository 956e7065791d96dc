"""The descent against ase's FIRE on ase's FrechetCellFilter, step by step, many crystals at once."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from scipy.linalg import expm
from single_points import all_atoms, of_ase

from jaxcrystal.relaxation.fire import Descent
from jaxcrystal.relaxation.systems import Systems

emt = of_ase(EMT)


def crystal(seed: int) -> Atoms:
    """A triclinic crystal of one to nine atoms, far from rest."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    edge = (13.0 * n) ** (1 / 3)
    cell = edge * (np.eye(3) + rng.normal(0, 0.12, (3, 3)))
    atoms = Atoms(rng.choice(["Al", "Cu", "Ni", "Ag"], n), scaled_positions=rng.random((n, 3)), cell=cell, pbc=True)
    atoms.calc = EMT()
    return atoms


def together(crystals: list[Atoms]) -> Systems:
    return Systems(
        np.concatenate([atoms.numbers for atoms in crystals]),
        np.concatenate([atoms.positions for atoms in crystals]),
        np.array([atoms.cell.array for atoms in crystals]),
        np.repeat(np.arange(len(crystals)), [len(atoms) for atoms in crystals]),
    )


def test_forces_and_steps_are_ases():
    """Cells strained by several per cent and rotated by the way: to 1e-8 relative over 25 steps, from then on the
    rounding of two orders of operations is carried along by a descent that multiplies it."""
    theirs = [crystal(seed) for seed in range(6)]
    cells = [FrechetCellFilter(atoms) for atoms in theirs]
    optimizers = [FIRE(cell, logfile=None) for cell in cells]
    ours = Descent.of(together([crystal(seed) for seed in range(6)]))
    for step in range(25):
        forces = ours.forces(emt(ours.systems))
        expected = [cell.get_forces() for cell in cells]
        largest = np.array([np.linalg.norm(found, axis=1).max() for found in expected])
        np.testing.assert_allclose(ours.largest(forces), largest, rtol=1e-8)
        error = np.abs(forces - np.concatenate(expected)).max(axis=1)
        assert (error <= 1e-8 * largest[ours.system]).all(), f"step {step}"
        ours = ours.step(forces)
        for optimizer in optimizers:
            optimizer.step()
        for mine, other in zip(all_atoms(ours.systems), theirs, strict=True):
            np.testing.assert_allclose(mine.positions, other.positions, rtol=0, atol=1e-8)
            np.testing.assert_allclose(mine.cell.array, other.cell.array, rtol=0, atol=1e-8)
    assert (ours.steps == 25).all()
    strains = [atoms.cell.array @ np.linalg.inv(crystal(seed).cell.array) for seed, atoms in enumerate(theirs)]
    assert all(np.abs(strain - np.eye(3)).max() > 0.01 for strain in strains)  # the cells have been put to the test


def test_a_crystal_goes_its_own_way_whoever_comes_and_goes():
    """One that leaves, one that joins on the way: all others move as they do alone."""

    def walk(descent: Descent, steps: int) -> Descent:
        for _ in range(steps):
            descent = descent.step(descent.forces(emt(descent.systems)))
        return descent

    alone = [Descent.of(together([crystal(seed)])) for seed in range(4)]
    group = walk(Descent.join(alone[:3]), 4)
    group = Descent.join([group.select(np.array([True, False, True])), alone[3]])
    group = walk(group, 3)
    expected = [walk(alone[0], 7), walk(alone[2], 7), walk(alone[3], 3)]
    assert group.steps.tolist() == [7, 7, 3]
    for i, own in enumerate(expected):
        mine = group.select(np.arange(3) == i)
        np.testing.assert_allclose(mine.x, own.x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(mine.velocity, own.velocity, rtol=0, atol=1e-12)
        assert (mine.time_step, mine.mixing, mine.downhill) == (own.time_step, own.mixing, own.downhill)


def test_forces_are_slopes_of_the_energy():
    """Central differences along the unstrained positions and the logarithm of the strain, away from the start."""
    descent = Descent.of(together([crystal(3)]))
    for _ in range(5):
        descent = descent.step(descent.forces(emt(descent.systems)))
    n, x, shift = len(descent.x) - 3, descent.x, 1e-5
    forces = descent.forces(emt(descent.systems))

    def energy(at):
        deformation = expm(at[n:] / n)
        (atoms,) = all_atoms(descent.systems)
        atoms.set_cell(descent.start[0] @ deformation.T)
        atoms.positions = at[:n] @ deformation.T
        atoms.calc = EMT()
        return atoms.get_potential_energy()

    for row, axis in ((0, 0), (n - 1, 2), (n, 0), (n + 1, 2), (n + 2, 0)):
        plus, minus = x.copy(), x.copy()
        plus[row, axis] += shift
        minus[row, axis] -= shift
        slope = (energy(plus) - energy(minus)) / (2 * shift)
        assert -slope == pytest.approx(forces[row, axis], rel=1e-4, abs=1e-4)
