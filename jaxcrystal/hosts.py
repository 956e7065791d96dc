"""One run on many hosts: how its processes find each other, and what they do together.

Each host runs the same program on its own devices; the first of them writes what is written once. Slurm, TPU pods, GKE
and Open MPI are recognised by what they put into the environment; elsewhere three arguments say who is where.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxcrystal import locks
from jaxcrystal.errors import UserError

LONGEST = 1000  #: bytes of an error that one host sends to the others
LONGEST_WAIT = 7 * 24 * 3600 * 1000  #: ms


def cluster(environment: Mapping[str, str]) -> str | None:
    """The cluster that started this process as one of several, by its environment; None for a process alone."""

    def several(name: str) -> bool:
        value = environment.get(name, "")
        return value.isdecimal() and int(value) > 1

    # A batch script and an interactive shell know SLURM_NTASKS too; only a task of `srun` has a step's node list.
    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return "Slurm"
    if several("MEGASCALE_NUM_SLICES") or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "GKE"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    # JAX sets TPU_SKIP_MDS_QUERY where it finds no TPU chips. Where it finds some, the machine's metadata know its pod,
    # which may be of one host.
    if find_spec("libtpu") and not {"TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"} & environment.keys():
        return "TPU pod"
    return None


def slurm_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a task of `srun`, as positions among those that it sees; None where Slurm gave it none.

    The tasks of a node divide its GPUs evenly: one task has all of them, a task per GPU has one each. (JAX by itself
    takes the one GPU of the task's number on its node, however many there are.) Where `srun --gpus-per-task` already
    shows each task only its own, it has all that it sees. Raises UserError where the tasks cannot divide them.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if visible is not None:
        seen = len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    else:
        seen = int(on_node) if on_node.isdecimal() else 0
    if not seen:
        return None
    if on_node.isdecimal() and seen < int(on_node):
        return list(range(seen))
    tasks = _slurm_tasks(environment)
    share, rest = divmod(seen, tasks)
    if rest or not share:
        raise UserError(
            f"{tasks} tasks cannot divide the {seen} GPUs of a node evenly; give sbatch --ntasks-per-node {seen}, or 1 "
            "for one process with all of them"
        )
    first = int(environment["SLURM_LOCALID"]) * share
    return list(range(first, first + share))


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node; Slurm writes them for all nodes in turn, as 8(x2),4."""
    counts: list[int] = []
    for text in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text.strip()):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    if node < len(counts):
        return counts[node]
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    return -(-int(environment["SLURM_NTASKS"]) // nodes)


def start(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others of its job; before any other call of JAX.

    Under a cluster that `cluster` knows no argument is needed; elsewhere all three, `coordinator` being HOST:PORT of
    process 0. Where neither is so, this process is alone and nothing happens.
    Raises UserError if only some of the arguments are given, or if the others do not come.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f"of --coordinator, --processes and --process-id all are needed; missing: {', '.join(missing)}")
    found = cluster(os.environ)
    if missing and found is None:
        return
    if not missing:
        if not coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"--coordinator is {coordinator!r}; write HOST:PORT of process 0")
        if not 0 <= process_id < processes:
            raise UserError(f"--process-id is {process_id}; it must lie between 0 and {processes - 1}")
    # JAX's own variable, where the user set it, is left to JAX.
    ours = missing and found == "Slurm" and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    devices = slurm_gpus(os.environ) if ours else None
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = found if missing else f"process {process_id} of {processes} at {coordinator}"
    try:
        # `deactivate`: who says where the others are is not contradicted by a cluster that is found besides.
        how = None if missing else "deactivate"
        jax.distributed.initialize(coordinator, processes, process_id, devices, cluster_detection_method=how)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the processes of this job ({where}): {' '.join(str(error).split())[:300]}; start the same "
            "command on every host, or say who is where by --coordinator, --processes and --process-id"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """A barrier of all processes, by its name, which may take days: it is no collective of devices."""
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WAIT)


@contextmanager
def apart(name: str) -> Iterator[None]:
    """What each process does by itself: the first to be done, or to fail, waits for the others, which go on.

    (JAX ends all processes of a job once one of them is gone.)
    """
    try:
        yield
    except Exception:
        wait(name)
        raise
    wait(name)


@contextmanager
def together() -> Iterator[None]:
    """A UserError of one host within is raised on every host, so that none waits for one that has gone.

    What runs within must not itself wait for other hosts. Leaving it is a barrier (an all-gather of the errors).
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    if jax.process_count() > 1:
        sent = np.zeros(LONGEST, np.uint8)
        if problem is not None:
            text = np.frombuffer(str(problem).encode()[:LONGEST], np.uint8)
            sent[: len(text)] = text
        for host, text in enumerate(multihost_utils.process_allgather(sent)):
            if problem is None and text.any():
                problem = UserError(f"host {host}: {bytes(text).rstrip(bytes(1)).decode(errors='replace')}")
    if problem is not None:
        raise problem


@contextmanager
def held(out: str | Path) -> Iterator[None]:
    """Holds the lock of an output for all processes of this job: the first has it, and all raise what it raises."""
    with ExitStack() as lock:
        with together():
            if is_first():
                lock.enter_context(locks.held(out))
        yield
