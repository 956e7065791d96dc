"""Work on many crystals in other processes, of which none can take the others with it.

    items ──chunks──▶ Executor ──▶ results
                         │
                         └─ a chunk whose process died ──▶ its two halves … one item, and it dies again ──▶ Lost

The Executor is `Processes` on this machine, or dask's on a cluster. A process that shows no sign of life for `timeout`
seconds ends itself. Its watchdog is faulthandler's, which runs beside Python, so that it ends what hangs in C too.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from jaxcrystal.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

#: Seconds without a sign of life after which a process is given up.
TIMEOUT = 600.0
#: Items that are sent to a process at once.
CHUNK = 50
#: Seconds to wait for a scheduler's answer, and between two looks whether anybody still works.
CONNECT = 30


class Lost(StrEnum):
    """Why an item has no result."""

    TIMEOUT = "timeout"
    CRASHED = "crashed"

    @property
    def reason(self) -> str:
        """In words."""
        return "the process that worked on it " + ("hung" if self is Lost.TIMEOUT else "died")


#: What works on items: yields the position and result of each, in any order, and None as a sign of life between them.
Job = Callable[[Sequence[T]], Iterator[tuple[int, R] | None]]


@dataclass(frozen=True)
class Workers:
    """Where work is done."""

    executor: Executor = field(compare=False)
    slots: int  #: jobs that it does at once
    one_machine: bool = False  #: whether its processes share a machine, and so its GPU
    deaths: tuple[type[Exception], ...] = (BrokenProcessPool,)  #: what it raises for a process that died
    #: Raises UserError if there is nobody left to work.
    check: Callable[[], None] = field(default=lambda: None, compare=False)


class Processes(Executor):
    """`count` processes on this machine, each started when it is needed; for one that died the next job starts another.

    concurrent.futures' own pool is lost as a whole when one of its processes dies, so here each is a pool of one.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count)  # each job's thread waits for its process
        self._free: queue.LifoQueue[ProcessPoolExecutor | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)
        self._pids: dict[ProcessPoolExecutor, int] = {}
        self._ended = False

    def submit(self, function: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        return self._threads.submit(self._in_a_process, partial(function, *args, **kwargs))

    def _in_a_process(self, job: Callable[[], R]) -> R:
        pool = self._free.get()
        try:
            try:
                pool = pool or self._start()
                running = pool.submit(job)
            except BrokenProcessPool:  # it died while it had nothing to do: not of this job
                self._forget(pool)
                pool = None
                pool = self._start()
                running = pool.submit(job)
            return running.result()
        except BrokenProcessPool:
            self._forget(pool)
            pool = None
            raise
        finally:
            self._free.put(pool)

    def _forget(self, pool: ProcessPoolExecutor) -> None:
        self._pids.pop(pool, None)
        pool.shutdown()

    def _start(self) -> ProcessPoolExecutor:
        # spawn, for a forked process would inherit the locks of torch's and jax's threads.
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self._pids[pool] = pool.submit(_first_job).result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died before it had a job. Is there memory for one more? "
                "And does a script that starts them do so below `if __name__ == '__main__':`?"
            ) from None
        if self._ended:
            os.kill(self._pids[pool], signal.SIGKILL)
        return pool

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """With `cancel_futures` running jobs are ended too."""
        if cancel_futures:
            self._ended = True
            for pid in list(self._pids.values()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._threads.shutdown(wait=True, cancel_futures=cancel_futures)
        for pool in self._pids:
            pool.shutdown()
        self._pids.clear()


def _first_job() -> int:
    """In a process of its own: sees to it that it does not outlive us, however we end; its number."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    return os.getpid()


@contextmanager
def local(count: int = 2) -> Iterator[Workers]:
    """`count` processes on this machine. Raises UserError for less than one."""
    if count < 1:
        raise UserError(f"{count} workers cannot do anything; at least 1 is needed")
    processes = Processes(count)
    try:
        yield Workers(processes, count, one_machine=True)
    except BaseException:
        processes.shutdown(cancel_futures=True)
        raise
    processes.shutdown()


@contextmanager
def dask(address: str) -> Iterator[Workers]:
    """The workers of dask's scheduler at `address`, such as tcp://10.0.0.1:8786; each must be a process of one thread.

    Raises UserError if dask is not installed, nobody answers, there is no worker, or one has several threads.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("dask is not installed; pip install 'jaxcrystal[dask]'") from None
    try:
        client = Client(address, timeout=CONNECT)
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"no dask scheduler answers at {address}: {' '.join(str(error).split())}") from None
    with client:
        threads = client.nthreads()
        if not threads:
            raise UserError(f"the dask scheduler at {address} has no workers; start some: dask worker {address}")
        if max(threads.values()) > 1:
            raise UserError(
                "a dask worker has several threads, which would share one watchdog and torch; "
                f"start each as a process of its own: dask worker {address} --nthreads 1 --nworkers N"
            )

        def check() -> None:
            try:
                client.wait_for_workers(1, timeout=CONNECT)
            except TimeoutError:
                raise UserError(f"all dask workers at {address} are gone; start some, and run this again") from None

        try:
            yield Workers(client.get_executor(pure=False), len(threads), deaths=(KilledWorker,), check=check)
        except CancelledError:
            raise UserError(f"the dask scheduler at {address} is gone; start it, and run this again") from None


def run(
    job: Job[T, R], items: Sequence[T], workers: Workers, *, chunk: int | None = None, timeout: float = TIMEOUT
) -> Iterator[tuple[int, R | Lost]]:
    """Yields the index and result of each item as they come, or (index, Lost).

    `job` and the items are pickled; an exception that `job` raises is raised.
    """
    chunk = chunk or CHUNK
    waiting = deque(range(len(items))[start : start + chunk] for start in range(0, len(items), chunk))
    running: dict[Future[list[R]], tuple[Sequence[int], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers.slots:
                indices = waiting.popleft()
                future = workers.executor.submit(_watched, job, [items[i] for i in indices], timeout)
                running[future] = indices, time.monotonic()
            while not (done := wait(running, timeout=CONNECT, return_when=FIRST_COMPLETED)[0]):
                workers.check()
            ended: list[tuple[int, R | Lost]] = []
            for future in done:
                indices, began = running.pop(future)
                try:
                    ended += zip(indices, future.result(), strict=True)
                except workers.deaths:
                    if len(indices) > 1:
                        waiting.extend((indices[: len(indices) // 2], indices[len(indices) // 2 :]))
                    else:
                        hung = time.monotonic() - began >= timeout
                        ended.append((indices[0], Lost.TIMEOUT if hung else Lost.CRASHED))
            yield from ended
    finally:
        for future in running:
            future.cancel()


def _watched(job: Job[T, R], items: Sequence[T], timeout: float) -> list[R]:
    """In another process: the results of all items, in their order."""
    results: dict[int, R] = {}
    with open(os.devnull, "w") as nowhere:
        try:
            faulthandler.dump_traceback_later(timeout, exit=True, file=nowhere)
            for said in job(items):
                faulthandler.dump_traceback_later(timeout, exit=True, file=nowhere)
                if said is not None:
                    results[said[0]] = said[1]
        finally:
            faulthandler.cancel_dump_traceback_later()
    return [results[i] for i in range(len(items))]


def each(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: Workers | None,
    *,
    label: str,
    lost: Callable[[T, Lost], R],
) -> list[R]:
    """`[function(item) for item in items]` with a progress bar; `lost(item, why)` for one that its process died of.

    Without `workers` it is done in this process, which then dies of what they would die of.
    """
    return _all(partial(_one_by_one, function), items, workers, label, lost)


def each_chunk(
    function: Callable[[Sequence[T]], list[R]],
    items: Sequence[T],
    workers: Workers | None,
    *,
    label: str,
    lost: Callable[[T, Lost], R],
) -> list[R]:
    """As `each`, for a function that is faster with many items at once: it is given up to `CHUNK` of them."""
    return _all(partial(_at_once, function), items, workers, label, lost)


def _one_by_one(function: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    return ((i, function(item)) for i, item in enumerate(items))


def _at_once(function: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> Iterator[tuple[int, R]]:
    for start in range(0, len(items), CHUNK):
        yield from enumerate(function(items[start : start + CHUNK]), start)


def _all(
    job: Job[T, R], items: Sequence[T], workers: Workers | None, label: str, lost: Callable[[T, Lost], R]
) -> list[R]:
    results: dict[int, R] = {}
    found = job(items) if workers is None else run(job, items, workers)
    with tqdm(total=len(items), desc=label, unit="crystal", mininterval=0.5, disable=not items) as bar:
        for i, result in found:
            results[i] = lost(items[i], result) if isinstance(result, Lost) else result
            bar.update()
    return [results[i] for i in range(len(items))]
