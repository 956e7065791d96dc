"""What can happen to a run: numbers that are none, signals, damaged checkpoints, another base, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SMALL, losses

from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.fingerprint import fingerprint
from jaxcrystal.model.saved import load_model
from jaxcrystal.train.checkpoint import Checkpoints
from jaxcrystal.train.loop import train


@pytest.fixture
def recipe(files, tmp_path) -> Recipe:
    data = DataConfig(**files, tokens_per_row=384, rows_per_batch=4, validation_rows=4)
    return Recipe(
        out=str(tmp_path / "run"), model=SMALL, data=data, optimizer=OptimizerConfig(3e-3, warmup_steps=3), steps=8,
        checkpoint_every=2, validate_every=4, log_every=2, keep_checkpoints=3, mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip


def steps_saved(out: str) -> list[int]:
    return sorted(int(path.name) for path in (Path(out) / "checkpoints").iterdir())


def forget(out: str, steps: int) -> None:
    """As if the run had been killed before `steps` + 1: later checkpoints are gone."""
    for step in steps_saved(out):
        if step > steps:
            shutil.rmtree(Path(out) / "checkpoints" / str(step))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(folder: Path) -> None:
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:100])


def lose_a_part(folder: Path) -> None:
    shutil.rmtree(folder / "training")


def spoil_the_place(folder: Path) -> None:
    (folder / "place" / "metadata").write_text("{")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lose_a_part, spoil_the_place])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipe, damage, capsys):
    whole = train(recipe)
    expected = losses(recipe.out)
    damage(whole.out / "checkpoints" / "8")
    report = train(recipe)
    assert "checkpoint 8 is damaged" in capsys.readouterr().out
    assert losses(recipe.out) == expected and report.loss == expected[-1]
    told = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    (remark,) = [line for line in told if line["event"] == "damaged"]
    assert remark["step"] == 6 and (report.out / "damaged-checkpoint-8").is_dir()
    assert load_model(recipe.out).step == 8


def test_where_none_is_whole_nothing_is_started_over(recipe):
    train(recipe)
    for step in steps_saved(recipe.out):
        flip_a_bit(Path(recipe.out) / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(8: .*; 6: .*to start over"):
        train(recipe)
    assert len(steps_saved(recipe.out)) == 3


def test_a_checkpoint_of_another_shape_says_what_differs(recipe):
    train(recipe)
    other = replace(recipe, model=replace(SMALL, intermediate_size=96))
    shutil.copy(Path(recipe.out) / "recipe.yaml", Path(recipe.out) / "former.yaml")
    for name in ("recipe.yaml", "model.json", "former.yaml"):
        (Path(recipe.out) / name).unlink()
    shutil.move(Path(recipe.out) / "checkpoints", Path(recipe.out).parent / "checkpoints")
    shutil.rmtree(recipe.out)
    Path(recipe.out).mkdir()
    (Path(recipe.out) / "checkpoints").mkdir()
    shutil.rmtree(recipe.out)
    train(replace(other, steps=2))
    forget(recipe.out, 0)
    shutil.copytree(Path(recipe.out).parent / "checkpoints", Path(recipe.out) / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"down_proj/kernel: \[2, 64, 32\] there, \[2, 96, 32\] here"):
        train(replace(other, steps=2))


def test_a_base_that_changed_is_noticed(recipe, tmp_path):
    train(recipe)
    adapted = replace(recipe, out=str(tmp_path / "adapted"), base=recipe.out, lora=LoraConfig(rank=2))
    train(adapted)
    forget(adapted.out, 4)
    forget(recipe.out, 6)  # the base is now what it was two steps before
    with pytest.raises(UserError, match="belongs to a base of other weights"):
        train(adapted)


def test_the_best_checkpoint_stays(recipe):
    """A learning rate that ruins the model after a good beginning: the best is not among the last."""
    ruin = OptimizerConfig(0.5, warmup_steps=8, clip_norm=1e3)
    report = train(replace(recipe, optimizer=ruin, steps=12, validate_every=2, keep_checkpoints=2))
    told = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["loss"] for line in told if line["event"] == "validation"}
    best = min(validation, key=validation.get)
    assert best < 10 and steps_saved(recipe.out) == [best, 10, 12]


def test_numbers_that_are_none_stop_the_run_before_they_are_saved(recipe):
    """The step and the crystals are named, and what was saved before is whole."""
    recipe = replace(recipe, optimizer=OptimizerConfig(1e30, warmup_steps=0, clip_norm=1e30), log_every=100, steps=40)
    with pytest.raises(
        UserError, match=r"at step \d+ the loss is .*nan.* on the crystals crystal-\d+, .* and \d+ more"
    ):
        train(recipe)
    told = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in told if line["event"] == "no_number"]
    assert len(set(line["crystals"])) == len(line["crystals"]) > 8
    saved = steps_saved(recipe.out)
    assert all(step < line["step"] for step in saved)
    if saved:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(load_model(recipe.out).params)))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(recipe, tmp_path, number, code):
    recipe = replace(recipe, steps=4000, checkpoint_every=4000, validate_every=4000)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_dict(recipe)))
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxcrystal.cli", "train", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while process.poll() is None and len(losses(recipe.out)) < 4:
        time.sleep(0.05)
    process.send_signal(number)
    told, _ = process.communicate()
    assert process.returncode == code and f"on {number.name}; run the same command again" in told
    (step,) = steps_saved(recipe.out)
    assert len(losses(recipe.out)) == step >= 4 and f"after step {step}" in told


def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(recipe, monkeypatch):
    train(recipe)
    forget(recipe.out, 4)

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room and start again"):
        train(recipe)
    monkeypatch.undo()
    assert steps_saved(recipe.out) == [4]
    assert train(recipe).steps == 8


def test_a_set_smaller_than_a_batch_trains(recipe, tmp_path):
    """Rows that are missing are padding."""
    from small import crystal_set

    from jaxcrystal.crystals.dataset import store

    store(crystal_set(2), tmp_path / "two.parquet", {})
    report = train(replace(recipe, data=replace(recipe.data, train=str(tmp_path / "two.parquet"))))
    assert report.steps == 8 and np.isfinite(report.loss)


def test_fingerprints_do_not_depend_on_the_mesh_and_see_every_change():
    rng = np.random.default_rng(0)
    tree = {
        "a": {"kernel": rng.normal(size=(16, 24)).astype(np.float32)},
        "b": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16),
        "c": rng.integers(0, 255, (5,)).astype(np.uint8),
        "step": np.int32(3),
    }
    name = fingerprint(jax.tree.map(jnp.asarray, tree))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for spec in (("fsdp", "tensor"), ("data", None), (None, ("data", "tensor"))):
        place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert fingerprint(tree | {"a": {"kernel": jax.device_put(tree["a"]["kernel"], place)}}) == name
    swapped = tree["a"]["kernel"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fingerprint(tree | {"a": {"kernel": swapped}}) != name
    assert fingerprint(tree | {"b": tree["b"].astype(jnp.float32)}) != name
    assert fingerprint(tree | {"c": tree["c"].reshape(5, 1)}) != name


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 63), st.integers(0, 31))
def test_no_single_bit_escapes(word, bit):
    values = np.arange(64, dtype=np.uint32).view(np.float32)
    changed = values.view(np.uint32).copy()
    changed[word] ^= np.uint32(1) << np.uint32(bit)
    assert fingerprint({"x": jnp.asarray(values)}) != fingerprint({"x": jnp.asarray(changed.view(np.float32))})


def test_keeping_is_told_what_it_keeps(tmp_path):
    with pytest.raises(UserError, match="cannot write checkpoints to /proc"):
        Checkpoints(Path("/proc/nowhere"), 2, None)
