"""Processes: results in full, a death or a delay that costs one item, and dask's workers as our own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from jaxcrystal import workers as module
from jaxcrystal.errors import UserError
from jaxcrystal.workers import Lost, Workers, dask, each, each_chunk, local, run


def work(item: str) -> str:
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "sleep":
        time.sleep(600)
    if item == "raise":
        raise ValueError("from the job")
    return item * 2


def job(items):
    for i, item in enumerate(items):
        yield None
        yield i, work(item)


def at_once(items):
    return [work(item) for item in items]


def collect(items: list[str], workers: Workers, **settings) -> dict[int, object]:
    found = list(run(job, items, workers, **{"timeout": 5.0, "chunk": 3} | settings))
    assert max(Counter(index for index, _ in found).values(), default=1) == 1
    return dict(found)


ITEMS = ["a", "die", "b", "sleep", "c", "die", "d"]
EXPECTED = [{"die": Lost.CRASHED, "sleep": Lost.TIMEOUT}.get(item, item * 2) for item in ITEMS]


def test_every_item_has_one_result_and_a_lost_one_costs_itself():
    with local(2) as workers:
        found = collect(ITEMS, workers)
        assert [found[i] for i in range(len(ITEMS))] == EXPECTED
        # The same processes, after all that, do as they did.
        assert collect(["x", "y"], workers) == {0: "xx", 1: "yy"}


def test_results_are_in_order_with_or_without_processes(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    items = [str(i) for i in range(11)]
    lost = lambda item, why: f"{item} {why.value}"  # noqa: E731
    with local(2) as workers:
        for pool in (workers, None):
            assert each(work, items, pool, label="", lost=lost) == [item * 2 for item in items]
            assert each_chunk(at_once, items, pool, label="", lost=lost) == [item * 2 for item in items]
        for function in (partial(each, work), partial(each_chunk, at_once)):
            assert function(["a", "die", "b"], workers, label="", lost=lost) == ["aa", "die crashed", "bb"]


def test_nothing_to_do_starts_nothing():
    with local(2) as workers:
        assert collect([], workers) == {}
        assert not workers.executor._pids


def test_an_error_of_the_job_is_not_swallowed():
    with local(1) as workers:
        with pytest.raises(ValueError, match="from the job"):
            collect(["a", "raise"], workers)
        assert collect(["a"], workers) == {0: "aa"}


def test_one_that_died_with_nothing_to_do_costs_nothing():
    with local(1) as workers:
        assert collect(["a"], workers) == {0: "aa"}
        ((pool, pid),) = workers.executor._pids.items()
        os.kill(pid, signal.SIGKILL)
        while not pool._broken:
            time.sleep(0.05)
        assert collect(["b"], workers) == {0: "bb"}
        assert pid not in workers.executor._pids.values()
    with pytest.raises(RuntimeError, match="the cause"), local(1) as workers:  # and hides no error
        collect(["a"], workers)
        os.kill(*workers.executor._pids.values(), signal.SIGKILL)
        time.sleep(1)
        raise RuntimeError("the cause")


@pytest.mark.parametrize("started", [True, False])
def test_an_error_ends_what_is_running(started):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="enough"), local(1) as workers:
        workers.executor.submit(work, "sleep")
        while started and not workers.executor._pids:
            time.sleep(0.1)
        raise RuntimeError("enough")
    assert time.monotonic() - began < 300  # the job would have slept for ten minutes


def refuse() -> None:
    os._exit(1)


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "_first_job", refuse)
    with local(1) as workers, pytest.raises(UserError, match="died before it had a job"):
        collect(["a"], workers)


ORPHANS = """
import sys, time
from jaxcrystal.workers import local

with local(2) as workers:
    jobs = [workers.executor.submit(time.sleep, 600) for _ in range(2)]
    while len(workers.executor._pids) < 2:
        time.sleep(0.05)
    print(*workers.executor._pids.values(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(blow):
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2
    parent.send_signal(blow)
    parent.wait(60)
    for pid in pids:
        for _ in range(600):
            if not _runs(pid):
                break
            time.sleep(0.1)
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("count", [0, -1])
def test_no_workers_are_an_error(count):
    with pytest.raises(UserError, match="at least 1"), local(count):
        pass


@pytest.fixture
def cluster(tmp_path):
    """Starts dask's own programs on this machine: a scheduler, and workers as they are asked for; their address."""
    pytest.importorskip("distributed")
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(tmp_path / "scheduler.json")]
        # The workers find this module.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "0"  # or it tries each job four times
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    start("scheduler", "--port", "0", "--no-dashboard")
    while not (tmp_path / "scheduler.json").exists():
        time.sleep(0.1)
    yield (
        lambda *arguments: start("worker", *arguments),
        json.loads((tmp_path / "scheduler.json").read_text())["address"],
    )
    for process in reversed(started):
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_dasks_workers_are_as_our_own(cluster, monkeypatch):
    """A real scheduler; workers that die, hang, are of the wrong kind, or have all gone."""
    start, address = cluster
    with pytest.raises(UserError, match="has no workers"), dask(address):
        pass
    nanny = start("--nworkers", "2", "--nthreads", "1")
    with _with_slots(address, 2) as workers:
        found = collect(ITEMS, workers, timeout=8.0)
        for i, item in enumerate(ITEMS):
            # A new worker may take as long to come as this short timeout: then a death is taken for a hang.
            assert found[i] in ([*Lost] if item == "die" else [EXPECTED[i]]), item
        nanny.terminate()
        nanny.wait(60)
        monkeypatch.setattr(module, "CONNECT", 1)
        with pytest.raises(UserError, match="are gone"):
            collect(["a"], workers)
    start("--nworkers", "1", "--nthreads", "2")
    with pytest.raises(UserError, match="--nthreads 1"), _with_slots(address, 1):
        pass


@contextmanager
def _with_slots(address: str, slots: int):
    """Once so many workers have come."""
    import distributed

    with distributed.Client(address) as client:
        client.wait_for_workers(slots, timeout=120)
    with dask(address) as workers:
        assert workers.slots == slots
        yield workers


def test_a_scheduler_that_does_not_answer_is_an_error(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(module, "CONNECT", 1)
    with pytest.raises(UserError, match="no dask scheduler answers"), dask("tcp://127.0.0.1:1"):
        pass


def test_without_dask_the_extra_is_named():
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "from jaxcrystal.cli import main\n"
        "sys.exit(main(['evaluate', 'x.csv', '--out', 'y', '--dask', 'tcp://127.0.0.1:1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "jaxcrystal[dask]" in done.stderr
