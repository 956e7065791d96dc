"""Work on many crystals in other processes, of which none can take the others with it.

    items ──lots──▶ a process each ──▶ results, one by one
                        │
                        └─ it dies ──▶ again: what it had not begun on, as before; what it was at, in two halves …
                                       … one item, alone in a new process, and once more ──▶ Lost

So an item is `Lost` only if two processes died that had worked on nothing else: one may be killed for want of memory or
by hand, and others may be at work beside. The processes are started on this machine (`local`), or by dask's workers on
a cluster (`dask`), whose own processes run no job.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from jaxcrystal.errors import UserError
from jaxcrystal.worker_process import Began, Died, Ended, Found, Job, Lost, R, Slot, T, Task

if TYPE_CHECKING:
    from distributed import Client, Future

#: Seconds without a sign of life after which a process is given up.
TIMEOUT = 600.0
#: Items that are sent to a process at once.
CHUNK = 50
#: Times that an item must be lost alone.
DEATHS = 2
#: Seconds to wait for a scheduler, and between two looks whether any worker of it is left.
CONNECT = 30
#: Least seconds between two messages that a dask worker sends, each with all that was found since the last.
POST = 0.5


@dataclass(frozen=True)
class Started:
    """A worker begins on a task, perhaps once more; `where`: its address, if it is on another machine."""

    where: str | None = None


Event = Started | Began | Found | Ended


class Execution(Protocol):
    """Tasks that are being worked on."""

    def begin(self, number: int, task: Task) -> None:
        """Has the task done. Its events are `Started`, then those of `Slot.work`, then `Ended`."""

    def next(self) -> tuple[int, Event]:
        """Waits for the next event of any task. Raises UserError if there is no worker left."""


@dataclass(frozen=True)
class Workers:
    """Where work is done."""

    start: Callable[[], AbstractContextManager[Execution]] = field(compare=False)
    slots: int  #: tasks that it works on at once
    one_machine: bool = False  #: whether its processes share a machine, and so its GPU


@contextmanager
def local(processes: int = 2) -> Iterator[Workers]:
    """So many processes on this machine, each started when it is needed. Raises UserError for less than one."""
    if processes < 1:
        raise UserError(f"{processes} workers cannot do anything; at least 1 is needed")
    slots = [Slot() for _ in range(processes)]
    threads = ThreadPoolExecutor(processes)  # the thread of a task waits for its process
    free: queue.LifoQueue[Slot] = queue.LifoQueue()  # last in, first out: what one has loaded is used again
    for slot in slots:
        free.put(slot)

    @contextmanager
    def start() -> Iterator[Execution]:
        execution = _Local(threads, free)
        try:
            yield execution
        finally:
            execution.stopped = True

    try:
        yield Workers(start, processes, one_machine=True)
    finally:
        for slot in slots:
            slot.kill()
        threads.shutdown(cancel_futures=True)
        for slot in slots:
            slot.close()


@contextmanager
def chosen(workers: int | str) -> Iterator[Workers | None]:
    """So many processes on this machine, or the workers of a scheduler by its address; 0: None. Raises as these."""
    if workers == 0:
        yield None
        return
    with dask(workers) if isinstance(workers, str) else local(workers) as pool:
        yield pool


class _Local(Execution):
    """Threads of this process that each wait for a process of their own."""

    def __init__(self, threads: ThreadPoolExecutor, free: queue.LifoQueue[Slot]) -> None:
        self._threads, self._free = threads, free
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self.next = self._events.get
        self.stopped = False

    def begin(self, number: int, task: Task) -> None:
        self._threads.submit(self._work, number, task)

    def _work(self, number: int, task: Task) -> None:
        slot, error = self._free.get(), None
        self._events.put((number, Started()))
        try:
            with closing(slot.work(task)) as events:
                for event in events:
                    if self.stopped:  # nobody waits for the rest
                        break
                    if event is not None:
                        self._events.put((number, event))
        except Exception as raised:
            error = raised
        finally:
            self._free.put(slot)
            self._events.put((number, Ended(error)))


@contextmanager
def dask(address: str) -> Iterator[Workers]:
    """The workers of dask's scheduler at `address`, such as tcp://10.0.0.1:8786; each must be a process of one thread.

    Each starts a process that does the work, so that it survives whatever happens to that.
    Raises UserError if dask is not installed, nobody answers, there is no worker, or one has several threads.
    """
    try:
        from distributed import Client
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
                "a dask worker has several threads, and would take what works beside a crystal down with it; "
                f"start each as a process of its own: dask worker {address} --nthreads 1 --nworkers N"
            )

        @contextmanager
        def start() -> Iterator[Execution]:
            execution = _Dask(client, address)
            try:
                yield execution
            finally:
                execution.stop()

        yield Workers(start, len(threads))


class _Dask(Execution):
    """Tasks of dask, whose events come through a queue of its scheduler."""

    def __init__(self, client: Client, address: str) -> None:
        from distributed import Queue

        self._client, self._address = client, address
        self._queue = Queue(client=client)
        self._events: deque[tuple[int, Event | None]] = deque()
        self._futures: dict[int, Future] = {}

    def begin(self, number: int, task: Task) -> None:
        future = self._client.submit(_work_for_dask, number, task, self._queue.name, pure=False)
        self._futures[number] = future
        future.add_done_callback(partial(self._mark_end, number))

    def _mark_end(self, number: int, future: Future) -> None:
        """None in the queue, behind all that the task has put there."""
        if number in self._futures and not future.cancelled():
            self._queue.put(pickle.dumps([(number, None)]))

    def next(self) -> tuple[int, Event]:
        while not self._events:
            try:
                self._events.extend(pickle.loads(self._queue.get(timeout=CONNECT)))
            except TimeoutError:
                self._check()
            except (OSError, CancelledError):
                raise self._gone() from None
        number, event = self._events.popleft()
        return number, self._end(number) if event is None else event

    def _end(self, number: int) -> Ended:
        from distributed import KilledWorker

        error = self._futures.pop(number).exception()
        if isinstance(error, KilledWorker):
            error = Died(Lost.CRASHED, error.last_worker.address, worker=True)
        return Ended(error)

    def _check(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=CONNECT)
        except TimeoutError:
            raise UserError(f"all dask workers at {self._address} are gone; start some, and run this again") from None
        except (OSError, CancelledError):
            raise self._gone() from None

    def _gone(self) -> UserError:
        return UserError(f"the dask scheduler at {self._address} is gone; start it, and run this again")

    def stop(self) -> None:
        futures = list(self._futures.values())
        self._futures.clear()
        self._client.cancel(futures)
        self._queue.close()


_OF_THREAD = threading.local()


def _work_for_dask(number: int, task: Task, name: str) -> None:
    """In a dask worker: has its own process do the task, and sends its events to the queue of that name."""
    from distributed import Queue, get_worker

    if not hasattr(_OF_THREAD, "slot"):
        _OF_THREAD.slot = Slot()
    where, outbox = get_worker().address, Queue(name)
    outbox.put(pickle.dumps([(number, Started(where))]))  # before anything that may take this worker with it
    unsent: list[tuple[int, Event]] = []
    sent = time.monotonic()
    try:
        with closing(_OF_THREAD.slot.work(task)) as events:
            for event in events:
                if event is not None:
                    unsent.append((number, event))
                due = time.monotonic() - sent >= POST or (isinstance(event, Began) and len(task.items) == 1)
                if unsent and due:
                    outbox.put(pickle.dumps(unsent))
                    unsent, sent = [], time.monotonic()
    except Died as died:
        raise Died(died.lost, where) from None
    finally:
        if unsent:
            outbox.put(pickle.dumps(unsent))
        outbox.close()


@dataclass
class _Lot:
    """Items that a process is sent together."""

    indices: Sequence[int]
    alone: bool = False  #: one that was lost before; done by itself in a new process
    deaths: int = 0  #: of processes that were new and had begun on it alone
    begun: set[int] = field(default_factory=set)  #: positions that the present process has begun on
    found: set[int] = field(default_factory=set)  #: positions that have a result
    where: str | None = None

    def after(self, died: Died) -> tuple[list[_Lot], list[_Lot]]:
        """What is to be done again: the items that the process was at, in halves, and those that still wait."""
        begun = self.begun
        if died.where != self.where:  # the worker had not come to this task
            begun = set()
        elif died.worker and len(self.indices) > 1:  # its last messages may be missing
            begun = set(range(len(self.indices)))
        left = [position for position in range(len(self.indices)) if position not in self.found]
        at = [self.indices[position] for position in left if position in begun]
        waiting = [self.indices[position] for position in left if position not in begun]
        halves = [half for half in (at[: len(at) // 2], at[len(at) // 2 :]) if half]
        deaths = self.deaths + self.alone
        again = [_Lot(half, len(half) == 1, deaths) for half in halves]
        return again, [_Lot(waiting, self.alone, self.deaths)] if waiting else []


def run(
    job: Job[T, R], items: Sequence[T], workers: Workers, *, chunk: int | None = None, timeout: float = TIMEOUT
) -> Iterator[tuple[int, R | Lost]]:
    """Yields the index and result of each item as soon as it is found, or (index, Lost). `chunk`: items of a lot.

    `job` and the items are pickled; an exception that `job` raises is raised.
    Raises UserError if processes die again and again before they begin on an item.
    """
    chunk, code = chunk or CHUNK, pickle.dumps(job)
    waiting = deque(_Lot(range(len(items))[start : start + chunk]) for start in range(0, len(items), chunk))
    running: dict[int, _Lot] = {}
    numbers, idle_deaths = count(), 0
    with workers.start() as execution:
        while waiting or running:
            while waiting and len(running) < workers.slots:
                lot, number = waiting.popleft(), next(numbers)
                running[number] = lot
                pickled = tuple(pickle.dumps(items[i]) for i in lot.indices)
                execution.begin(number, Task(code, pickled, timeout, new=lot.alone))
            number, event = execution.next()
            if number not in running:
                continue  # from a dask worker that was given up and lives
            lot = running[number]
            match event:
                case Started(where):
                    lot.where, lot.begun = where, set()
                case Began(position):
                    lot.begun.add(position)
                    idle_deaths = 0
                case Found(position, result):
                    if position not in lot.found:
                        lot.found.add(position)
                        yield lot.indices[position], pickle.loads(result)
                case Ended(Died() as died):
                    del running[number]
                    at, rest = lot.after(died)
                    if at and at[0].deaths == DEATHS:
                        yield lot.indices[0], died.lost
                        continue
                    waiting.extendleft(rest + at)
                    idle_deaths += not at
                    if idle_deaths > 2 * workers.slots:
                        raise UserError(
                            f"{idle_deaths} worker processes in a row died before they began on a crystal "
                            f"({died.lost.reason}). Is there memory for {workers.slots} of them?"
                        )
                case Ended(None):
                    del running[number]
                    if len(lot.found) != len(lot.indices):
                        raise RuntimeError(f"{job} gave {len(lot.found)} results for {len(lot.indices)} items")
                case Ended(error):
                    raise error


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
    return _all(partial(_at_once, function, CHUNK), items, workers, label, lost)


def _one_by_one(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[int, R]]:
    return ((i, function(item)) for i, item in enumerate(items))


def _at_once(function: Callable[[Sequence[T]], list[R]], size: int, items: Iterable[T]) -> Iterator[tuple[int, R]]:
    start, items = 0, iter(items)
    while some := list(islice(items, size)):
        yield from enumerate(function(some), start)
        start += len(some)


def _all(
    job: Job[T, R], items: Sequence[T], workers: Workers | None, label: str, lost: Callable[[T, Lost], R]
) -> list[R]:
    results: dict[int, R] = {}
    found: Iterable[Any] = job(items) if workers is None else run(job, items, workers)
    with tqdm(total=len(items), desc=label, unit="crystal", mininterval=0.5, disable=not items) as bar:
        for i, result in found:
            results[i] = lost(items[i], result) if isinstance(result, Lost) else result
            bar.update()
    return [results[i] for i in range(len(items))]
