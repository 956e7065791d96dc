"""One device, eight in any mesh, and two processes of four: the same losses, the same adapters."""

import os
import signal
import socket
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

from jaxcrystal import hosts
from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.training.loop import train
from jaxcrystal.weights.saved import load_model


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


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8, 1), MeshConfig(4, 1, 2)])  # 2 x 2 x 2 is that of two processes
def test_meshes_agree(one, mesh):
    recipe = replace(one, out=f"{one.out}-{mesh.data}{mesh.fsdp}{mesh.tensor}", mesh=mesh)
    train(recipe)
    assert_same(recipe, one)


FOUR_DEVICES = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def two_processes(recipe: Recipe, folder: Path) -> list[subprocess.Popen]:
    """The recipe, typed on two hosts."""
    path, address = folder / "recipe.yaml", free_address()
    path.write_text(yaml.safe_dump(to_dict(recipe)))
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jaxcrystal.cli", "train", str(path),
             "--coordinator", address, "--processes", "2", "--process-id", str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | FOUR_DEVICES,
        )
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_agree_with_one(one, tmp_path):
    """Real processes with four devices each, and their collectives; one process reads what they saved."""
    recipe = replace(one, out=one.out + "-hosts", mesh=MeshConfig(2, 2, 2))
    processes = two_processes(recipe, tmp_path)
    told = [process.communicate(timeout=1200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert_same(recipe, one)
    journal = (Path(recipe.out) / "metrics.jsonl").read_text()
    assert journal.count('"event": "start"') == 1  # of two processes, one tells


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop(one, tmp_path):
    """Both agree on a step, save it together, and exit 0."""
    recipe = replace(one, out=str(tmp_path / "run"), steps=4000, checkpoint_every=4000, validate_every=4000)
    recipe = replace(recipe, mesh=MeshConfig(1, -1, 1), log_every=1)
    processes = two_processes(recipe, tmp_path)
    while all(process.poll() is None for process in processes) and len(losses(recipe.out)) < 2:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=1200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    steps = len(losses(recipe.out))
    assert f"saved after step {steps}, on SIGTERM" in told[0][0] and "saved" not in told[1][0]
    assert load_model(recipe.out).step == steps


MEET = """
import sys
from jaxcrystal import hosts
from jaxcrystal.config import MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh

def fail_on_the_second():
    with hosts.together():
        if not hosts.is_first():
            raise UserError("no disk here")

hosts.start(sys.argv[1], 2, int(sys.argv[2]))
with hosts.together():
    pass
for attempt in (fail_on_the_second, lambda: make_mesh(MeshConfig(1, 4, 1))):
    try:
        attempt()
    except UserError as error:
        print(error)
"""


def test_what_one_host_cannot_do_is_said_on_all():
    address, environment = free_address(), os.environ | FOUR_DEVICES
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, address, str(i)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=1200)[0].splitlines() for process in processes]
    told = [[line for line in lines if not line.startswith("[Gloo]")] for lines in told]
    refused = "mesh data 1 x fsdp 4 x tensor 1 needs 4 devices, all hosts together have 8: a run on many hosts uses all"
    assert [lines[0] for lines in told] == ["host 1: no disk here", "no disk here"]
    assert all(lines[1].startswith(refused) for lines in told)


def test_a_process_alone_starts_nothing(monkeypatch):
    monkeypatch.setattr(hosts, "cluster", lambda environment: None)
    hosts.start()
    assert jax.process_count() == 1 and not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[1-4]"}, "Slurm"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script itself
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "Open MPI"),
        ({}, None),
    ],
)
def test_clusters_are_recognised(environment, found):
    """Where JAX has found no TPU chips, which it notes in the environment."""
    assert hosts.cluster(environment | {"TPU_SKIP_MDS_QUERY": "1"}) == found


@pytest.mark.parametrize(("libtpu", "found"), [(object(), "TPU pod"), (None, None)])
def test_a_machine_with_tpu_chips_asks_its_metadata(monkeypatch, libtpu, found):
    monkeypatch.setattr(hosts, "find_spec", lambda name: libtpu)
    assert hosts.cluster({}) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "127.0.0.1:1234"}, "missing: --processes, --process-id"),
        ({"coordinator": "node1", "processes": 2, "process_id": 0}, "--coordinator is 'node1'; write HOST:PORT"),
        (
            {"coordinator": "node1:80", "processes": 2, "process_id": 2},
            "--process-id is 2; it must lie between 0 and 1",
        ),
    ],
)
def test_an_address_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        hosts.start(**arguments)
