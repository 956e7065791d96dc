"""Potentials: the direction trap, the self-check, what is refused."""

import dataclasses
import hashlib
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.formation import ElementReferences
from jaxcrystal.evaluate.potentials import _sum_at_destination, load_potential, to_atoms
from jaxcrystal.evaluate.selfcheck import TOLERANCE, CheckRow, EnergyReference

MP, MATPES = "potentials/M3GNet-MP-2021.2.8-PES", "potentials/M3GNet-MatPES-PBE-v2025.1-PES"

#: shared/README.md: eV/atom of conventional cells.
CRYSTALS = {
    "NaCl": ("Fm-3m", 5.69, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "MgO": ("Fm-3m", 4.24, ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "Si": ("Fd-3m", 5.44, ["Si"], [[0, 0, 0]]),
    "Cu": ("Fm-3m", 3.58, ["Cu"], [[0, 0, 0]]),
    "CsCl": ("Pm-3m", 4.15, ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
}
SOURCE = [-1.2995, -2.0846, -5.4186, -4.0903, -0.2949]
DESTINATION = [-3.3675, -5.9553, -5.4186, -4.0903, -3.2720]
MATPES_DESTINATION = [-3.3686, -5.9083, -4.8907, -3.7318, -3.2230]


def crystals() -> list[Structure]:
    return [Structure.from_spacegroup(g, Lattice.cubic(a), s, x) for g, a, s, x in CRYSTALS.values()]


def as_matgl_runs_it(directory: Path):
    """The independent reference: matgl's own loader and calculator, without our doing."""
    from matgl.apps.pes import Potential
    from matgl.ext.ase import PESCalculator

    return PESCalculator(Potential.load(directory).eval(), stress_unit="eV/A3", use_voigt=True)


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet")


@pytest.fixture
def random_m3gnet(tmp_path):
    """A directory in matgl's format, with weights that were never trained."""
    import torch
    from matgl.apps.pes import Potential
    from matgl.config import DEFAULT_ELEMENTS
    from matgl.models import M3GNet

    torch.manual_seed(0)
    Potential(M3GNet(element_types=DEFAULT_ELEMENTS, is_intensive=False)).save(tmp_path / "noise")
    return tmp_path / "noise"


def test_old_weights_are_recognised_and_run_as_trained(shared):
    """The table of shared/README.md, right direction and wrong."""
    potential = load_potential(shared / MP)
    assert "destination" in potential.note
    assert potential.reference is EnergyReference.MP
    per_atom = [e / len(s) for e, s in zip(potential.energies(crystals()), crystals(), strict=True)]
    np.testing.assert_allclose(per_atom, DESTINATION, atol=1e-3)

    # After that, matgl itself still sums as it does: only this one model was given another direction.
    plain = as_matgl_runs_it(shared / MP)
    wrong = []
    for structure in crystals():
        atoms = to_atoms(structure)
        atoms.calc = plain
        wrong.append(atoms.get_potential_energy() / len(atoms))
    np.testing.assert_allclose(wrong, SOURCE, atol=1e-3)


def test_matpes_weights_run_as_trained_on_a_scale_of_their_own(shared):
    potential = load_potential(shared / MATPES)
    assert "destination" in potential.note
    assert potential.reference is EnergyReference.OWN
    per_atom = [e / len(s) for e, s in zip(potential.energies(crystals()), crystals(), strict=True)]
    np.testing.assert_allclose(per_atom, MATPES_DESTINATION, atol=1e-3)


def test_weights_that_fit_the_code_run_as_they_are(shared, monkeypatch):
    """Once the code sums as these weights were trained, nothing is changed and nothing noted."""
    from matgl.layers._graph_convolution import M3GNetGraphConv

    monkeypatch.setattr(M3GNetGraphConv, "node_update_", _sum_at_destination)
    potential = load_potential(shared / MP)
    assert potential.note == ""
    assert potential.check.worst < TOLERANCE


def test_forces_and_stress_are_derivatives_of_the_energy(shared):
    """Central differences, messages summed at the destination; matgl rounds positions to float32, hence the step."""
    calculator = load_potential(shared / MP).calculator()
    calculator.potential.double()
    structure = crystals()[1].get_primitive_structure()
    structure.translate_sites([0], [0.03, 0.02, -0.01])
    atoms = to_atoms(structure)
    atoms.calc = calculator

    def energy(positions, cell):
        moved = atoms.copy()
        moved.set_cell(cell)
        moved.positions = positions
        moved.calc = calculator
        return moved.get_potential_energy()

    step = 1e-3
    for atom, axis in ((0, 0), (1, 2)):
        shift = np.zeros_like(atoms.positions)
        shift[atom, axis] = step
        slope = (
            energy(atoms.positions + shift, atoms.cell.array) - energy(atoms.positions - shift, atoms.cell.array)
        ) / (2 * step)
        assert -slope == pytest.approx(atoms.get_forces()[atom, axis], abs=5e-5)
    for i, j in ((0, 0), (1, 2)):
        strain = np.zeros((3, 3))
        strain[i, j] = strain[j, i] = step if i == j else step / 2
        plus, minus = np.eye(3) + strain, np.eye(3) - strain
        slope = (
            energy(atoms.positions @ plus, atoms.cell.array @ plus)
            - energy(atoms.positions @ minus, atoms.cell.array @ minus)
        ) / (2 * step)
        assert slope / atoms.get_volume() == pytest.approx(atoms.get_stress(voigt=False)[i, j], abs=1e-5)


def test_destination_sum_against_a_loop_over_edges(random_m3gnet):
    import torch
    from matgl.apps.pes import Potential

    conv = Potential.load(random_m3gnet).model.graph_layers[0].conv
    generator = torch.Generator().manual_seed(1)
    edges = torch.tensor([[0, 0, 1, 2, 2], [1, 2, 0, 0, 2]])
    edge_feat, node_feat = torch.rand(5, 64, generator=generator), torch.rand(3, 64, generator=generator)
    rbf = torch.rand(5, 9, generator=generator)
    expected = torch.zeros(3, 64)
    for e, (i, j) in enumerate(edges.T):
        features = torch.cat([node_feat[i], node_feat[j], edge_feat[e]])[None]
        expected[j] += (conv.node_update_func(features) * conv.node_weight_func(rbf[e]))[0]
    found = _sum_at_destination(conv, edges, edge_feat, node_feat, rbf, None, 3)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, conv.node_update_(edges, edge_feat, node_feat, rbf, None, 3))


def test_chgnet_is_offline_and_on_the_corrected_scale(chgnet, capsys):
    assert chgnet.reference is EnergyReference.MP2020
    assert len(chgnet.elements) == 89 and not chgnet.elements & {"Po", "Ra", "Am"}
    import chgnet as package
    import torch

    (weights,) = (Path(package.__file__).parent / "pretrained" / "0.3.0").glob("*.tar")
    assert chgnet.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    torch.set_warn_always(True)  # or torch says it once a process, perhaps before this test
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chgnet.energies(crystals()[:1])
    torch.set_warn_always(False)
    assert capsys.readouterr() == ("", "")


def test_one_backward_pass_gives_what_chgnets_own_calculator_gives(chgnet):
    """Distorted crystals, small cells and large; energy per atom, forces and stress within float32's rounding."""
    from chgnet.model import CHGNet, CHGNetCalculator

    theirs = CHGNetCalculator(CHGNet.load(use_device="cpu", verbose=False), use_device="cpu")
    prototypes = [known.crystal.to_structure() for known in embedded()[::300]]
    assert min(map(len, prototypes)) <= 2 and max(map(len, prototypes)) >= 14
    ours = chgnet.calculator()
    for seed, structure in enumerate(prototypes):
        atoms = to_atoms(structure)
        atoms.rattle(0.1, seed=seed)
        atoms.set_cell(atoms.cell.array * [1.02, 0.99, 1.01], scale_atoms=True)
        found = {}
        for name, calculator in (("ours", ours), ("theirs", theirs)):
            atoms.calc = calculator
            found[name] = atoms.get_potential_energy() / len(atoms), atoms.get_forces(), atoms.get_stress()
        for mine, reference, atol in zip(found["ours"], found["theirs"], (5e-6, 5e-4, 1e-5), strict=True):
            np.testing.assert_allclose(mine, reference, atol=atol, err_msg=structure.formula)


def test_a_spec_loads_the_same_potential(chgnet):
    again = load_potential(chgnet.to_spec())
    assert again == chgnet
    assert again.energies(crystals()[:1]) == chgnet.energies(crystals()[:1])


def test_weights_of_noise_are_refused(random_m3gnet):
    with pytest.raises(UserError, match=r"self-check.*formation energy of AlNi: expected -0\.659, found"):
        load_potential(random_m3gnet)


def test_damaged_weights_are_refused(shared, tmp_path):
    """Numbers that load without complaint, of which one matrix is off by half."""
    import torch

    copy = tmp_path / "damaged"
    shutil.copytree(shared / MP, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    state = torch.load(copy / "state.pt", weights_only=True, map_location="cpu")
    state["model.graph_layers.1.conv.node_weight_func.weight"] *= 1.5
    torch.save(state, copy / "state.pt")
    with pytest.raises(UserError, match="self-check"):
        load_potential(copy)


def test_a_potential_that_returns_no_number_fails_its_check():
    row = CheckRow("NaCl", "energy", -3.4, float("nan"))
    assert row.error == float("inf")


@pytest.mark.parametrize("name", ["model.json", "model.pt", "state.pt"])
def test_a_missing_file_is_named(random_m3gnet, name):
    (random_m3gnet / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        load_potential(random_m3gnet)


@pytest.mark.parametrize("name", ["model.json", "model.pt", "state.pt"])
def test_a_corrupted_file_is_an_error_in_one_line(random_m3gnet, name):
    (random_m3gnet / name).write_bytes(b"\x80garbage")
    with pytest.raises(UserError, match="cannot be read as a matgl potential") as error:
        load_potential(random_m3gnet)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_parameter_is_refused(random_m3gnet):
    import torch

    state = torch.load(random_m3gnet / "state.pt", weights_only=True)
    del state["model.graph_layers.0.conv.node_weight_func.weight"]
    torch.save(state, random_m3gnet / "state.pt")
    with pytest.raises(UserError, match="randomly initialized"):
        load_potential(random_m3gnet)


def test_an_unknown_name_says_what_is_known(tmp_path):
    with pytest.raises(UserError, match="name `chgnet`, or a directory"):
        load_potential(tmp_path / "nowhere")


def test_a_missing_package_names_the_extra(random_m3gnet, monkeypatch):
    monkeypatch.setitem(sys.modules, "matgl.apps.pes", None)
    with pytest.raises(UserError, match=r"jaxcrystal\[evaluate\]"):
        load_potential(random_m3gnet)


def test_an_unknown_element_is_named_with_its_row(chgnet):
    rows = [crystals()[0], Structure(Lattice.cubic(4), ["Po"], [[0, 0, 0]])]
    with pytest.raises(UserError, match=r"row 1, Po1.*does not know Po"):
        chgnet.energies(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chgnet", MP])
def test_formation_energies_of_mp20(shared, name):
    """Single points, corrections, references: 50 rows of MP-20 test against the stated formation energies."""
    potential = load_potential(name if name == "chgnet" else shared / name)
    references = ElementReferences.from_file(shared / "data/hull/mp_elemental_reference_entries.json.gz")
    table = pd.read_parquet(shared / "data/mp20/test.parquet").sample(50, random_state=0)
    structures = [Structure.from_str(cif, fmt="cif") for cif in table["cif"]]
    found = [
        references.formation_energy_per_atom(structure, energy, potential.reference)
        for structure, energy in zip(structures, potential.energies(structures), strict=True)
    ]
    error = np.array(found) - table["formation_energy_per_atom"].to_numpy()
    print(f"{potential.name}: MAE {np.abs(error).mean():.4f}, bias {error.mean():+.4f} eV/atom")
    assert np.abs(error).mean() <= 0.03

    # The other scale would be wrong by far: this is what the self-check's answer decides.
    other = EnergyReference.MP if potential.reference is EnergyReference.MP2020 else EnergyReference.MP2020
    wrong = [
        references.formation_energy_per_atom(structure, energy, other)
        for structure, energy in zip(structures, potential.energies(structures), strict=True)
    ]
    assert np.abs(np.array(wrong) - table["formation_energy_per_atom"].to_numpy()).mean() > 0.15


def test_help_needs_none_of_the_heavy_packages():
    """The modules of the evaluator import neither torch nor matgl, chgnet, pymatgen or ase by themselves."""
    import subprocess

    code = (
        "import sys, json, jaxcrystal.evaluate.stability; "
        "print(json.dumps([m for m in ('torch', 'matgl', 'chgnet', 'pymatgen', 'ase', 'scipy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_potentials_compare_by_what_they_are(chgnet):
    assert chgnet != dataclasses.replace(chgnet, sha256="0" * 64)
