"""The functions of the package: light to import, never shadowed, and the same work from memory as from files."""

import inspect
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from chgnet.model import CHGNet
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

import jaxcrystal
from jaxcrystal.config import Recipe, load, to_dict
from jaxcrystal.crystals.dataset import load as load_data
from jaxcrystal.errors import UserError


def rock_salt(cation, anion, edge):
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


SALT, MAGNESIA = rock_salt("Na", "Cl", 5.69), rock_salt("Mg", "O", 4.24)
CLOSE = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.05, 0, 0]])
NAMES = [name for name in jaxcrystal.__all__ if inspect.isfunction(getattr(jaxcrystal, name))]


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    """Fingerprints of references are not left in the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_to_import_the_package_costs_nothing():
    heavy = {"jax", "flax", "numpy", "pandas", "torch", "matgl", "chgnet", "pymatgen", "ase", "spglib", "pyarrow"}
    found = run("import sys, jaxcrystal; jaxcrystal.evaluate, jaxcrystal.UserError; print(*sys.modules)").split()
    assert "jaxcrystal.interface.functions" in found and not heavy & set(found)


def test_no_module_shadows_a_function(tmp_path):
    """Importing jaxcrystal.x sets the attribute x of the package: all are imported, then every function is called."""
    script = f"""
import pkgutil, jaxcrystal
from jaxcrystal.errors import UserError
for module in pkgutil.walk_packages(jaxcrystal.__path__, "jaxcrystal."):
    __import__(module.name)
others = {{"prepare": ["out"], "evaluate": ["out"], "templates": [1]}}
for name in {NAMES}:
    try:
        getattr(jaxcrystal, name)("nowhere.yaml", *others.get(name, []))
    except UserError as error:
        print(name, error)
"""
    refused = run(f"import os; os.chdir({str(tmp_path)!r})\n{script}").splitlines()
    assert (
        sorted(NAMES)
        == [line.split()[0] for line in refused]
        == ["evaluate", "load", "prepare", "read", "relax", "templates", "train"]
    )
    assert all("nowhere.yaml" in line for line in refused)


def test_every_name_is_there_and_explained():
    assert set(jaxcrystal.__all__) <= set(dir(jaxcrystal))
    for name in jaxcrystal.__all__:
        assert inspect.getdoc(getattr(jaxcrystal, name))
    for name in NAMES:
        signature = inspect.signature(getattr(jaxcrystal, name))
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert (Path(jaxcrystal.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'dream'"):
        _ = jaxcrystal.dream


def test_the_command_lines_defaults_are_the_functions(monkeypatch):
    """But where the work is done: a command takes all cores, a function the calling process."""
    from jaxcrystal.cli import _parser

    for typed in (["evaluate", "x", "--out", "y"], ["prepare", "x", "--out", "y"]):
        args = vars(_parser().parse_args(typed))
        for name, parameter in inspect.signature(getattr(jaxcrystal, typed[0])).parameters.items():
            if name in args and name not in ("out", "samples", "inputs", "workers"):
                default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                assert args[name] == default, name


@pytest.fixture
def samples():
    return [SALT, MAGNESIA, SALT.get_primitive_structure(), CLOSE, None]


def test_an_evaluation_from_memory_is_that_of_the_files(samples, tmp_path):
    def file(structures, name):
        cifs = [s and str(CifWriter(s, significant_figures=16)) for s in structures]
        pd.DataFrame({"cif": cifs}).to_parquet(tmp_path / name)
        return tmp_path / name

    files = {"samples": file(samples, "s.parquet"), "train": file([SALT], "t.parquet")}
    files["reference"] = file([MAGNESIA, SALT], "r.parquet")
    of_files = jaxcrystal.evaluate(**files, out=tmp_path / "a")
    table = pd.DataFrame({"structure": [MAGNESIA, SALT]})
    of_memory = jaxcrystal.evaluate(samples, tmp_path / "b", train=jaxcrystal.read(SALT), reference=table)
    numbers = [
        {k: v for k, v in dict(e.metrics).items() if k not in ("versions", "inputs")} for e in (of_files, of_memory)
    ]
    assert numbers[0] == numbers[1] and numbers[0]["novelty"]["by_matching"] == 1 / 5
    written = ["cif", "reason"]  # by pymatgen, and by us; "no CIF" is "no structure" here
    pd.testing.assert_frame_equal(of_files.table.drop(columns=written), of_memory.table.drop(columns=written))
    assert of_memory.metrics["versions"]["samples"].startswith("samples sha256:")
    assert of_memory.metrics["versions"]["train"].startswith("crystals sha256:")
    assert of_memory.reference["num_atoms"].tolist() == [8, 8]


def test_an_evaluation_is_opened_kept_and_shown(samples, tmp_path):
    found = jaxcrystal.evaluate(samples, limit=4, protocol="strict")
    folder = found.out
    assert found.metrics["counts"]["attempts"] == len(found.table) == 4 and found.metrics["protocol"] == "strict"
    page = found.report.read_bytes()
    assert str(found).startswith("4 attempts, protocol strict\n") and "validity.both" in str(found)
    shown = found._repr_html_()
    assert "Valid structure" in shown and "75.0 %" in shown and "save(FOLDER) keeps it" in shown
    kept = found.save(tmp_path / "kept")
    assert kept.report.read_bytes() == page and "keeps it" not in kept._repr_html_()
    with pytest.raises(UserError, match=r"cannot save to .*kept"):
        found.save(tmp_path / "kept")
    del found
    assert not folder.exists()  # what is temporary goes with its object
    again = jaxcrystal.Evaluation.read(tmp_path / "kept")
    assert again.metrics == kept.metrics and again.table.equals(kept.table) and again.reference is None
    with pytest.raises(UserError, match=r"metrics\.json"):
        jaxcrystal.Evaluation.read(tmp_path)


def test_workers_may_be_none_some_or_a_cluster(samples, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxcrystal.evaluation.evaluation.evaluate", lambda *_, workers, **__: seen.append(workers))
    monkeypatch.setattr("jaxcrystal.report.report.write", lambda folder: None)
    monkeypatch.setattr("jaxcrystal.interface.evaluation.Evaluation.read", lambda folder, kept: None)
    for workers in (0, 3):
        jaxcrystal.evaluate("s.csv", tmp_path, workers=workers)
    assert seen[0] is None and seen[1].slots == 3
    with pytest.raises(UserError, match="no dask scheduler answers at tcp:"):
        monkeypatch.setattr("jaxcrystal.workers.CONNECT", 1)
        jaxcrystal.evaluate("s.csv", tmp_path, workers="tcp://127.0.0.1:1")
    with pytest.raises(UserError, match="-1 workers"):
        jaxcrystal.read(samples, workers=-1)


def test_a_hull_comes_from_files_or_tables(tmp_path, monkeypatch):
    seen = []

    def evaluate(samples, out, *, hull, **options):
        seen.append([str(path) if "nowhere" in str(path) else pd.read_parquet(path) for path in hull])

    monkeypatch.setattr("jaxcrystal.evaluation.evaluation.evaluate", evaluate)
    monkeypatch.setattr("jaxcrystal.report.report.write", lambda folder: None)
    monkeypatch.setattr("jaxcrystal.interface.evaluation.Evaluation.read", lambda folder, kept: None)
    energies = pd.DataFrame({"formula": ["NaCl"], "formation_energy_per_atom": [-2.1]})
    for hull in ("nowhere.parquet", ["nowhere.parquet", energies], energies, jaxcrystal.read([SALT])):
        jaxcrystal.evaluate("s.csv", tmp_path, potential="chgnet", hull=hull)
    assert seen[0] == ["nowhere.parquet"] and seen[1][0] == "nowhere.parquet" and seen[1][1].equals(energies)
    assert seen[2][0].equals(energies) and seen[3][0]["cif"][0].startswith("data_")
    jaxcrystal.evaluate("s.csv", tmp_path)
    assert seen[4] == []


def test_a_data_set_from_memory_is_that_of_the_files(tmp_path):
    energies = pd.DataFrame({"cif": [str(CifWriter(SALT))], "material_id": ["mp-1"], "band_gap": [5.0]})
    energies.to_csv(tmp_path / "train.csv", index=False)
    jaxcrystal.prepare(tmp_path / "train.csv", tmp_path / "a")
    report = jaxcrystal.prepare({"train": energies, "test": [MAGNESIA, None]}, tmp_path / "b")
    assert [(part.part, part.read, part.kept) for part in report.parts] == [("train", 1, 1), ("test", 2, 1)]
    one, other = (load_data(tmp_path / folder / "train.parquet") for folder in "ab")
    assert one.ids == other.ids == ("mp-1",) and one.crystal(0) == other.crystal(0)
    assert one.attributes(0) == other.attributes(0) and one.attributes(0)["band_gap"] == 5.0
    energies.to_parquet(tmp_path / "more.parquet")
    several = [tmp_path / "train.csv", str(tmp_path / "more.parquet")]
    assert [p.part for p in jaxcrystal.prepare(several, tmp_path / "c").parts] == ["train", "more"]
    assert [p.part for p in jaxcrystal.prepare({"mine": several[0]}, tmp_path / "c").parts] == ["mine"]
    (part,) = jaxcrystal.prepare(jaxcrystal.read([SALT, SALT * (2, 2, 2)]), tmp_path / "d", niggli=False).parts
    assert (part.part, part.left_out) == ("crystals", {"too_many_atoms": 1})
    assert len(load_data(tmp_path / "d" / "crystals.parquet").crystal(0)) == 8
    (part,) = jaxcrystal.prepare([SALT * (2, 2, 2)], tmp_path / "e", max_atoms=None).parts
    assert part.kept == 1


def test_a_recipe_is_a_file_an_object_or_keys(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxcrystal.training.loop.train", seen.append)
    keys = {"out": "x", "optimizer": {"learning_rate": 1e-5}, "epochs": None, "steps": 5, "data": {"train": "t"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    expected = load(Recipe, path)
    changes = {"optimizer.learning_rate": 0.5, "out": Path("y"), "mesh": {"fsdp": 2}, "augment.attributes": []}
    changed = load(Recipe, path, ["optimizer.learning_rate=0.5", "out=y", "mesh={fsdp: 2}", "augment.attributes=[]"])
    for recipe in (path, str(path), keys, expected, to_dict(expected)):
        jaxcrystal.train(recipe)
        jaxcrystal.train(recipe, changes)
        jaxcrystal.train(recipe, ["optimizer.learning_rate=0.5", "out=y", "mesh.fsdp=2", "augment.attributes=[]"])
        assert seen == [expected, changed, changed] and expected != changed
        seen.clear()
    with pytest.raises(UserError, match="stepps is no key of Recipe; did you mean 'steps'"):
        jaxcrystal.train({"stepps": 3})


@pytest.mark.slow
def test_crystals_relax_from_memory(tmp_path):
    alloy = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    stretched = SALT.get_primitive_structure().apply_strain(0.03)
    found = jaxcrystal.relax({"alloy": alloy, "salt": stretched}, fmax=0.2, store=tmp_path / "store")
    assert found.outcomes == ["disordered", "converged"] and found.potential.startswith("CHGNet")
    row = found["salt"]
    assert row.structure.volume < stretched.volume and row.fmax <= 0.2 and row.volume_change < 0
    theirs = CHGNet.load(verbose=False).predict_structure(row.structure)["e"]
    assert row.energy_per_atom == pytest.approx(theirs, abs=1e-5) and row.energy == 2 * row.energy_per_atom
    kept = (tmp_path / "store" / "relaxations.jsonl").read_text()
    again = jaxcrystal.relax({"salt": stretched}, fmax=0.2, store=tmp_path / "store")
    assert again.energies == [row.energy] and (tmp_path / "store" / "relaxations.jsonl").read_text() == kept
    assert jaxcrystal.relax(stretched, max_steps=1, fmax=0.001).outcomes == ["not_converged"]
    with pytest.raises(UserError, match="fmax and timeout must be positive"):
        jaxcrystal.relax(stretched, timeout=0)


def test_every_option_of_an_evaluation_arrives(tmp_path, monkeypatch):
    """The function that does the work has the same options, but for where its work is done and what the hull is."""
    from jaxcrystal.evaluation import evaluation

    seen = []
    parameters = inspect.signature(evaluation.evaluate).parameters
    monkeypatch.setattr(evaluation, "evaluate", lambda samples, out, **options: seen.append(options))
    monkeypatch.setattr("jaxcrystal.report.report.write", lambda folder: None)
    monkeypatch.setattr("jaxcrystal.interface.evaluation.Evaluation.read", lambda folder, kept: None)
    assert set(list(parameters)[2:]) == set(list(inspect.signature(jaxcrystal.evaluate).parameters)[2:])
    given = {"train": "t", "nearest": True, "truth": "u", "reference": "r", "protocol": "strict", "cutoffs": "c"}
    given |= {"potential": "p", "hull_labels": "single-point", "fmax": 0.5, "max_steps": 3, "limit": 4}
    jaxcrystal.evaluate("s", tmp_path)
    for name, value in given.items():
        jaxcrystal.evaluate("s", tmp_path, **{name: value})
        assert {k: v for k, v in seen[-1].items() if v != seen[0][k]} == {name: value}
    jaxcrystal.evaluate("s", tmp_path, hull=["h", Path("i")], references="e")
    assert seen[-1]["hull"] == [Path("h"), Path("i")] and seen[-1]["references"] == Path("e")
