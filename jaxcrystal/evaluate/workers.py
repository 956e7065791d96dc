"""Many jobs in processes, of which none can take the others with it.

Each worker is an executor of one process. A job that kills its process, or takes too long and is killed, costs itself
and that process; a fresh one takes the next job.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from enum import StrEnum
from typing import Any

from jaxcrystal.errors import UserError


class Lost(StrEnum):
    """Why a job has no result."""

    TIMEOUT = "timeout"
    CRASHED = "crashed"


class _Worker:
    """One process, replaced when it dies. `prepare(*args)` runs once in each, before any job."""

    def __init__(self, prepare: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._prepare, self._args = prepare, args
        self._start()

    def _start(self) -> None:
        # spawn, for a forked process would inherit the locks of torch's and jax's threads.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=self._prepare, initargs=self._args)
        self._pid = self._pool.submit(os.getpid)
        self.deadline = float("inf")
        self.killed = False

    def submit(self, job: Callable[[Any], Any], item: Any, timeout: float) -> Future[Any]:
        """Starts the job; its time begins when the process is ready."""
        try:
            self._pid.result()
            future = self._pool.submit(job, item)
        except BrokenProcessPool:
            raise UserError("a worker process died before it had a job; is there memory for one more?") from None
        self.deadline = time.monotonic() + timeout
        return future

    def kill_if_late(self) -> None:
        if time.monotonic() > self.deadline and not self.killed:
            self.killed = True
            os.kill(self._pid.result(), signal.SIGKILL)

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def run(
    job: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int,
    timeout: float,
    prepare: Callable[..., None],
    args: tuple[Any, ...] = (),
) -> Iterator[tuple[int, Any | Lost]]:
    """Yields (index, `job(item)`) as they come, or (index, Lost) for a job that died or took over `timeout` seconds.

    `job` and `prepare` are functions of a module, as processes need them. An exception that `job` raises is raised.
    """
    waiting = iter(enumerate(items))
    pool = [_Worker(prepare, args) for _ in range(min(workers, len(items)))]
    running: dict[Future[Any], tuple[_Worker, int]] = {}

    def start_next(worker: _Worker) -> None:
        if following := next(waiting, None):
            index, item = following
            running[worker.submit(job, item, timeout)] = (worker, index)

    try:
        for worker in pool:
            start_next(worker)
        while running:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                worker, index = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    result = Lost.TIMEOUT if worker.killed else Lost.CRASHED
                if worker.killed or isinstance(result, Lost):
                    worker.restart()
                # The next job starts before the result is handed out, so that the process does not wait for the caller.
                start_next(worker)
                yield index, result
            for worker, _ in running.values():
                worker.kill_if_late()
    finally:
        for worker in pool:
            worker.close()
