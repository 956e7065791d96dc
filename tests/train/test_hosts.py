"""One device, eight in any mesh, and two processes of four: the same losses, the same adapters."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from small import SMALL, losses

from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import SCHEDULERS, start_hosts
from jaxcrystal.model.saved import load_model
from jaxcrystal.train.loop import train


@pytest.fixture(scope="module")
def base(files, tmp_path_factory) -> Recipe:
    """A recipe of ten steps with adapters on a base that exists."""
    folder = tmp_path_factory.mktemp("hosts")
    data = DataConfig(**files, tokens_per_row=384, rows_per_batch=8, validation_rows=8)
    first = Recipe(
        out=str(folder / "base"), model=SMALL, data=data, optimizer=OptimizerConfig(3e-3, warmup_steps=2), steps=2,
        mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip
    train(first)
    adapters = LoraConfig(rank=2, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
    return replace(
        first, out=str(folder / "one"), base=first.out, lora=adapters, steps=10, log_every=2, checkpoint_every=4
    )


def adapters(out: str) -> dict:
    return jax.device_get(load_model(out).adapters)


def assert_same(recipe: Recipe, one: Recipe) -> None:
    np.testing.assert_allclose(losses(recipe.out), losses(one.out), atol=1e-5)
    assert len(losses(one.out)) == 10 and len(set(losses(one.out))) > 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), adapters(recipe.out), adapters(one.out))
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(adapters(one.out)))


@pytest.fixture(scope="module")
def one(base) -> Recipe:
    train(base)
    return base


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1), MeshConfig(4, 1, 2)])
def test_meshes_agree(one, mesh):
    recipe = replace(one, out=f"{one.out}-{mesh.data}{mesh.fsdp}{mesh.tensor}", mesh=mesh)
    train(recipe)
    assert_same(recipe, one)


@pytest.mark.slow
def test_two_processes_agree_with_one(one, tmp_path):
    """Real processes with four devices each, and their collectives; one process reads what they saved."""
    recipe = replace(one, out=one.out + "-hosts", mesh=MeshConfig(2, 2, 2))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_dict(recipe)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxcrystal.cli", "train", str(path),
             "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert_same(recipe, one)
    journal = (Path(recipe.out) / "metrics.jsonl").read_text()
    assert journal.count('"event": "start"') == 1  # of two processes, one tells


def test_a_process_alone_starts_nothing(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_ID", "TPU_WORKER_HOSTNAMES", "JOBSET_NAME"):
        monkeypatch.delenv(name, raising=False)
    start_hosts()
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, ["Slurm"]),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, []),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ["TPU pod"]),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, []),
        ({"JOBSET_NAME": "train", "JOB_COMPLETION_INDEX": "1"}, ["GKE"]),
        ({}, []),
    ],
)
def test_schedulers_are_recognised(environment, found):
    assert [name for name, detected in SCHEDULERS.items() if detected(environment)] == found


def test_half_an_address_is_refused():
    with pytest.raises(UserError, match="missing: --processes, --process-id"):
        start_hosts(coordinator="127.0.0.1:1234")
