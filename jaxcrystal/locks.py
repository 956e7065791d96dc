"""One job an output: whoever writes holds a lock, and a second one with the same output is refused at once.

The lock is a file `.NAME.lock` beside the output (in it, if it is a folder whose parent cannot be written), which says
who holds it and since when. It is held by `flock`, which the kernel releases however the process ends, so that a killed
job never blocks the next. Where hosts share a disk but not its locks, and where a disk has no locks, its modification
time decides: the holder renews it every `BEAT` seconds, and a lock that is older than `STALE` seconds has no holder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from jaxcrystal.errors import UserError
from jaxcrystal.paths import local

P = ParamSpec("P")
R = TypeVar("R")

BEAT = 10.0  #: s
STALE = 60.0  #: s
INSIDE = ".lock"  #: name of a lock that lies in the output


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    kernel: str  #: processes of one kernel see each other's `flock`
    pid: int
    since: str

    @classmethod
    def this(cls) -> Holder:
        try:
            kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            kernel = socket.gethostname()
        return cls(socket.gethostname(), kernel, os.getpid(), datetime.now(UTC).isoformat(" ", "seconds"))

    @classmethod
    def read(cls, file: int) -> Holder | None:
        """What the file says; None if its writer was killed before it said anything."""
        try:
            return cls(**json.loads(os.pread(file, 4096, 0)))
        except (ValueError, TypeError):
            return None

    def write(self, file: int) -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(self)).encode(), 0)


@contextmanager
def held(out: str | Path) -> Iterator[None]:
    """Holds the lock of the output `out`; its file is removed at the end.

    Raises UserError if another process, here or on another host, writes the same output, and for an output in a store,
    which has no locks (`paths.on_disk` says what is locked in its place). Where no lock file can be made nothing is
    held: there `out` cannot be written either, and who writes it says why.
    """
    path, us = place(local(out)), Holder.this()
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path, us, out)
    except OSError:
        yield
        return
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(file, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with suppress(OSError):
            if _is_at(file, path) and Holder.read(file) == us:
                path.unlink()
        os.close(file)
        with suppress(OSError):  # a folder that was made for the lock alone goes with it
            for folder in missing:
                folder.rmdir()


def holds(
    out: Callable[P, str | Path], how: Callable[[str | Path], AbstractContextManager[None]] = held
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: each call holds the lock of the output that `out` finds in its arguments."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> R:
            with how(out(*args, **kwargs)):
                return function(*args, **kwargs)

        return alone

    return decorate


def place(out: Path) -> Path:
    """Of the lock file of an output, whatever links lead to it."""
    real = Path(os.path.realpath(out))
    if not real.name:
        raise UserError(f"{out} is the root of a disk; name a file or folder on it")
    if real.is_dir() and not os.access(real.parent, os.W_OK):
        return real / INSIDE
    return real.with_name(f".{real.name}{INSIDE}")


def is_lock(path: Path) -> bool:
    """Whether a file is a lock, and so no part of what a folder holds."""
    return path.name.startswith(".") and path.name.endswith(INSIDE)


def _take(path: Path, us: Holder, out: str | Path) -> int:
    """The lock file, open and ours. Raises UserError if it is another's."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # programs that we start do not inherit it
        try:
            shared = _flock(file)
            if _is_at(file, path):
                found = Holder.read(file)
                if found is not None and (not shared or found.kernel != us.kernel) and _age(file, path) < STALE:
                    raise _refusal(out, found)
                try:
                    us.write(file)
                except OSError:  # a full disk
                    path.unlink()
                    raise
                os.utime(file)
                with suppress(OSError):  # another user's next job opens it too
                    os.fchmod(file, 0o666)
                return file
        except BlockingIOError:
            found = Holder.read(file)
            os.close(file)
            raise _refusal(out, found) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its holder removed it just now


def _flock(file: int) -> bool:
    """Whether the disk has such locks; this one is then ours. Raises BlockingIOError if it is another's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            return False
        raise
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _age(file: int, path: Path) -> float:
    """Seconds since the file was renewed, by the clock of its disk: hosts' clocks differ."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(file).st_mtime


def _renew(file: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)


def _refusal(out: str | Path, holder: Holder | None) -> UserError:
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.since}"
    return UserError(f"{out} is being written by {who}; wait for its end, or choose another output")
