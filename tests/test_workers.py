"""Processes: results in full and one by one, a death or a hang that costs one item and never another, any program.

No verdict depends on how busy the machine is: what waits, waits for an event, and limits only end a failed test.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxcrystal import worker_process
from jaxcrystal import workers as module
from jaxcrystal.errors import UserError
from jaxcrystal.worker_process import Began, Died, Ended, Found
from jaxcrystal.workers import Lost, Started, Workers, dask, each, each_chunk, local, run

LIMIT = 300  #: seconds after which a test that waits has failed


def wait_for(condition):
    began = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - began < LIMIT
        time.sleep(0.02)
    return found


def work(item: str) -> str:
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "sleep":
        time.sleep(600)
    if item == "raise":
        raise ValueError("from the job")
    if item == "kill parent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    return item * 2


def job(items):
    for i, item in enumerate(items):
        yield None
        yield i, work(item)


def at_once(items):
    return [work(item) for item in items]


def collect(items: list[str], workers: Workers, do=job, **settings) -> dict[int, object]:
    found = list(run(do, items, workers, **{"chunk": 3} | settings))
    assert max(Counter(index for index, _ in found).values(), default=1) == 1
    return dict(found)


ITEMS = ["a", "die", "b", "c", "die", "d", "e"]
EXPECTED = {i: Lost.CRASHED if item == "die" else item * 2 for i, item in enumerate(ITEMS)}


def test_every_item_has_one_result_and_a_lost_one_costs_itself():
    with local(2) as workers:
        assert collect(ITEMS, workers) == EXPECTED
        # The same workers, after all that, do as they did.
        assert collect(["x", "y"], workers) == {0: "xx", 1: "yy"}


def logged(log: Path, together: bool, items):
    """Notes what each process does; `together` takes all items before it works on the first."""
    for i, item in enumerate(list(items) if together else items):
        with log.open("a") as file:
            file.write(f"{item} {os.getpid()}\n")
        yield i, work(item)


@pytest.mark.parametrize("together", [False, True])
def test_only_what_has_no_result_is_done_again(tmp_path, together):
    """What was found before the death is kept; the suspect is done twice more, alone in processes that are new."""
    items = ["a", "b", "c", "die", "d", "e", "f", "g"]
    with local(1) as workers:
        found = collect(items, workers, partial(logged, tmp_path / "log", together), chunk=8)
    assert found == {i: Lost.CRASHED if item == "die" else item * 2 for i, item in enumerate(items)}
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    times = Counter(item for item, _ in lines)
    assert all(times[item] == 1 for item in "abc")
    # One by one nothing but the killer was begun on; taken together, all that follow were suspects too.
    assert times["die"] == (4 if together else 3) and max(times[item] for item in "defg") == 1
    for last in [pid for item, pid in lines if item == "die"][-2:]:
        assert [item for item, pid in lines if pid == last] == ["die"]


def once(flag: Path, items):
    """Dies at "b" the first time only."""
    for i, item in enumerate(items):
        if item == "b" and not flag.exists():
            flag.touch()
            work("die")
        yield i, item


def test_what_died_once_is_not_lost(tmp_path):
    """A process may be killed by what is not its work, such as want of memory."""
    with local(1) as workers:
        assert collect(["a", "b", "c"], workers, partial(once, tmp_path / "flag")) == {0: "a", 1: "b", 2: "c"}
        (tmp_path / "flag").unlink()
        assert collect(["b"], workers, partial(once, tmp_path / "flag")) == {0: "b"}


def hung(marker: Path, items):
    for i, item in enumerate(items):
        if item == "sleep":
            marker.write_text(str(os.getpid()))
        yield i, work(item)


def test_a_hang_is_a_timeout_and_costs_itself(tmp_path, monkeypatch):
    """The watchdog's clock stands unless the process hangs: nothing here depends on how long anything takes."""
    marker = tmp_path / "marker"

    def comes(connection, seconds):
        assert 0 < seconds <= worker_process.LOOK
        while True:
            hangs = marker.exists() and _runs(int(marker.read_text() or 0))
            if connection.poll(0.02):
                return True
            if hangs:
                looks.append(seconds)
                return False

    looks = []
    with monkeypatch.context() as patch, local(1) as workers:
        patch.setattr(worker_process, "_comes", comes)
        found = collect(["a", "sleep", "die", "b"], workers, partial(hung, marker), timeout=1.2)
        assert found == {0: "aa", 1: Lost.TIMEOUT, 2: Lost.CRASHED, 3: "bb"}
    assert sum(looks) == pytest.approx(3 * 1.2)
    # And by the clock, where there is nothing that could be slow.
    with local(1) as workers:
        assert collect(["sleep"], workers, timeout=0.5) == {0: Lost.TIMEOUT}


class Cluster:
    """A cluster of one worker with a queue: whenever the worker dies, all that was queued on it is lost with it.

    The worker dies of the item "die", and for no reason at the times named, counted in items. If it is `forgetful`,
    what it did on several items is not known when it dies.
    """

    def __init__(self, dies_at=(), forgetful=False):
        self.dies_at, self.forgetful, self.time, self.worker = set(dies_at), forgetful, 0, 0
        self.queued, self.events, self.tasks = deque(), deque(), []

    def begin(self, number, task):
        self.queued.append((number, task))
        self.tasks.append(task)

    def next(self):
        if not self.events:
            self._work(*self.queued.popleft())
        return self.events.popleft()

    def _work(self, number, task):
        where, found = f"worker {self.worker}", []
        self.events.append((number, Started(where)))
        for i, pickled in enumerate(task.items):
            found.append((number, Began(i)))
            item = module.pickle.loads(pickled)
            self.time += 1
            if item == "die" or self.time in self.dies_at:
                self.worker += 1
                lost = [number, *(other for other, _ in self.queued)]
                self.queued.clear()
                self.events.extend(found if not self.forgetful or len(task.items) == 1 else [])
                died = Died(Lost.CRASHED, where, worker=self.forgetful)
                self.events.extend((other, Ended(died)) for other in lost)
                return
            found.append((number, Found(i, module.pickle.dumps(item * 2))))
        self.events.extend([*found, (number, Ended())])


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_what_was_queued_on_a_worker_that_died_is_not_blamed(slots, chunk, forgetful):
    cluster = Cluster(forgetful=forgetful)
    assert collect(ITEMS, Workers(lambda: nullcontext(cluster), slots), chunk=chunk) == EXPECTED
    # A verdict takes two new processes that work on the item alone, which was lost before.
    assert all(len(task.items) == 1 for task in cluster.tasks if task.new)
    deadly = [task.new for task in cluster.tasks if "die" in map(module.pickle.loads, task.items)]
    assert sum(deadly) >= 4 and not deadly[0]


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("time_of_death", range(1, 12))
def test_a_worker_that_dies_of_nothing_blames_nobody(time_of_death, forgetful):
    cluster = Cluster([time_of_death], forgetful)
    assert collect(ITEMS, Workers(lambda: nullcontext(cluster), 3)) == EXPECTED


def test_a_death_elsewhere_is_not_of_what_was_begun_here():
    """dask gave the task to another worker, which died before it came to it."""
    lot = module._Lot([7], alone=True, deaths=1, begun={0}, where="worker 0")
    assert lot.after(Died(Lost.CRASHED, "worker 1")) == ([], [module._Lot([7], alone=True, deaths=1)])
    assert lot.after(Died(Lost.CRASHED, "worker 0")) == ([module._Lot([7], alone=True, deaths=2)], [])


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


def awaited(folder: Path, items):
    """Works on an item once the file of its name is there."""
    for i, item in enumerate(items):
        wait_for((folder / item).exists)
        yield i, item


def test_a_result_comes_as_soon_as_it_is_found(tmp_path):
    """The next item of the same lot waits until the result of the last has come here."""
    (tmp_path / "0").touch()
    with local(1) as workers:
        for i, item in run(partial(awaited, tmp_path), ["0", "1", "2"], workers, chunk=3):
            assert item == str(i)
            (tmp_path / str(i + 1)).touch()
    assert (tmp_path / "3").exists()


def ticking(items):
    for i, _ in enumerate(items):
        yield i, "first"
        for _ in range(100 * LIMIT):
            time.sleep(0.01)
            yield None
        raise TimeoutError


def test_what_nobody_waits_for_any_more_is_ended():
    with local(1) as workers:
        found = run(ticking, ["a"], workers)
        assert next(found) == (0, "first")
        found.close()
        assert collect(["a"], workers) == {0: "aa"}  # there is but one process, and it was not waited for


def test_nothing_to_do_starts_nothing(monkeypatch):
    monkeypatch.setattr(worker_process, "_START", "broken")
    with local(2) as workers:
        assert collect([], workers) == {}


def test_an_error_of_the_job_is_not_swallowed():
    with local(1) as workers:
        with pytest.raises(ValueError, match="from the job") as error:
            collect(["a", "raise"], workers)
        assert 'raise ValueError("from the job")' in error.value.__notes__[0]
        assert collect(["a"], workers) == {0: "aa"}


def error_that_cannot_travel(items):
    class Local(Exception):
        pass

    raise Local("of this function alone")
    yield


def result_that_cannot_travel(items):
    yield 0, lambda: None


def too_few(items):
    yield from ()


@pytest.mark.parametrize(
    "do, message",
    [(error_that_cannot_travel, "Local: of this function"), (result_that_cannot_travel, "pickle"), (too_few, "0 res")],
)
def test_what_cannot_be_brought_here_is_an_error(do, message):
    with local(1) as workers, pytest.raises(Exception, match=message):
        collect(["a"], workers, do)


def pid(item: str) -> int:
    return os.getpid()


def test_one_that_died_with_nothing_to_do_costs_nothing():
    lost = pytest.fail
    with local(1) as workers:
        (first,) = each(pid, ["a"], workers, label="", lost=lost)
        assert each(pid, ["a"], workers, label="", lost=lost) == [first]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: not _runs(first))
        (second,) = each(pid, ["b"], workers, label="", lost=lost)
        assert second != first
    assert not _runs(second)
    with pytest.raises(RuntimeError, match="the cause"), local(1) as workers:  # and hides no error
        (first,) = each(pid, ["a"], workers, label="", lost=lost)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: not _runs(first))
        raise RuntimeError("the cause")


def noted(file: Path, items):
    for i, _ in enumerate(items):
        file.with_suffix(".part").write_text(str(os.getpid()))
        file.with_suffix(".part").rename(file)
        yield i, time.sleep(600)


def test_an_error_ends_what_is_running(tmp_path):
    def later():
        with local(2) as workers, workers.start() as execution:
            for name in ("a", "b"):
                do = module.pickle.dumps(partial(noted, tmp_path / name))
                execution.begin(0, worker_process.Task(do, (module.pickle.dumps(name),), 600.0))
            wait_for((tmp_path / "a").exists)
            wait_for((tmp_path / "b").exists)
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        later()
    assert not any(_runs(int((tmp_path / name).read_text())) for name in ("a", "b"))


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(worker_process, "_START", "raise SystemExit")
    with local(1) as workers, pytest.raises(UserError, match="3 worker processes in a row died before they began"):
        collect(["a"], workers)


class Deadly:
    """A job of which a process dies when it reads it, before there is an item to blame."""

    def __reduce__(self):
        return work, ("die",)


def test_deaths_before_the_first_item_are_nobodys_fault():
    with local(2) as workers, pytest.raises(UserError, match=r"5 worker processes in a row died .*memory for 2"):
        collect(["a", "b"], workers, Deadly())


def threads(item: str) -> tuple[set[str], int]:
    import torch

    return {os.environ[name] for name in worker_process.ONE_THREAD}, torch.get_num_threads()


def test_a_process_computes_in_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with local(1) as workers:
        assert each(threads, ["a"], workers, label="", lost=pytest.fail) == [({"1"}, 1)]
    assert os.environ["OMP_NUM_THREADS"] == "2"


UNGUARDED = """
from jaxcrystal.workers import each, local

print("started")
with local(2) as workers:
    print(each(str.upper, ["a", "b"], workers, label="", lost=print))
"""
EXECUTED = "exec(compile(__import__('sys').argv[1], '<cell>', 'exec'), {'__name__': '__main__'})"


@pytest.mark.parametrize("program", ["script", "stdin", "notebook"])
def test_any_program_may_start_them(tmp_path, program):
    """Without `if __name__ == "__main__":`, and without a file: it is not run a second time."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    arguments = {"script": ["script.py"], "stdin": ["-"], "notebook": ["-c", EXECUTED, UNGUARDED]}[program]
    text = UNGUARDED if program == "stdin" else ""
    done = subprocess.run([sys.executable, *arguments], input=text, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "started\n['A', 'B']\n", done.stderr


def test_a_function_of_the_script_itself_is_refused(tmp_path):
    text = UNGUARDED.replace("print(each(str.upper", "def mine(x): return x\n    print(each(mine")
    done = subprocess.run([sys.executable, "-"], input=text, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "UserError: worker processes do not run the script" in done.stderr
    assert "'mine'" in done.stderr and "put it into a module" in done.stderr


def in_c(folder: Path, items):
    """Hangs where no signal handler, thread or finalizer of Python's gets a turn."""
    for _ in items:
        (folder / str(os.getpid())).touch()
        re.match(r"(a+)+$", "a" * 100 + "b")
        yield 0, None


ORPHANS = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_workers import in_c, local, run

with local(2) as workers:
    list(run(partial(in_c, Path(sys.argv[2])), [0, 1], workers, chunk=1))
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(blow, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(Path(__file__).parent), str(tmp_path)],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pids = wait_for(lambda: len(files := list(tmp_path.iterdir())) == 2 and [int(file.name) for file in files])
    assert all(map(_runs, pids))
    parent.send_signal(blow)
    parent.wait(LIMIT)
    for number in pids:
        wait_for(lambda number=number: not _runs(number))


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


def test_a_dask_worker_reports_before_what_may_kill_it(monkeypatch):
    """Where the task is before it is worked on at all; that its only item has begun before that begins."""
    pytest.importorskip("distributed")
    known = []

    class Queue:
        def __init__(self, name):
            self.close = lambda: None

        def put(self, events):
            known.extend(module.pickle.loads(events))

    class Slot:
        def work(self, task):
            assert known == [(3, Started("here"))]
            yield Began(0)
            assert known[1:] == [(3, Began(0))]
            yield Found(0, b"")
            raise Died(Lost.CRASHED)

    monkeypatch.setattr("distributed.Queue", Queue)
    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(address="here"))
    monkeypatch.setattr(module, "_OF_THREAD", SimpleNamespace(slot=Slot()))
    with pytest.raises(Died) as died:
        module._work_for_dask(3, worker_process.Task(b"", (b"",), 1.0), "queue")
    assert died.value.where == "here" and known[2:] == [(3, Found(0, b""))]


@pytest.fixture
def cluster(tmp_path):
    """Starts dask's own programs on this machine: a scheduler, and workers when they are needed."""
    pytest.importorskip("distributed")
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(tmp_path / "scheduler.json")]
        # The workers find this module.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "0"  # or it tries each task four times
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    scheduler = start("scheduler", "--port", "0", "--no-dashboard")
    wait_for((tmp_path / "scheduler.json").exists)
    address = json.loads((tmp_path / "scheduler.json").read_text())["address"]
    yield partial(start, "worker"), address, scheduler
    for process in reversed(started):
        process.terminate()
        process.wait(LIMIT)


@pytest.mark.slow
def test_dasks_workers_are_as_our_own(cluster, tmp_path, monkeypatch):
    """A real scheduler; processes that die, hang, or take the worker with them, workers that have all gone."""
    start, address, scheduler = cluster
    with pytest.raises(UserError, match="has no workers"), dask(address):
        pass
    nanny = start("--nworkers", "2", "--nthreads", "1")
    with _with(address, 1, 1) as workers:
        assert collect(ITEMS, workers) == EXPECTED
        items = ["a", "kill parent", "b", "c", "d"]
        found = collect(items, workers, chunk=2)
        assert found == {0: "aa", 1: Lost.CRASHED, 2: "bb", 3: "cc", 4: "dd"}
        assert collect(["sleep"], workers, timeout=0.5) == {0: Lost.TIMEOUT}
        with pytest.raises(ValueError, match="from the job"):
            collect(["raise"], workers)
        (tmp_path / "0").touch()
        for i, _ in run(partial(awaited, tmp_path), ["0", "1", "2"], workers, chunk=3):
            (tmp_path / str(i + 1)).touch()
        nanny.terminate()
        nanny.wait(LIMIT)
        wait_for_workers(address)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="are gone"):
            patch.setattr(module, "CONNECT", 1)
            collect(["a"], workers)
    of_two_threads = start("--nworkers", "1", "--nthreads", "2")
    with pytest.raises(UserError, match="--nthreads 1"), _with(address, 2):
        pass
    of_two_threads.terminate()
    of_two_threads.wait(LIMIT)
    start("--nworkers", "1", "--nthreads", "1")
    with _with(address, 1) as workers:
        found = run(ticking, ["a"], workers)
        next(found)
        scheduler.kill()
        with pytest.raises(UserError, match=r"scheduler at .* is gone"):
            next(found)


def wait_for_workers(address: str, *threads: int) -> None:
    """Until the scheduler knows of workers of so many threads, and of no others."""
    import distributed

    with distributed.Client(address, timeout=LIMIT) as client:
        wait_for(lambda: tuple(client.nthreads().values()) == threads)


@contextmanager
def _with(address: str, *threads: int):
    wait_for_workers(address, *threads)
    with dask(address) as workers:
        assert workers.slots == len(threads)
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
