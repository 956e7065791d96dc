"""What can happen to a run: numbers that are none, signals, damaged checkpoints, another base, a full disk."""

import contextlib
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
import optax
import orbax.checkpoint as ocp
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SMALL, crystal_set, losses

from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, to_dict
from jaxcrystal.crystals.dataset import store
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.training import loop, packing
from jaxcrystal.training.checkpoint import Checkpoints
from jaxcrystal.training.loop import train
from jaxcrystal.weights.fingerprint import fingerprint
from jaxcrystal.weights.saved import load_model


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Recipe:
    """A run of eight steps that is done."""
    data = DataConfig(**files, tokens_per_row=384, rows_per_batch=4, validation_rows=4)
    recipe = Recipe(
        out=str(tmp_path_factory.mktemp("finished") / "run"), model=SMALL, data=data,
        optimizer=OptimizerConfig(3e-3, warmup_steps=3), steps=8, checkpoint_every=2, validate_every=4, log_every=2,
        keep_checkpoints=3, mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip
    train(recipe)
    return recipe


@pytest.fixture
def recipe(finished, tmp_path) -> Recipe:
    """The same recipe, not yet run."""
    return replace(finished, out=str(tmp_path / "run"))


@pytest.fixture
def run(finished, recipe) -> Recipe:
    """A copy of the run that is done, to do something to."""
    shutil.copytree(finished.out, recipe.out)
    return recipe


def steps_saved(out: str) -> list[int]:
    """Steps that have a checkpoint; what was not written to its end bears another name."""
    return sorted(int(path.name) for path in (Path(out) / "checkpoints").iterdir() if path.name.isdecimal())


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


def journal(out: str, event: str) -> list[dict]:
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lose_a_part, spoil_the_place])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, damage, capsys):
    expected = losses(run.out)
    damage(Path(run.out) / "checkpoints" / "8")
    report = train(run)
    assert "checkpoint 8 is damaged" in capsys.readouterr().out
    assert losses(run.out) == expected and report.loss == expected[-1]
    (remark,) = journal(run.out, "damaged")
    assert remark["step"] == 6 and (report.out / "damaged-checkpoint-8").is_dir()
    assert load_model(run.out).step == 8


def test_where_none_is_whole_nothing_is_started_over(run):
    for step in steps_saved(run.out):
        flip_a_bit(Path(run.out) / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(8: .*; 6: .*to start over"):
        train(run)
    assert len(steps_saved(run.out)) == 3


def test_what_a_kill_left_of_a_checkpoint_is_no_checkpoint_and_goes(run):
    checkpoints = Path(run.out) / "checkpoints"
    forget(run.out, 6)
    partial = checkpoints / "8.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / "6", partial)
    expected = losses(run.out)
    assert train(run).steps == 8 and losses(run.out) == expected
    assert steps_saved(run.out) == [4, 6, 8] and not journal(run.out, "damaged")


def test_a_checkpoint_of_another_shape_says_what_differs(run, tmp_path):
    other = replace(run, out=str(tmp_path / "other"), model=replace(SMALL, intermediate_size=96), steps=2)
    train(other)
    weights = Path(run.out) / "checkpoints/8/weights"
    shutil.rmtree(weights)
    shutil.copytree(Path(other.out) / "checkpoints/2/weights", weights)
    with pytest.raises(UserError, match=r"8 does not fit .*down_proj/kernel: \[2, 96, 32\] there, \[2, 64, 32\] here"):
        train(run)


def test_a_checkpoint_of_another_run_says_what_differs(run, tmp_path):
    """Without recipe.yaml, with other crystals under the same name, or with another generator of random numbers."""
    with pytest.raises(UserError, match=r"holds a run of another recipe \(seed is 0 there, 3 here\)"):
        train(replace(run, seed=3))
    (Path(run.out) / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"checkpoints/8 is of another run \(seed is 0 there, 3 here"):
        train(replace(run, seed=3))
    with (
        jax.default_prng_impl("rbg"),
        pytest.raises(UserError, match=r"the seed gave the draws .*threefry.*, it gives .*rbg"),
    ):
        train(run)
    assert not (Path(run.out) / "recipe.yaml").exists()  # a run that was refused has left no mark
    path = tmp_path / "train.parquet"
    shutil.copy(run.data.train, path)
    moved = replace(run, out=str(tmp_path / "moved"), data=replace(run.data, train=str(path)), steps=2)
    train(moved)
    store(crystal_set(61), path, {})
    with pytest.raises(UserError, match=r"data.train held 60 crystals \w+, it holds 61 crystals \w+ now"):
        train(moved)


def test_a_base_that_changed_is_noticed(run, tmp_path):
    adapted = replace(run, out=str(tmp_path / "adapted"), base=run.out, lora=LoraConfig(rank=2), steps=2)
    train(adapted)
    forget(run.out, 6)  # the base is now what it was two steps before
    with pytest.raises(UserError, match=f"belongs to a base of other weights than {run.out} has now"):
        train(adapted)


def test_the_best_checkpoint_stays(recipe):
    """A learning rate that ruins the model after a good beginning: the best is neither last nor saved in turn."""
    ruin = OptimizerConfig(0.5, warmup_steps=8, clip_norm=1e3)
    recipe = replace(recipe, optimizer=ruin, steps=12, validate_every=1, checkpoint_every=5, keep_checkpoints=1)
    train(recipe)
    validation = {line["step"]: line["loss"] for line in journal(recipe.out, "validation")}
    best = min(validation, key=validation.get)
    assert best not in (5, 10, 12) and steps_saved(recipe.out) == [best, 12]
    forget(recipe.out, best)
    train(recipe)  # what was best is known to a second start
    assert steps_saved(recipe.out) == [best, 12]


@pytest.fixture
def ruin(monkeypatch) -> None:
    """One step at this rate, and no number is left; the bounds of a recipe's rate would not let it through."""
    monkeypatch.setattr(loop, "make_optimizer", lambda config, steps: optax.sgd(1e30))


def test_numbers_that_are_none_stop_the_run_before_they_are_saved(recipe, ruin):
    """The step and the crystals are named, though nothing was to be told before step 100."""
    recipe = replace(recipe, log_every=100, checkpoint_every=100, validate_every=100, steps=40)
    with pytest.raises(
        UserError, match=r"at step \d+ the loss is .*nan.* on the crystals crystal-\d+, .* and \d+ more"
    ):
        train(recipe)
    (line,) = journal(recipe.out, "no_number")
    assert len(set(line["crystals"])) == len(line["crystals"]) > 8 and line["step"] < 40
    assert steps_saved(recipe.out) == []


def test_weights_that_give_no_number_are_not_saved_though_their_step_had_one(recipe, ruin):
    """A loss is that of the weights before the step; what is saved are those after."""
    with pytest.raises(UserError, match=r"after step \d+ the validation loss is nan, on the crystals crystal-"):
        train(replace(recipe, checkpoint_every=1))
    (line,) = journal(recipe.out, "no_number")
    assert all(step < line["step"] for step in steps_saved(recipe.out))


def stopped_at(monkeypatch, step):
    """A signal in this step, as `Interrupt` passes it on."""

    def after(self, now):
        self.signal = signal.SIGTERM if now == step else None
        return now == step

    monkeypatch.setattr(loop.Interrupt, "after", after)


def test_a_signal_saves_before_it_validates(recipe, monkeypatch):
    """Killed in that validation, the step is there; it is never the best, and a later one takes its place."""
    stopped_at(monkeypatch, 3)

    class Killed(BaseException):
        pass

    def killed(self, step, *args):
        assert steps_saved(recipe.out)[-1] == step
        raise Killed

    with monkeypatch.context() as within, pytest.raises(Killed):
        within.setattr(loop._Run, "_validate", killed)
        train(replace(recipe, checkpoint_every=100, validate_every=100))
    assert steps_saved(recipe.out) == [3]
    report = train(replace(recipe, checkpoint_every=4, keep_checkpoints=1))
    assert report.steps == 8 and len(losses(recipe.out)) == 8 and 3 not in steps_saved(recipe.out)


def test_what_a_signal_saved_is_taken_away_if_it_gives_no_number(recipe, ruin, monkeypatch):
    stopped_at(monkeypatch, 1)
    with pytest.raises(UserError, match=r"after step 1 the validation loss is nan"):
        train(replace(recipe, checkpoint_every=100, validate_every=100))
    assert steps_saved(recipe.out) == []


def test_the_rows_of_validations_are_packed_once(recipe, monkeypatch):
    packed, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda lengths, *rest: packed.append(len(lengths)) or pack(lengths, *rest))
    train(replace(recipe, steps=4, validate_every=1))
    assert len(journal(recipe.out, "validation")) == 4
    assert packed.count(20) == 1  # crystals of the validation set


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


def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(run, monkeypatch):
    forget(run.out, 6)

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room and start again"):
        train(run)
    monkeypatch.undo()
    assert steps_saved(run.out) == [4, 6]
    assert train(run).steps == 8


@pytest.mark.parametrize("spare", [0, 100_000], ids=["nothing fits", "the journal still fits"])
def test_a_disk_that_is_really_full(run, tmp_path, spare):
    """A file system of 8 MB, filled by something else but for `spare` bytes, then freed again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        small = replace(run, out=str(disk / "run"))
        shutil.copytree(run.out, small.out)
        forget(small.out, 6)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - spare)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device; "):
            train(small)
        assert steps_saved(small.out) == [4, 6] and load_model(small.out).step == 6
        (disk / "filler").unlink()
        assert train(small).steps == 8 and losses(small.out) == losses(run.out)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_set_smaller_than_a_batch_trains(recipe, tmp_path):
    """Rows that are missing are padding."""
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
