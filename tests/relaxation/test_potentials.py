"""Potentials: the direction trap, the self-check, what is refused."""

import dataclasses
import hashlib
import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.errors import UserError
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.relaxation import potentials
from jaxcrystal.relaxation.m3gnet import M3GNet
from jaxcrystal.relaxation.potentials import Potential, load_potential
from jaxcrystal.relaxation.selfcheck import TOLERANCE, CheckRow, EnergyReference
from jaxcrystal.relaxation.systems import Systems

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


def as_matgl_runs_it(directory: Path, *, at_source: bool = True):
    """The independent reference: matgl's own loader and calculator; messages summed as trained, if not `at_source`."""
    from matgl.apps.pes import Potential
    from matgl.ext.ase import PESCalculator
    from matgl.layers._graph_convolution import M3GNetGraphConv
    from torch import hstack, stack

    def node_update(conv, edge_index, edge_feat, node_feat, rbf, state, num_nodes):
        source, destination = edge_index
        messages = conv.node_update_func(hstack([node_feat[source], node_feat[destination], edge_feat]))
        messages = messages * conv.node_weight_func(rbf)
        return stack([messages[destination == atom].sum(0) for atom in range(num_nodes)])

    model = Potential.load(directory).eval()
    if not at_source:
        for module in model.modules():
            if type(module) is M3GNetGraphConv:
                module.node_update_ = types.MethodType(node_update, module)
    return PESCalculator(model, stress_unit="eV/A3", use_voigt=False)


def distorted() -> list[Structure]:
    """Known structure types of 1 to some 20 atoms, atoms and cell off their places."""
    found = []
    for seed, known in enumerate(embedded()[::300]):
        structure = known.crystal.to_structure()
        structure.apply_strain([0.02, -0.01, 0.01])
        found.append(structure.perturb(0.1, seed=seed))
    assert min(map(len, found)) <= 2 and max(map(len, found)) >= 14
    return found


def assert_same(potential: Potential, calculator, structures, *, energy: float, force: float, stress: float):
    """All structures in one batch, against a calculator of ase: eV/atom, eV/Å, eV/Å³."""
    systems = Systems.of(structures)
    found, _ = potential.single_points(systems)
    for i, structure in enumerate(structures):
        atoms = AseAtomsAdaptor.get_atoms(structure)
        atoms.calc = calculator
        assert found.energies[i] / len(atoms) == pytest.approx(atoms.get_potential_energy() / len(atoms), abs=energy)
        np.testing.assert_allclose(found.forces[systems.system == i], atoms.get_forces(), atol=force)
        np.testing.assert_allclose(found.stresses[i], atoms.get_stress(voigt=False), atol=stress)


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

    plain = as_matgl_runs_it(shared / MP)
    wrong = []
    for structure in crystals():
        atoms = AseAtomsAdaptor.get_atoms(structure)
        atoms.calc = plain
        wrong.append(atoms.get_potential_energy() / len(atoms))
    np.testing.assert_allclose(wrong, SOURCE, atol=1e-3)


@pytest.mark.parametrize("name", [MP, MATPES])
def test_m3gnet_is_matgls_own_pass(shared, name):
    """Our forward pass and matgl's, messages summed where they were trained to be; the one has smooth radial functions,
    the other not. Float32's rounding and no more."""
    calculator = as_matgl_runs_it(shared / name, at_source=False)
    assert_same(load_potential(shared / name), calculator, distorted(), energy=1e-5, force=2e-4, stress=1e-5)


def test_m3gnet_sums_at_the_source_as_matgl_does(random_m3gnet):
    from matgl.apps.pes import Potential as Published

    answer = M3GNet(Published.load(random_m3gnet).eval(), at_source=True)
    potential = Potential.checked(
        name="noise", source="", sha256="", elements=frozenset(), note="", cutoff=5.0, answer=answer
    )
    assert_same(potential, as_matgl_runs_it(random_m3gnet), distorted(), energy=1e-5, force=2e-4, stress=1e-5)


def test_any_other_model_of_matgl_runs_through_its_own_pass(tmp_path, monkeypatch):
    """A TensorNet with weights that were never trained, and so refused, unless the check is taken out."""
    from matgl.apps.pes import Potential as Published
    from matgl.config import DEFAULT_ELEMENTS
    from matgl.models import TensorNet

    Published(TensorNet(element_types=DEFAULT_ELEMENTS, is_intensive=False)).save(tmp_path / "net")
    with pytest.raises(UserError, match="self-check"):
        load_potential(tmp_path / "net")
    monkeypatch.setattr(potentials, "TOLERANCE", 1e9)
    monkeypatch.setattr("jaxcrystal.relaxation.selfcheck.TOLERANCE", 1e9)
    potential = load_potential(tmp_path / "net")
    assert_same(potential, as_matgl_runs_it(tmp_path / "net"), distorted(), energy=1e-5, force=2e-4, stress=1e-5)


def test_matpes_weights_run_as_trained_on_a_scale_of_their_own(shared):
    potential = load_potential(shared / MATPES)
    assert "destination" in potential.note
    assert potential.reference is EnergyReference.OWN
    per_atom = [e / len(s) for e, s in zip(potential.energies(crystals()), crystals(), strict=True)]
    np.testing.assert_allclose(per_atom, MATPES_DESTINATION, atol=1e-3)


def test_weights_that_fit_the_code_run_as_they_are(shared, monkeypatch):
    """Where summing at the source is what agrees with nature, nothing is changed and nothing noted."""
    swapped = lambda model, at_source: M3GNet(model, at_source=not at_source)  # noqa: E731
    swapped.can_run = M3GNet.can_run
    monkeypatch.setattr(potentials, "M3GNet", swapped)
    potential = load_potential(shared / MP)
    assert potential.note == ""
    assert potential.check.worst < TOLERANCE


def test_forces_and_stress_are_derivatives_of_the_energy(shared):
    """Central differences in double precision."""
    potential = load_potential(shared / MP)
    potential.answer.potential.double()
    structure = crystals()[1].get_primitive_structure()
    structure.translate_sites([0], [0.03, 0.02, -0.01])
    systems = Systems.of([structure])
    found, _ = potential.single_points(systems)

    def energy(positions, cell):
        moved = dataclasses.replace(systems, positions=positions, cells=cell[None])
        return potential.single_points(moved)[0].energies[0]

    positions, cell, step = systems.positions, systems.cells[0], 1e-4
    for atom, axis in ((0, 0), (1, 2)):
        shift = np.zeros_like(positions)
        shift[atom, axis] = step
        slope = (energy(positions + shift, cell) - energy(positions - shift, cell)) / (2 * step)
        assert -slope == pytest.approx(found.forces[atom, axis], abs=1e-6)
    for i, j in ((0, 0), (1, 2)):
        strain = np.zeros((3, 3))
        strain[i, j] = strain[j, i] = step if i == j else step / 2
        plus, minus = np.eye(3) + strain, np.eye(3) - strain
        slope = (energy(positions @ plus, cell @ plus) - energy(positions @ minus, cell @ minus)) / (2 * step)
        assert slope / systems.volumes[0] == pytest.approx(found.stresses[0, i, j], abs=1e-6)


def test_chgnet_is_offline_and_on_the_corrected_scale(chgnet, capsys):
    assert chgnet.reference is EnergyReference.MP2020 and not chgnet.check.unchecked
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


def test_chgnet_is_its_own_calculators(chgnet):
    """Our graphs and one backward pass, against the package's graphs and calculator, within float32's rounding."""
    from chgnet.model import CHGNet, CHGNetCalculator

    theirs = CHGNetCalculator(CHGNet.load(use_device="cpu", verbose=False), use_device="cpu")
    assert_same(chgnet, theirs, distorted(), energy=5e-6, force=5e-4, stress=1e-5)


def test_a_spec_loads_the_same_potential(chgnet):
    again = load_potential(chgnet.source, chgnet.device)
    assert again == chgnet
    assert again.energies(crystals()[:1]) == chgnet.energies(crystals()[:1])


def test_a_potential_of_too_few_elements_cannot_be_checked(tmp_path):
    from matgl.apps.pes import Potential as Published
    from matgl.models import M3GNet as Model

    Published(Model(element_types=("Na", "Cl"), is_intensive=False)).save(tmp_path / "salt")
    with pytest.raises(UserError, match=r"salt cannot be checked.* the elements of only 2 of the known crystals"):
        load_potential(tmp_path / "salt")


def test_weights_of_noise_are_refused(random_m3gnet):
    with pytest.raises(UserError, match=r"fails its self-check by more than 0\.15 .*expected .* more of 172 crystals"):
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
    row = CheckRow("NaCl", -3.4, float("nan"))
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


class Runs:
    """Unpickled, it leaves a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["model.pt", "state.pt"])
def test_a_file_that_would_run_code_is_refused_without_torchs_advice(random_m3gnet, tmp_path, name):
    import torch

    torch.save({"weight": Runs(tmp_path / "ran")}, random_m3gnet / name)
    with pytest.raises(
        UserError, match=rf"{name} is not read: it is more than .* would run .*\. Such files do"
    ) as error:
        load_potential(random_m3gnet)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_a_file_names_is_not_made(random_m3gnet, tmp_path):
    """matgl makes an object of whatever class it reads of."""
    import torch

    mark = tmp_path / "ran"
    made = {"@module": "subprocess", "@class": "Popen", "init_args": {"args": ["touch", str(mark)]}}
    content = torch.load(random_m3gnet / "model.pt", weights_only=True)
    torch.save(content | {"model": made}, random_m3gnet / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is not read: .*would run subprocess\.Popen"):
        load_potential(random_m3gnet)
    assert not mark.exists()


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
        "import sys, json, jaxcrystal.evaluation.stability; "
        "print(json.dumps([m for m in ('torch', 'matgl', 'chgnet', 'pymatgen', 'ase', 'scipy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_potentials_compare_by_what_they_are(chgnet):
    assert chgnet != dataclasses.replace(chgnet, sha256="0" * 64)
