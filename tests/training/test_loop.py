"""A run, stopped and gone on with, is the run that was never stopped; what cannot run is refused at once."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from small import SMALL, losses

from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, to_dict
from jaxcrystal.crystals import dataset, num_atoms
from jaxcrystal.errors import UserError
from jaxcrystal.training import loop, step
from jaxcrystal.training.loop import train
from jaxcrystal.training.step import learning_rate
from jaxcrystal.weights.fingerprint import fingerprint
from jaxcrystal.weights.saved import load_model


@pytest.fixture
def recipe(files, tmp_path) -> Recipe:
    data = DataConfig(**files, tokens_per_row=384, rows_per_batch=4, validation_rows=4)
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=3)
    out = str(tmp_path / "run")
    return Recipe(
        out=out, model=SMALL, data=data, optimizer=optimizer, steps=12, checkpoint_every=4, validate_every=6,
        log_every=2, mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip


def test_a_run_tells_and_saves(recipe):
    report = train(recipe)
    lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    told = {step: [line["event"] for line in lines[1:] if line["step"] == step] for step in range(13)}
    both = {4, 6, 8, 12}  # validate_every, and what is saved is validated
    assert told == {s: ["train", "validation"] if s in both else ["train"] * (s in (2, 10)) for s in range(13)}
    for line in lines[1:]:
        if line["event"] == "train":
            assert line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1 and 0 <= line["padding"] < 1
    start = lines[0]
    assert start["steps"] == 12 and start["compile_seconds"] > 0 and start["weights"]["params"] == 47264
    assert len(losses(recipe.out)) == 12 and report.loss == losses(recipe.out)[-1] < losses(recipe.out)[0]
    model = load_model(report.out)
    assert num_atoms.load(report.out) == num_atoms.ranges(dataset.load(recipe.data.train).batch) != {}
    assert model.step == 12 and replace(model.config, vocab_size=448) == SMALL
    assert sorted(int(p.name) for p in (report.out / "checkpoints").iterdir()) == [8, 12]  # keep_checkpoints


def test_the_bar_shows_steps_that_are_done(recipe, monkeypatch):
    """Of those that are sent off one is under way, until its loss is read: the one before it is waited for."""
    shown, waited, wait = [], [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or wait(x))

    class Bar(loop.tqdm):
        def update(self, n: int = 1) -> bool | None:
            shown.append(n)
            return super().update(n)

    monkeypatch.setattr(loop, "tqdm", Bar)
    train(replace(recipe, steps=5, log_every=3, validate_every=100, checkpoint_every=100))
    assert shown == [0, 1, 2, 0, 2]
    assert len(waited) == 3  # for steps 1, 2 and 4; the losses of 3 and 5 are read


def test_finished_runs_are_left_as_they_are(recipe):
    train(recipe)
    before = losses(recipe.out)
    assert train(recipe).steps == 12
    assert losses(recipe.out) == before


def test_a_finished_run_goes_on_for_more_steps(recipe, monkeypatch):
    """As docs/training.md says: bit for bit the run whose learning rate changes its schedule behind step 6."""
    train(replace(recipe, steps=6, checkpoint_every=3))
    before = losses(recipe.out)
    report = train(replace(recipe, steps=10))
    found = losses(recipe.out)
    assert report.steps == 10 and found[:6] == before and load_model(recipe.out).step == 10

    def both(config, steps):
        short, long = learning_rate(config, 6), learning_rate(config, 10)
        return lambda count: jax.numpy.where(count < 6, short(count), long(count))

    monkeypatch.setattr(step, "learning_rate", both)
    train(replace(recipe, steps=10, out=f"{recipe.out}-at-once"))
    assert losses(f"{recipe.out}-at-once") == found
    kept = (report.out / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"run has done 10 steps, the recipe has 8; raise `steps` or `epochs`"):
        train(replace(recipe, steps=8))
    assert (report.out / "recipe.yaml").read_text() == kept and yaml.safe_load(kept)["steps"] == 10


#: How often the run is killed at random, how often in the writing of a checkpoint, and the seed of the moments.
RANDOM, AIMED, SEED = 1, 3, 0


def stands(pid: int) -> bool:
    """Whether the process is stopped or has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(recipe, tmp_path):
    """SIGKILL at random moments and as soon as a checkpoint is begun, or a little later, while it is written: bit for
    bit the losses of the run that was not killed, and no checkpoint that cannot be read."""
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # a start takes seconds

    def start(out: str) -> subprocess.Popen:
        path, run = tmp_path / f"{out}.yaml", replace(recipe, out=str(tmp_path / out), steps=60, checkpoint_every=2)
        path.write_text(yaml.safe_dump(to_dict(replace(run, log_every=1, validate_every=1000))))
        command = [sys.executable, "-m", "jaxcrystal.cli", "train", str(path)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)

    assert start("whole").wait() == 0
    whole, killed = losses(tmp_path / "whole"), tmp_path / "killed"
    rng = np.random.default_rng(SEED)
    unfinished = lambda: list((killed / "checkpoints").glob("*tmp*"))  # noqa: E731
    hits = 0
    for aimed in rng.permutation([False] * RANDOM + [True] * AIMED):
        process, before = start("killed"), len(losses(killed))
        wanted = min(before + rng.integers(1, 7), len(whole))
        while process.poll() is None and len(losses(killed)) < wanted:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.1))
        while aimed and process.poll() is None:
            if unfinished():  # still so once it stands?
                time.sleep(rng.uniform(0, 0.02))
                process.send_signal(signal.SIGSTOP)
                while not stands(process.pid):
                    time.sleep(0.001)
                if unfinished():
                    break
                process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        hits += bool(unfinished())
    assert hits  # some were killed in the middle of writing
    assert start("killed").wait() == 0
    assert losses(killed) == whole and len(whole) == 60
    assert not list(killed.glob("damaged-*"))


def test_it_goes_on_on_another_mesh_with_less_memory(recipe):
    whole = replace(recipe, out=recipe.out + "-whole")
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        interrupted_after(recipe, 9)
    sparing = replace(SMALL, remat="full", attention="xla")
    train(replace(recipe, mesh=MeshConfig(2, 2, 2), model=sparing, data=replace(recipe.data, loss_block=64)))
    np.testing.assert_allclose(losses(recipe.out), losses(whole.out), atol=1e-5)


def interrupted_after(recipe, steps):
    from jaxcrystal.training import loop

    class Interrupted(loop._Run):
        def _batches(self, *args):
            for n, batch in enumerate(super()._batches(*args)):
                if n == steps:
                    raise KeyboardInterrupt
                yield batch

    original = loop._Run
    loop._Run = Interrupted
    try:
        train(recipe)
    finally:
        loop._Run = original


def test_adapters_on_a_base(recipe, tmp_path):
    train(recipe)
    adapted = replace(recipe, out=str(tmp_path / "adapted"), base=recipe.out, lora=LoraConfig(rank=2), steps=4)
    train(adapted)
    model, base = load_model(adapted.out), load_model(recipe.out)
    jax.tree.map(np.testing.assert_array_equal, model.params, base.params)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(model.adapters))
    assert model.float_checksum == fingerprint(base.params) and base.float_checksum is None
    file = Path(adapted.out) / "model.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({key: described[key] for key in described if key != "float_checksum"}))
    train(adapted)  # as an earlier version wrote it: is done, and says which weights its base has
    assert json.loads(file.read_text()) == described
    with pytest.raises(UserError, match="adapters of its own"):
        train(replace(adapted, base=adapted.out, out=str(tmp_path / "twice")))


def test_all_weights_of_a_base_are_trained_on(recipe, tmp_path):
    train(recipe)
    whole = replace(recipe, base=recipe.out, out=str(tmp_path / "whole"), steps=2)
    train(whole)
    model, base = load_model(whole.out), load_model(recipe.out)
    assert model.adapters is None and model.float_checksum is None
    assert not any(
        np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (model.params, base.params)), strict=True)
    )


def test_epochs_count_passes(recipe):
    report = train(replace(recipe, steps=None, epochs=2.0))
    lines = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text().splitlines()]
    crystals = sum(line["crystals_per_second"] * line["step_seconds"] * len(line["losses"]) for line in lines[1:] if
                   line["event"] == "train")  # fmt: skip
    assert crystals == pytest.approx(120, abs=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mesh": MeshConfig(8, 1, 1)},
            r"rows_per_batch\): its axis 'batch' of size 4 .* data x fsdp of size 8",
        ),
        (
            {"mesh": MeshConfig(2, 1, 1), "data": DataConfig(rows_per_batch=6, accumulate=2)},
            r"rows_per_batch / data.accumulate\): its axis 'batch' of size 3 .* data x fsdp of size 2",
        ),
        ({"model": replace(SMALL, attention="cudnn")}, "model.attention is 'cudnn', but cudnn runs on gpu"),
        ({"mesh": MeshConfig(3, 3, 1)}, "needs 9 devices, there are 8"),
        ({"epochs": None, "steps": None}, "set `steps` or `epochs`"),
        ({"lora": LoraConfig()}, "lora has adapters on a frozen model, and the recipe has none: set `base`"),
        ({"tokenizer": "/nowhere"}, "no tokenizer at"),
        ({"base": "/nowhere"}, "/nowhere is not a model directory"),
        ({"model": replace(SMALL, max_position_embeddings=128)}, "the model's context is 128"),
        ({"out": "/proc/run"}, "/proc/run"),
    ],
)
def test_what_cannot_run_is_refused(recipe, change, message):
    with pytest.raises(UserError, match=message):
        train(replace(recipe, **change))


def test_another_recipe_does_not_go_on(recipe):
    train(recipe)
    with pytest.raises(UserError, match=r"optimizer.learning_rate is 0.003 there, 0.01 here"):
        train(replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=0.01)))
