"""A run in a store: trained, stopped, gone on with elsewhere, sampled from; the store is that of object_store.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from small import SMALL, losses

from jaxcrystal.cli import main
from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.locks import held
from jaxcrystal.training import loop
from jaxcrystal.training.loop import train
from jaxcrystal.weights.saved import load_model, read_description

RUN = "gs://bucket/runs/small"


@pytest.fixture
def recipe(files) -> Recipe:
    data = DataConfig(**files, tokens_per_row=384, rows_per_batch=4, validation_rows=4)
    return Recipe(
        out="local", model=SMALL, data=data, optimizer=OptimizerConfig(3e-3, warmup_steps=3), steps=6,
        checkpoint_every=2, validate_every=2, log_every=2, keep_checkpoints=2, mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip


def steps_saved(store) -> set[str]:
    prefix = "bucket/runs/small/checkpoints/"
    return {name.removeprefix(prefix).split("/")[0] for name in store.names(prefix)}


def crystals(model: str, out: str) -> list[str]:
    typed = f"sample --model {model} --num 3 --max-new-tokens 120 --num-atoms 1-3 --out {out}"
    assert main(typed.split()) == 0
    return pq.read_table(out)["text"].to_pylist()


class Killed(BaseException):
    """Not caught by anything, as a kill is not."""


@pytest.mark.slow
def test_a_run_in_a_store_is_that_of_a_folder(store, recipe, monkeypatch):
    """Killed behind step 4 without its checkpoint, gone on with on a machine that has nothing of it, sampled from."""
    train(recipe)
    Path("recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    save, journals = loop.Checkpoints.save, []

    def killed(self, trainer, state, *rest):
        journals.append(store.get("bucket/runs/small/metrics.jsonl")[0])
        if int(state.step) == 4:
            raise Killed
        save(self, trainer, state, *rest)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop.Checkpoints, "save", killed)
        train(replace(recipe, out=RUN))
    assert steps_saved(store) == {"2"}
    # It goes there before the checkpoint that it leads to: whatever is gone on with has all lines of its steps.
    assert [json.loads(line)["step"] for line in journals[-1].splitlines()] == [0, 2, 2, 4, 4]
    shutil.rmtree("runs")
    assert main(["train", "recipe.yaml", "--set", f"out={RUN}"]) == 0
    assert steps_saved(store) == {"4", "6"}
    assert losses("runs/bucket/runs/small") == losses("local")
    assert store.get("bucket/runs/small/metrics.jsonl")[0] == Path("runs/bucket/runs/small/metrics.jsonl").read_bytes()
    assert {path.name for path in Path("runs/bucket/runs/small").iterdir()} == {"metrics.jsonl"}
    jax.tree.map(np.testing.assert_array_equal, load_model(RUN).variables, load_model("local").variables)
    assert crystals(RUN, "there.parquet") == crystals("local", "here.parquet")
    with pytest.raises(UserError, match=f"{RUN} holds a run of another recipe"):
        train(replace(recipe, out=RUN, seed=1))


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_store_is_set_aside(store, recipe, capsys):
    train(replace(recipe, out=RUN))
    expected = losses("runs/bucket/runs/small")
    prefix = "bucket/runs/small/checkpoints/6/training/"
    damaged = max(store.names(prefix), key=lambda name: len(store.get(name)[0]))
    content = bytearray(store.get(damaged)[0])
    content[len(content) // 2] ^= 1
    store.put(damaged, bytes(content))
    names = {
        name.removeprefix("bucket/runs/small/checkpoints/6/")
        for name in store.names("bucket/runs/small/checkpoints/6/")
    }
    train(replace(recipe, out=RUN))
    assert f"it is now {RUN}/damaged-checkpoint-6" in capsys.readouterr().out
    aside = "bucket/runs/small/damaged-checkpoint-6/"
    assert {name.removeprefix(aside) for name in store.names(aside)} == names
    assert steps_saved(store) == {"4", "6"} and losses("runs/bucket/runs/small") == expected


@pytest.mark.slow
def test_adapters_and_their_base_in_one_bucket(store, recipe, monkeypatch):
    """Together they can be copied to another bucket, and from there to a disk."""
    train(replace(recipe, out="gs://bucket/base", steps=2))
    adapted = replace(recipe, out="gs://bucket/runs/adapted", base="gs://bucket/base", lora=LoraConfig(rank=2), steps=2)
    train(adapted)
    assert read_description("gs://bucket/runs/adapted").base == "../../base"
    expected = load_model("gs://bucket/runs/adapted")
    for name in store.names("bucket/"):
        store.put("elsewhere" + name.removeprefix("bucket"), store.get(name)[0])
        local = Path(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(store.get(name)[0])
        store.delete(name)
    for place in ("gs://elsewhere/runs/adapted", "bucket/runs/adapted"):
        jax.tree.map(np.testing.assert_array_equal, load_model(place).variables, expected.variables)


def test_a_host_that_does_not_see_the_run_is_refused(store, recipe, monkeypatch):
    """Of several, the first writes the model's description, and on this one's disk it does not appear."""
    monkeypatch.setattr(loop.hosts, "is_first", lambda: False)
    with pytest.raises(UserError, match="local is another folder on this host; `out` must be on a disk that all see"):
        train(recipe)


def test_of_two_jobs_in_one_folder_that_write_one_run_the_second_is_refused(store, recipe):
    with held("runs/bucket/runs/small"), pytest.raises(UserError, match="runs/bucket/runs/small is being written by"):
        train(replace(recipe, out=RUN))
    assert not store.names()
