"""slurm.sbatch to its end, with a stand-in for srun that starts tasks as Slurm does: which GPUs each of them takes."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcrystal import hosts
from jaxcrystal.errors import UserError

ROOT = Path(__file__).parents[1]

#: Starts one task after another, each with the variables that Slurm gives to it.
SRUN = """#!{python}
import os, subprocess, sys
nodes, tasks, gpus = (int(os.environ[name]) for name in ("NODES", "TASKS", "GPUS"))
assert os.environ["SRUN_CPUS_PER_TASK"] == os.environ["SLURM_CPUS_PER_TASK"], "a task would have one core"
command = [word for i, word in enumerate(sys.argv[1:]) if i or not word.startswith("--")]
for rank in range(nodes * tasks):
    step = dict(
        SLURM_JOB_ID="77", SLURM_NTASKS=nodes * tasks, SLURM_PROCID=rank, SLURM_LOCALID=rank % tasks,
        SLURM_NODEID=rank // tasks, SLURM_STEP_NODELIST="node[1-%d]" % nodes, SLURM_STEP_NUM_NODES=nodes,
        SLURM_STEP_TASKS_PER_NODE="%d(x%d)" % (tasks, nodes) if nodes > 1 else tasks,
        SLURM_GPUS_ON_NODE=gpus, CUDA_VISIBLE_DEVICES=",".join(map(str, range(gpus))),
    )
    subprocess.run(command, env=os.environ | {{k: str(v) for k, v in step.items()}}, check=True)
"""
#: The installed Python: the command line with an `initialize` of JAX that stops where the network would be used.
PYTHON = """#!{python}
import json, os, sys
sys.path.insert(0, {root!r})
import jax
from jax._src.clusters import ClusterEnv

def initialize(coordinator=None, processes=None, process_id=None, local_device_ids=None, cluster_detection_method=None):
    found = ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, processes, process_id, local_device_ids, cluster_detection_method, 1
    )
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(found) + "\\n")
    sys.exit(0)

jax.distributed.initialize = initialize
if sys.argv[1:3] == ["-m", "jaxcrystal.cli"]:
    from jaxcrystal.cli import main
    sys.exit(main(sys.argv[3:]))
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def submit(tmp_path):
    """Runs the batch script in a checkout as `sbatch` would, on `nodes` with `tasks` and `gpus` each."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    (checkout / ".venv" / "bin").mkdir(parents=True)
    tools.mkdir()
    executable(checkout / ".venv" / "bin" / "python", PYTHON.format(python=sys.executable, root=str(ROOT)))
    wanted = subprocess.run("cat pyproject.toml constraints.txt | cksum", shell=True, cwd=checkout, capture_output=True)
    (checkout / ".venv" / "installed-cuda").write_bytes(wanted.stdout)
    executable(tools / "srun", SRUN.format(python=sys.executable))

    def run(nodes: int, tasks: int, gpus: int) -> list[list]:
        record = tmp_path / "record"
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(checkout), "RECORD": str(record),
            "NODES": str(nodes), "TASKS": str(tasks), "GPUS": str(gpus), "JAX_PLATFORMS": "cpu",
            "SLURM_CPUS_PER_TASK": "5",
        }  # fmt: skip
        command = ["bash", str(checkout / "launch" / "slurm.sbatch"), "train", str(ROOT / "configs/tiny_cpu.yaml")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in record.read_text().splitlines()]

    return run


def test_one_task_a_node_takes_all_of_its_gpus(submit):
    found = submit(nodes=2, tasks=1, gpus=8)
    assert [(processes, rank, gpus) for _, processes, rank, gpus in found] == [(2, i, list(range(8))) for i in (0, 1)]
    assert len({address for address, *_ in found}) == 1 and found[0][0].startswith("node1:")


@pytest.mark.slow
def test_a_task_for_each_gpu_takes_one(submit):
    found = submit(nodes=2, tasks=2, gpus=2)
    assert [(rank, gpus) for _, _, rank, gpus in found] == [(0, [0]), (1, [1]), (2, [0]), (3, [1])]


def task(tasks: str, local: int, node: int = 0, **more: str) -> dict[str, str]:
    return {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node),
            "SLURM_NTASKS": "16", "SLURM_GPUS_ON_NODE": "8"} | more  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        (task("8", 3), [3]),
        (task("8(x2)", 7, 1), [7]),
        (task("1(x2)", 0, 1), [0, 1, 2, 3, 4, 5, 6, 7]),
        (task("8(x2),1", 0, 2), [0, 1, 2, 3, 4, 5, 6, 7]),
        (task("2", 1), [4, 5, 6, 7]),
        (task("8", 3, CUDA_VISIBLE_DEVICES="3"), [0]),  # srun --gpus-per-task 1
        (task("2", 1, CUDA_VISIBLE_DEVICES="4,5,6,7"), [0, 1, 2, 3]),
        (task("8", 3, CUDA_VISIBLE_DEVICES=""), None),
        (task("8", 3, SLURM_GPUS_ON_NODE=""), None),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "5", "SLURM_GPUS_ON_NODE": "8"}, [5]),
    ],
)
def test_gpus_of_a_task(environment, gpus):
    assert hosts.slurm_gpus(environment) == gpus


@pytest.mark.parametrize("tasks", ["3", "16"])
def test_tasks_that_cannot_divide_the_gpus_are_refused(tasks):
    with pytest.raises(UserError, match=f"{tasks} tasks cannot divide the 8 GPUs .* --ntasks-per-node 8, or 1"):
        hosts.slurm_gpus(task(tasks, 0))
