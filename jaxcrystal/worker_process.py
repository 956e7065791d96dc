"""A process that works on items one job after the other, and the handle by which another process runs it.

    Slot (here)                              serve (in the process)
      job, [item, item, …]  ───────────▶     for found in job(items):
      Began(i)              ◀───────────         the job takes item i
      Found(i, result)      ◀───────────         it yields (i, result)
      None, a sign of life  ◀───────────         it yields None
      Ended(error or None)  ◀───────────

Each message is sent at once, so that whoever runs the process knows, when it dies, which items it had begun on and had
no result of. The watchdog is here, not in the process, so that it ends what hangs in C too and knows that it did.

The process is started by `python -c`. multiprocessing would import the program's main module into it, which runs a
script without `if __name__ == "__main__":` a second time and is not there at all in a notebook.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from jaxcrystal.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

#: What works on items: takes them one by one, yields the position and result of each, in any order, and None as a sign
#: of life between them.
Job = Callable[[Iterable[T]], Iterator[tuple[int, R] | None]]

#: Least time in seconds that a process has to import and load what its job needs, before it begins on an item.
LOADING = 600.0

#: Seconds between two looks at whether a silent process is to be ended.
LOOK = 0.5

#: One process a core: threads of the numerical libraries would compete for the same cores. Read when they are imported.
ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "BLIS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMEXPR_NUM_THREADS",
    ),
    "1",
)

#: Ctrl-C is for the program that started the process, and then ends it.
_START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "from multiprocessing.connection import Connection\n"
    "connection = Connection({})\n"
    "sys.path[:] = connection.recv()\n"
    "from jaxcrystal.worker_process import serve\n"
    "serve(connection)"
)


class Lost(StrEnum):
    """Why an item has no result."""

    TIMEOUT = "timeout"
    CRASHED = "crashed"

    @property
    def reason(self) -> str:
        """In words."""
        return "the process that worked on it " + ("hung" if self is Lost.TIMEOUT else "died")


class Died(Exception):
    """The process is gone, by itself (`crashed`) or ended by the watchdog (`timeout`).

    `where`: the address of the dask worker that ran it; `worker`: whether that died too, perhaps with unsent messages.
    """

    def __init__(self, lost: Lost, where: str | None = None, worker: bool = False) -> None:
        super().__init__(lost, where, worker)
        self.lost, self.where, self.worker = lost, where, worker


@dataclass(frozen=True)
class Task:
    """A job on some items, pickled one by one: what cannot be unpickled costs itself."""

    job: bytes
    items: tuple[bytes, ...]
    timeout: float  #: seconds without a message after which the process is ended
    new: bool = False  #: whether it takes a process that has done nothing yet


@dataclass(frozen=True)
class Began:
    """The job takes the item at this position. If it is the only one, not before this message was passed on."""

    position: int


@dataclass(frozen=True)
class Found:
    """The result of the item at this position, pickled."""

    position: int
    result: bytes


@dataclass(frozen=True)
class Ended:
    """The job has no more results: it is done, has raised, or its process has `Died`."""

    error: Exception | None = None


class Slot:
    """Room for one process: started when there is work, and anew when it has died or a task takes a new one."""

    def __init__(self) -> None:
        self._process: _Process | None = None
        self._lock, self._closed = threading.Lock(), False

    def work(self, task: Task) -> Iterator[Began | Found | None]:
        """Yields what the process reports, and None where it reports nothing for `LOOK` seconds.

        Closing the iterator before its end ends the process.
        Raises what the job raises, and `Died` if the process dies or is silent for too long.
        """
        if self._process is not None and task.new and self._process.used:
            self._end()
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        try:
            yield from process.work(task)
        finally:
            if not process.idle:
                self._end()

    def kill(self) -> None:
        """From another thread than `work`'s: its process dies, and no other starts."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise Died(Lost.CRASHED)
            self._process = _Process()

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.end()

    def close(self) -> None:
        """Ends the process, once no thread is in `work`."""
        self.kill()
        self._end()


class _Process:
    """The handle of one process."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self.used, self.idle = False, True
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", _START.format(theirs.fileno())],
                stdin=subprocess.PIPE,  # whose end is the sign for the process to end
                pass_fds=[theirs.fileno()],
                env=os.environ | ONE_THREAD,
            )

    def work(self, task: Task) -> Iterator[Began | Found | None]:
        self.idle = False
        try:
            if not self.used:
                self._connection.send(sys.path)
            self.used = True
            self._connection.send((task.job, task.items))
        except OSError:
            raise Died(Lost.CRASHED) from None
        silent, limit = 0.0, max(task.timeout, LOADING)  # seconds; those in which we are stopped ourselves do not count
        while True:
            if not _comes(self._connection, look := min(LOOK, limit - silent)):
                silent += look
                if silent >= limit:
                    raise Died(Lost.TIMEOUT)
                yield None
                continue
            event, silent = self._receive(), 0.0
            if isinstance(event, Ended):
                break
            yield event
            if isinstance(event, Began):
                limit = task.timeout
                if len(task.items) == 1:
                    with suppress(OSError):  # it has died meanwhile
                        self._connection.send(None)
        self.idle = True
        if event.error is not None:
            raise event.error

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise Died(Lost.CRASHED) from None

    def kill(self) -> None:
        self._child.kill()

    def end(self) -> None:
        self.kill()
        self._child.wait()
        self._connection.close()
        assert self._child.stdin is not None
        self._child.stdin.close()


def _comes(connection: Connection, seconds: float) -> bool:
    """Whether a message, or the end, comes within so many seconds."""
    return connection.poll(seconds)


def serve(connection: Connection) -> None:
    """In the process: does one job after the other."""
    os.set_inheritable(connection.fileno(), False)
    _end_with_the_parent()
    while True:
        try:
            job, items = connection.recv()
        except EOFError:
            return
        connection.send(Ended(_error_of(connection, job, items)))


def _end_with_the_parent() -> None:
    """The kernel ends us when the parent's end of our standard input closes, be it that the parent was killed.

    SIGIO, whose default is to end the process, needs neither a thread nor the interpreter, which may hang in C.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _error_of(connection: Connection, job: bytes, items: Sequence[bytes]) -> Exception | None:
    """Does the job, sending its results; what it raises."""
    try:
        for found in _unpickled(job)(_taken(connection, items)):
            connection.send(None if found is None else Found(found[0], pickle.dumps(found[1])))
    except Exception as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:  # some exceptions cannot be pickled, or not be made again
            return RuntimeError(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
    return None


def _taken(connection: Connection, items: Sequence[bytes]) -> Iterator[Any]:
    for position, item in enumerate(items):
        connection.send(Began(position))
        if len(items) == 1:
            connection.recv()
        yield _unpickled(item)


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except AttributeError as error:
        if "__main__" not in str(error):
            raise
        raise UserError(
            f"worker processes do not run the script or notebook that starts them, and so lack what it defines "
            f"({error}): put it into a module and import it, or work without worker processes"
        ) from None
