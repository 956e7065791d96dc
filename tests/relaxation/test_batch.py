"""Relaxation: the result against ase's own loop, every way in which it can end, the displacement."""

import dataclasses

import numpy as np
import pytest
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from single_points import of_ase, potential

from jaxcrystal.relaxation import batch as relax_module
from jaxcrystal.relaxation.batch import RelaxationSettings, RelaxationStatus, displacement, relax, relax_together
from jaxcrystal.relaxation.potentials import load_potential

to_atoms = AseAtomsAdaptor.get_atoms


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

    result = relax(strained, potential(EMT), fmax=0.02)
    assert result.status is RelaxationStatus.CONVERGED and result.reason == ""
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    assert result.steps == optimizer.nsteps
    np.testing.assert_allclose(result.structure.lattice.matrix, atoms.cell.array, atol=1e-9)
    assert result.volume_change == pytest.approx(atoms.get_volume() / strained.volume - 1)
    assert result.rmsd == pytest.approx(displacement(strained, AseAtomsAdaptor.get_structure(atoms)))


def test_the_threshold_holds_for_forces_and_stress(strained):
    from ase.filters import FrechetCellFilter

    results = {fmax: relax(strained, potential(EMT), fmax=fmax) for fmax in (0.3, 0.01)}
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
    result = relax(strained, potential(EMT), fmax=0.01, max_steps=3)
    assert result.status is RelaxationStatus.NOT_CONVERGED
    assert result.steps == 3 and result.fmax > 0.01 and "3 steps" in result.reason
    atoms = to_atoms(result.structure)
    atoms.calc = EMT()
    assert result.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert relax(strained, potential(EMT), max_steps=0).rmsd == pytest.approx(0, abs=1e-9)


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
    result = relax(Structure(Lattice.cubic(4), ["Al", "Xe"], [[0, 0, 0], [0.5, 0.5, 0.5]]), potential(EMT))
    assert result.status is RelaxationStatus.UNKNOWN_ELEMENT and "Xe" in result.reason


def test_an_error_of_the_potential_is_kept_in_words():
    def broken():
        raise RuntimeError("no\nneighbours")

    result = relax(Structure(Lattice.cubic(4), ["Al"], [[0, 0, 0]]), potential(broken))
    assert result.status is RelaxationStatus.FAILED and result.reason == "RuntimeError: no neighbours"


def test_oxidation_states_do_not_matter(strained):
    charged = strained.copy().add_oxidation_state_by_site([1, 2, 0, 1])
    assert relax(charged, potential(EMT)).energy == relax(strained, potential(EMT)).energy


def test_chgnet_is_not_believed_where_it_has_no_answer():
    coincident = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]])
    result = relax(coincident, load_potential("chgnet"))
    assert result.status is RelaxationStatus.DIVERGED and result.energy is None and result.reason


@pytest.mark.parametrize("name", ["chgnet", "potentials/M3GNet-MP-2021.2.8-PES"])
def test_one_without_an_answer_does_not_touch_the_others(name, request):
    """Coincident atoms have no energy: the crystals beside them in the batch relax as they do alone."""
    known = load_potential(name if name == "chgnet" else request.getfixturevalue("shared") / name)
    salt = Structure(Lattice.cubic(4.3), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.45]])
    coincident = Structure(Lattice.cubic(4.3), ["Cs", "Cl"], [[0, 0, 0], [0, 0, 0]])
    found = dict(filter(None, relax_together([salt, coincident, salt], known)))
    assert found[1].status is RelaxationStatus.DIVERGED and "not finite" in found[1].reason
    alone = relax(salt, known)
    assert alone.converged and alone.steps > 0
    for i in (0, 2):
        assert found[i].steps == alone.steps and found[i].energy == pytest.approx(alone.energy, abs=1e-5)


def test_displacement_is_of_the_atoms_alone():
    coords = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])

    def crystal(moved=0.0, cell=(4, 4, 4)):
        return Structure(Lattice.orthorhombic(*cell), ["Al", "Cu"], coords + moved)

    start = crystal()
    assert displacement(start, crystal(cell=(5, 4, 3))) == pytest.approx(0)  # strain of the cell
    assert displacement(start, crystal([0.25, 0.075, 0])) == pytest.approx(0)  # all atoms alike
    assert displacement(start, crystal([[1, 0, -2], [0, 0, 0]])) == pytest.approx(0)  # whole cells
    # Mean shift 0.1 Å taken out: ±0.1 Å for each of two atoms.
    assert displacement(start, crystal([[0.05, 0, 0], [0, 0, 0]])) == pytest.approx(0.1)


def test_a_crowd_relaxes_as_each_does_alone(strained):
    """Of all sizes, with some that fail: each Relaxation is that of the crystal by itself, and each comes once."""
    unknown = Structure(Lattice.cubic(4), ["Xe"], [[0, 0, 0]])
    crystals = [
        strained,
        unknown,
        *(strained.copy().perturb(0.1, seed=seed) for seed in range(4)),
        strained * (2, 1, 1),
    ]
    found = list(filter(None, relax_together(crystals, potential(EMT), RelaxationSettings(0.02))))
    assert sorted(index for index, _ in found) == list(range(len(crystals)))
    for index, together in found:
        alone = relax(crystals[index], potential(EMT), fmax=0.02)
        assert (together.status, together.reason, together.steps) == (alone.status, alone.reason, alone.steps)
        assert together.energy == (alone.energy and pytest.approx(alone.energy, abs=1e-9))
        if alone.structure is not None:
            assert together.structure.matches(alone.structure)
            assert together.rmsd == pytest.approx(alone.rmsd, abs=1e-9)


def test_the_next_begins_where_one_ends(strained, monkeypatch):
    """A batch is never larger than the potential takes, or than one crystal; and it is full while others wait."""
    sizes = []
    step = relax_module.Batch.step

    def watched(batch):
        sizes.append(batch.atoms)
        return step(batch)

    monkeypatch.setattr(relax_module.Batch, "step", watched)
    monkeypatch.setitem(relax_module_limits(), "cpu", 9)
    crystals = [strained.copy().perturb(0.1, seed=seed) for seed in range(5)] + [strained * (3, 1, 1)]
    said = list(relax_together(crystals, potential(EMT)))
    assert len([x for x in said if x is not None]) == 6
    assert said.count(None) == len(sizes)  # a sign of life after every step
    assert set(sizes) <= {8, 4, 12} and sizes[0] == 8 and 12 in sizes


def relax_module_limits():
    from jaxcrystal.relaxation import potentials

    return potentials.ATOMS_AT_ONCE


def test_one_that_breaks_the_potential_costs_itself(strained):
    """The potential raises for a whole batch because of one crystal, on the way: the others go on."""
    calls = []

    class Fragile(EMT):
        def calculate(self, atoms=None, *args, **kwargs):
            if "Ni" in atoms.symbols:
                calls.append(1)
                if len(calls) > 3:
                    raise RuntimeError("too\nmuch nickel")
            super().calculate(atoms, *args, **kwargs)

    nickel = strained.copy()
    nickel.replace_species({"Cu": "Ni"})
    results = dict(filter(None, relax_together([strained, nickel, strained], potential(Fragile))))
    assert results[1].status is RelaxationStatus.FAILED and results[1].reason == "RuntimeError: too much nickel"
    assert results[1].steps > 0
    assert results[0].converged and results[0].energy == results[2].energy == relax(strained, potential(EMT)).energy


class Greedy(EMT):
    """No memory for more than eight atoms a pass."""

    def calculate(self, atoms=None, *args, **kwargs):
        if len(atoms) > 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        super().calculate(atoms, *args, **kwargs)


def test_where_memory_is_short_fewer_relax_together(strained):
    """A pass of too many is done again in halves, and from then on none of so many is tried."""
    tried = []
    alone = relax(strained, potential(EMT))

    def answer(systems, edges):
        tried.append(len(systems.numbers))
        if len(systems.numbers) > 8:
            raise MemoryError
        return of_ase(EMT)(systems)

    short = dataclasses.replace(potential(EMT), answer=answer)
    found = dict(filter(None, relax_together([strained] * 5, short)))
    assert [found[i].energy for i in range(5)] == pytest.approx([alone.energy] * 5, abs=1e-9)
    assert tried[0] == 20 and tried.count(20) == 1 and max(tried[1:]) <= 12 and tried.count(12) <= 1
    # One alone for which there is none is not the crystal's fault: it is not `failed`, and so is tried again.
    large = relax(strained * (3, 1, 1), potential(Greedy))
    assert large.status is RelaxationStatus.CRASHED and "allocate memory" in large.reason


def test_no_atoms_are_an_outcome():
    result = relax(Structure(Lattice.cubic(4), [], []), potential(EMT))
    assert result.status is RelaxationStatus.FAILED and result.reason == "there are no atoms"


def test_a_crystal_that_takes_too_long_is_given_up(strained):
    slow = RelaxationSettings(fmax=1e-9, max_steps=10**6, timeout=0.2)
    ((_, result),) = filter(None, relax_together([strained], potential(lambda: Fixed(force=1.0)), slow))
    assert result.status is RelaxationStatus.TIMEOUT and "0.2 s" in result.reason and result.energy is None


def test_outcomes_are_frozen(strained):
    with pytest.raises(dataclasses.FrozenInstanceError):
        relax(strained, potential(EMT)).energy = 0.0
