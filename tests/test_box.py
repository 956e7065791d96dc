"""What ships with the package: the same crystals and hull as where they came from, and names that stand for them."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from symmetric_crystals import random_symmetric

import jaxcrystal
from jaxcrystal import box
from jaxcrystal.config import Recipe, load
from jaxcrystal.crystals import dataset, known_formulas, packed
from jaxcrystal.errors import UserError
from jaxcrystal.hull.sources import known_hull
from jaxcrystal.model.llama import Llama
from jaxcrystal.reader.preparing import prepare
from jaxcrystal.reader.reading import read
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.training.loop import train
from jaxcrystal.weights.export import export
from jaxcrystal.weights.saved import load_model
from jaxcrystal.yardstick import Yardstick


@given(number=st.integers(1, 230), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_a_crystal_is_packed_and_unpacked(number, seed):
    crystal = random_symmetric(number, seed)  # coordinates of four decimals
    again = packed.unpacked(packed.packed(crystal))
    assert [(o.species, o.letter) for o in again.orbits] == [(o.species, o.letter) for o in crystal.orbits]
    before, after = crystal.to_crystal(), again.to_crystal()
    np.testing.assert_array_equal(before.species, after.species)
    away = before.frac_coords - after.frac_coords
    assert np.abs(away - np.round(away)).max() < 1e-7
    assert np.abs(again.parameters - crystal.parameters).max() <= 0.5001e-5


def test_the_files_are_those_that_shipped(tmp_path, monkeypatch):
    assert box.check() == len(box.CRYSTALS | box.HULLS | box.MODELS) == len(box.contents())
    assert all(facts["license"] and facts["citation"] and facts["made_from"] for facts in box.contents().values())
    shutil.copytree(box.FOLDER, tmp_path / "box")
    monkeypatch.setattr(box, "FOLDER", tmp_path / "box")
    with (tmp_path / "box/mp20-val.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"mp20-val\.parquet is not what was shipped .* install jaxcrystal again"):
        box.check()
    (tmp_path / "box/mp20-val.parquet").unlink()
    with pytest.raises(UserError, match=r"mp20-val\.parquet cannot be read: No such file"):
        box.check()
    (tmp_path / "box/mp20.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"mp20\.parquet holds no packed crystals"):
        dataset.load("mp20")
    (tmp_path / "box/box.json").write_text("{")
    with pytest.raises(UserError, match=r"box\.json cannot be read"):
        box.check()


def test_the_model_that_ships(tmp_path):
    """Small, whole, its own fingerprint, its card's figures, and crystals from the first draw on."""
    told, folder = box.contents()["mini"], box.FOLDER / "mini"
    assert told["bytes"] == sum(file.stat().st_size for file in folder.iterdir()) < 14e6
    with safe_open(folder / "model.safetensors", "np") as file:
        weights = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert weights <= 6e6 and f"{weights / 1e6:.2f} million weights" in (folder / "README.md").read_text()
    yardstick = box.yardstick(told["fingerprint"])
    assert yardstick == Yardstick("mini", ("mp20",), "mp20-test", "mp", "chgnet")
    assert box.crystals("mp20") and box.crystals(yardstick.reference) and box.hull(yardstick.hull)
    assert known_formulas.load(folder) == known_formulas.found(dataset.load("mp20").symmetric())
    with jaxcrystal.load("mini") as mini:
        assert mini.fingerprint == told["fingerprint"]
        drawn = mini.sample(40, formula="SrTiO3", seed=0)
    assert drawn.counts == {"ok": 40} and {row.formula for row in drawn} == {"O3SrTi"}
    assert any(row.space_group == 221 for row in drawn)  # the cubic perovskite is among them
    assert sum(file.stat().st_size for file in box.FOLDER.rglob("*") if file.is_file()) < 20e6


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert box.crystals("mp20") == box.FOLDER / "mp20.parquet" and box.crystals("mp21") is None
    (tmp_path / "mp20").mkdir()
    assert box.crystals("mp20") is None
    with pytest.raises(UserError, match="mp20 holds no crystals"):
        read("mp20")


def test_rows_are_read_by_name():
    crystals, rows = dataset.load("mp20-val"), read("mp20-val")
    assert len(crystals) == len(rows.rows) == box.contents()["mp20-val.parquet"]["rows"] > 9000
    assert rows.sha256 == hashlib.sha256((box.FOLDER / "mp20-val.parquet").read_bytes()).hexdigest()
    assert [row.id for row in rows.rows] == list(crystals.ids) and rows.has_ids
    symmetric = crystals.symmetric()
    for i in range(0, len(crystals), 500):
        assert rows.rows[i].crystal == crystals.crystal(i) and rows.rows[i].labels == crystals.attributes(i)
        again = symmetric.crystal(i).to_crystal(niggli=True)
        assert again.formula == crystals.crystal(i).formula
        np.testing.assert_allclose(sorted(again.lengths), sorted(crystals.crystal(i).lengths), rtol=1e-6)
    with pytest.raises(UserError, match=r"mp21 does not exist; give .* mp20, mp20-val, mp20-test, prototypes"):
        read("mp21")


@pytest.mark.parametrize(("name", "part"), [("mp20", "train"), ("mp20-val", "val"), ("mp20-test", "test")])
def test_crystals_are_those_of_mp20(name, part, shared):
    """Labels of all; every fiftieth crystal by pymatgen's matcher (`launch/build_box.py` matched all)."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    table = pd.read_parquet(shared / f"data/mp20/{part}.parquet").set_index("material_id")
    ours = dataset.load(name)
    told = box.contents()[box.CRYSTALS[name]]
    assert len(ours) + len(told["left_out"]) == len(table)
    assert told["left_out"] == {} and list(table.index) == list(ours.ids)
    theirs, labels = table.loc[list(ours.ids)], ours.labels.to_pandas()
    for column in ("formation_energy_per_atom", "band_gap", "e_above_hull", "spacegroup.number"):
        np.testing.assert_array_equal(labels[column].to_numpy(), theirs[column].to_numpy())
    near = {"ltol": 0.01, "stol": 0.05, "angle_tol": 0.5, "scale": False}
    matchers = [StructureMatcher(**near, primitive_cell=primitive) for primitive in (False, True)]
    original = {row.id: row for row in read(shared / f"data/mp20/{part}.parquet").rows}
    for i in range(0, len(ours), 50):
        before, after = original[ours.ids[i]].crystal.to_structure(), ours.crystal(i).to_structure()
        assert any(same.fit(before, after) for same in matchers), ours.ids[i]


def test_cells_are_reduced():
    """As pymatgen reduces them, but for lattices within its tolerance of two."""
    crystals, equal = dataset.load("mp20-val"), []
    for i in range(0, len(crystals), 100):
        structure = crystals.crystal(i).to_structure()
        reduced = structure.get_reduced_structure("niggli").lattice
        equal.append(np.allclose(reduced.parameters, structure.lattice.parameters, rtol=0, atol=1e-4))
        assert np.allclose(sorted(reduced.abc), sorted(structure.lattice.abc), rtol=0, atol=1e-4)
    assert np.mean(equal) > 0.95


def test_the_hull_is_the_one_it_was_made_from(shared):
    """Distances and numbers of competing compounds."""
    folder = shared / "data/hull"
    whole = known_hull([folder / "mp_formation_energies.parquet"], folder / "mp_elemental_reference_entries.json.gz")
    ours = known_hull(["mp"], None)
    assert ours.references.energies == whole.references.energies
    for row in read("mp20-val", limit=300).rows:
        composition = row.crystal.to_structure().composition
        energy = row.labels["formation_energy_per_atom"]
        assert ours.e_above_hull(composition, energy) == pytest.approx(
            whole.e_above_hull(composition, energy), abs=2e-6
        )
        assert ours.competitors(composition) == whole.competitors(composition)


def test_recipes_find_what_is_prepared_from_it(tmp_path, monkeypatch):
    rows = dataset.load("mp20-test")
    few = rows.first(20)
    assert len(few.symmetric()) == 20 and few.crystal(19) == rows.crystal(19) and few.canonical
    assert few.attributes(19) == rows.attributes(19)
    monkeypatch.setattr("jaxcrystal.reader.sources.load", lambda name: few)
    report = prepare(["mp20", "mp20-test"], tmp_path / "data")
    assert [part.part for part in report.parts] == ["train", "test"] and report.parts[1].kept == 20
    assert (tmp_path / "data/train.parquet").exists()
    named = prepare([replace(read("prototypes:validation", limit=4), path=Path("mp20"))], tmp_path / "own")
    assert [part.part for part in named.parts] == ["mp20"]


KEYS = ["data.train=mp20-val", "data.validation=mp20-test", "data.validation_rows=1", "data.tokens_per_row=512"]
KEYS += ["model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1", "mesh.fsdp=1"]
KEYS += ["model.num_attention_heads=2", "model.num_key_value_heads=2", "model.head_dim=16", "mesh.data=1"]
KEYS += ["text.form=symmetry", "tokenizer=compact-symmetry", "augment.translate=false", "data.rows_per_batch=2"]
KEYS += ["augment.infill=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("box") / "run"
    report = train(load(Recipe, None, [*KEYS, f"out={folder}", "steps=2"]))
    assert report.steps == 2 and report.validation_loss is not None
    return folder


def test_it_trains_by_name(run, tmp_path):
    assert (run / "formulas.txt").exists()
    with pytest.raises(UserError, match="the package's own data have one description of each crystal"):
        train(load(Recipe, None, [*KEYS, f"out={tmp_path / 'other'}", "augment.descriptions=true"]))
    with pytest.raises(UserError, match=r"augment\.infill is 0\.1, and a canonical"):
        train(load(Recipe, None, [*KEYS, f"out={tmp_path / 'other'}", "augment.infill=0.1"]))


@pytest.fixture
def boxed(run, tmp_path, monkeypatch):
    """The folder of a box that holds the model `tiny` too."""
    folder = tmp_path / "box"
    shutil.copytree(box.FOLDER, folder)
    export(run, folder / "tiny", "hf", dtype="bfloat16")
    with jaxcrystal.load(folder / "tiny") as sampler:
        own = sampler.fingerprint
    yardstick = {"train": "mp20-val", "reference": "mp20-test", "hull": "mp", "potential": "chgnet"}
    facts = {"fingerprint": own, "yardstick": yardstick, "sha256": box.sha256(folder / "tiny")}
    (folder / "box.json").write_text(json.dumps(box.contents() | {"tiny": facts}))
    monkeypatch.setattr(box, "FOLDER", folder)
    monkeypatch.setattr(box, "MODELS", {"tiny": "tiny"})
    return folder


def test_a_model_is_known_by_name(boxed, tmp_path, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in boxed.rglob("*")}
    samples = tmp_path / "samples.parquet"
    assert sample("tiny", 3, samples, conditions={"pretty_formula": "NaCl"}, seed=1).attempts == 3
    assert sample(boxed / "tiny", 3, samples, conditions={"pretty_formula": "NaCl"}, seed=1).resumed == 3
    with jaxcrystal.load("tiny") as tiny:
        drawn = tiny.sample(3, formula="NaCl", seed=1)
    assert list(drawn.to_pandas()["text"]) == list(pd.read_parquet(samples)["text"])
    tuned = train(load(Recipe, None, [*KEYS, f"out={tmp_path / 'tuned'}", "base=tiny", "steps=1"]))
    assert tuned.steps == 1 and export("tiny", tmp_path / "exported", "hf").tensors > 0
    assert {path: path.stat().st_mtime_ns for path in boxed.rglob("*")} == before  # it may be read-only

    asked = []
    monkeypatch.setattr("jaxcrystal.evaluation.evaluation.evaluate", lambda samples, out, **how: asked.append(how))
    monkeypatch.setattr("jaxcrystal.report.report.write", lambda out: None)
    monkeypatch.setattr(jaxcrystal.Evaluation, "read", lambda *folder: None)
    capsys.readouterr()
    for one in (samples, drawn, drawn[:1]):
        jaxcrystal.evaluate(one)
        note = "drawn by tiny: judged by train mp20-val, potential chgnet, hull mp; reference mp20-test adds coverage"
        assert note in capsys.readouterr().err
    jaxcrystal.evaluate(drawn, reference="mp20-test")
    jaxcrystal.evaluate(list(drawn.crystals))
    assert "drawn by" not in capsys.readouterr().err
    theirs = [(how["train"], how["potential"], [str(path) for path in how["hull"]]) for how in asked]
    assert theirs == [("mp20-val", "chgnet", ["mp"])] * 3 + [(None, None, [])] * 2


def test_a_model_opens_with_transformers(boxed, run):
    """Logits within 1e-4 of ours, both from bfloat16's weights, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(boxed / "tiny", dtype=torch.float32)
    ours = load_model(boxed / "tiny")
    tokens = np.random.default_rng(0).integers(5, ours.tokenizer.vocab_size, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    variables = jax.tree.map(lambda x: x.astype("float32"), ours.variables)
    found, _ = Llama(ours.config).apply(variables, tokens, np.broadcast_to(np.arange(40), (2, 40)))
    pieces = ours.tokenizer.vocab_size
    np.testing.assert_allclose(found[..., :pieces], expected[..., :pieces], atol=1e-4)


def test_models_that_are_not_there_or_not_whole(boxed, tmp_path):
    with pytest.raises(UserError, match=r"maxi is not a model directory: .*, and tiny comes with the package$"):
        jaxcrystal.load("maxi")
    whole = (boxed / "tiny/model.safetensors").read_bytes()
    (boxed / "tiny/model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for use in (lambda: jaxcrystal.load("tiny"), lambda: sample("tiny", 1, tmp_path / "s.parquet"), box.check):
        with pytest.raises(UserError, match=r"tiny is not what was shipped \(sha256 .*\); install jaxcrystal again$"):
            use()
    shutil.rmtree(boxed / "tiny")
    with pytest.raises(UserError, match=r"tiny cannot be read: No such file or directory; install jaxcrystal again$"):
        jaxcrystal.load("tiny")
