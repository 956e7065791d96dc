"""Relaxation: the result against ase's own loop, every way in which it can end, the displacement."""

import dataclasses

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from pymatgen.core import Lattice, Structure

from jaxcrystal.evaluate.potentials import Potential, to_atoms
from jaxcrystal.evaluate.relax import RelaxationStatus, displacement, relax
from jaxcrystal.evaluate.selfcheck import EnergyReference, SelfCheck


def potential(calculator=EMT, elements=("Al", "Cu", "Ni")) -> Potential:
    """ase's effective medium theory: exact, fast, and none of the potentials under test."""
    check = SelfCheck((), (), EnergyReference.OWN)
    return Potential("EMT", "emt", "0" * 64, frozenset(elements), check, "", calculator)


@pytest.fixture
def strained() -> Structure:
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.9), ["Cu"], [[0, 0, 0]])
    structure.apply_strain([0.03, -0.02, 0.01])
    return structure.perturb(0.15, seed=0)


class Fixed(Calculator):
    """Says the same of every crystal."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, energy=0.0, force=0.0, stress=0.0):
        super().__init__()
        self.answer = energy, force, stress

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        energy, force, stress = self.answer
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": np.full((len(atoms), 3), force),
            "stress": np.array([stress] * 3 + [0.0] * 3),
        }


def test_it_ends_where_ases_own_loop_ends(strained):
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE

    atoms = to_atoms(strained)
    atoms.calc = EMT()
    optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
    optimizer.run(fmax=0.02, steps=500)

    result = relax(strained, potential(), fmax=0.02)
    assert result.status is RelaxationStatus.CONVERGED and result.reason == ""
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    assert result.steps == optimizer.nsteps
    np.testing.assert_allclose(result.structure.lattice.matrix, atoms.cell.array, atol=1e-9)
    assert result.volume_change == pytest.approx(atoms.get_volume() / strained.volume - 1)
    assert result.rmsd == pytest.approx(displacement(to_atoms(strained), atoms))


def test_the_threshold_holds_for_forces_and_stress(strained):
    from ase.filters import FrechetCellFilter

    results = {fmax: relax(strained, potential(), fmax=fmax) for fmax in (0.3, 0.01)}
    for fmax, result in results.items():
        # As ase has it, forces are those on coordinates of the start's cell: the filter is laid before the atoms move.
        atoms = to_atoms(strained)
        atoms.calc = EMT()
        cell = FrechetCellFilter(atoms)
        atoms.set_cell(result.structure.lattice.matrix)
        atoms.set_scaled_positions(result.structure.frac_coords)
        assert np.linalg.norm(cell.get_forces(), axis=1).max() == pytest.approx(result.fmax, rel=1e-6)
        # They are f F with the strain F from start to end, so that the atoms' own are at most |F⁻¹| larger.
        inverse = np.linalg.norm(np.linalg.solve(atoms.cell.array, strained.lattice.matrix), 2)
        found = np.linalg.norm(atoms.get_forces(), axis=1).max()
        assert found <= fmax * inverse + 1e-9 and result.fmax <= fmax
    assert results[0.01].steps > results[0.3].steps
    assert results[0.01].energy < results[0.3].energy


def test_steps_that_run_out_are_said(strained):
    result = relax(strained, potential(), fmax=0.01, max_steps=3)
    assert result.status is RelaxationStatus.NOT_CONVERGED
    assert result.steps == 3 and result.fmax > 0.01 and "3 steps" in result.reason
    atoms = to_atoms(result.structure)
    atoms.calc = EMT()
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert relax(strained, potential(), max_steps=0).rmsd == 0


def test_a_crystal_at_rest_is_left_alone():
    rest = relax(Structure(Lattice.cubic(4), ["Al"], [[0, 0, 0]]), potential(Fixed), fmax=0.1)
    assert (rest.status, rest.steps, rest.rmsd, rest.volume_change) == (RelaxationStatus.CONVERGED, 0, 0.0, 0.0)


@pytest.mark.parametrize("answer", [{"energy": np.nan}, {"force": np.nan}, {"stress": np.inf}])
@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_are_divergence(answer):
    result = relax(Structure(Lattice.cubic(4), ["Al"], [[0, 0, 0]]), potential(lambda: Fixed(**answer)))
    assert result.status is RelaxationStatus.DIVERGED and "not finite" in result.reason
    assert result.energy is None and result.structure is None


@pytest.mark.parametrize("stress", [-1.0, 1.0])
def test_a_volume_that_explodes_or_collapses_is_divergence(stress):
    result = relax(Structure(Lattice.cubic(4), ["Al"], [[0, 0, 0]]), potential(lambda: Fixed(stress=stress)))
    assert result.status is RelaxationStatus.DIVERGED and "volume changed by a factor" in result.reason


def test_an_unknown_element_is_named():
    result = relax(Structure(Lattice.cubic(4), ["Al", "Xe"], [[0, 0, 0], [0.5, 0.5, 0.5]]), potential())
    assert result.status is RelaxationStatus.UNKNOWN_ELEMENT and "Xe" in result.reason


def test_an_error_of_the_potential_is_kept_in_words():
    def broken():
        raise RuntimeError("no\nneighbours")

    result = relax(Structure(Lattice.cubic(4), ["Al"], [[0, 0, 0]]), potential(broken))
    assert result.status is RelaxationStatus.FAILED and result.reason == "RuntimeError: no neighbours"


def test_oxidation_states_do_not_matter(strained):
    charged = strained.copy().add_oxidation_state_by_site([1, 2, 0, 1])
    assert relax(charged, potential()).energy == relax(strained, potential()).energy


@pytest.mark.parametrize("crystal", ["coincident", "isolated"])
def test_chgnet_is_not_believed_where_it_has_no_answer(crystal):
    from jaxcrystal.evaluate.potentials import load_potential

    structure = {
        "coincident": Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]]),
        "isolated": Structure(Lattice.cubic(14), ["Na"], [[0, 0, 0]]),
    }[crystal]
    result = relax(structure, load_potential("chgnet"))
    assert result.status is {"coincident": RelaxationStatus.DIVERGED, "isolated": RelaxationStatus.FAILED}[crystal]
    assert result.energy is None and result.reason


def test_displacement_is_of_the_atoms_alone():
    start = Atoms("AlCu", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[4, 4, 4], pbc=True)
    strained = start.copy()
    strained.set_cell([5, 4, 3], scale_atoms=True)
    assert displacement(start, strained) == pytest.approx(0)  # strain of the cell
    shifted = start.copy()
    shifted.translate([1.0, 0.3, 0])
    assert displacement(start, shifted) == pytest.approx(0)  # all atoms alike
    wrapped = start.copy()
    wrapped.positions[0] += [4, 0, -8]
    assert displacement(start, wrapped) == pytest.approx(0)  # whole cells
    moved = start.copy()
    moved.positions[0] += [0.2, 0, 0]
    # Mean shift 0.1 Å taken out: ±0.1 Å for each of two atoms.
    assert displacement(start, moved) == pytest.approx(0.1)


def test_outcomes_are_frozen(strained):
    with pytest.raises(dataclasses.FrozenInstanceError):
        relax(strained, potential()).energy = 0.0
