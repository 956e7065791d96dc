"""Where a model lies: in a folder of this machine, or as `gs://BUCKET/FOLDER` in Google Cloud Storage, the store.

A store holds objects, each put and read whole: nothing is appended to, renamed or locked there, and a folder is only
what names have in common. Objects are read and written through `etils.epath`, as Orbax does. What of a run needs a disk
(its journal while it grows, its lock) lies in the local folder `on_disk(PATH)`.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from etils import epath

#: A local `Path`, or a path in a store.
AnyPath: TypeAlias = "Path | epath.Path"

STORE = "gs://"
UNFINISHED = ".unfinished"  #: what `write` adds to a name until all is written


def is_remote(path: str | AnyPath) -> bool:
    """Whether it lies in a store. `Path("gs://b")`, which pathlib reads as `gs:/b`, is taken for what was meant."""
    return str(path).startswith("gs:/")


def as_path(path: str | AnyPath) -> AnyPath:
    """The path that reads and writes there. Raises UserError if the client of the store is not installed."""
    if not is_remote(path):
        return Path(path)
    import fsspec
    from etils import epath

    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError:
        raise UserError(f"{path} needs gcsfs; install it with `pip install 'jaxcrystal[gcs]'`") from None
    return epath.Path(STORE + _key(path))


def local(path: str | Path) -> Path:
    """`path`, which must lie on a disk. Raises UserError if it lies in a store."""
    if is_remote(path):
        raise UserError(
            f"{STORE}{_key(path)}: only model directories can lie in a store; give a local path here, and copy with "
            "`gcloud storage cp`"
        )
    return Path(path)


def on_disk(path: str | AnyPath) -> Path:
    """The local path that goes with one in a store, runs/BUCKET/FOLDER; a local path itself."""
    return Path("runs", _key(path)) if is_remote(path) else Path(path)


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root, links resolved; one in a store itself."""
    return path if is_remote(path) else path.resolve()


def relative(path: str | AnyPath, folder: str | AnyPath) -> str:
    """`path` as it is reached from `folder`, so that both can be moved together; `joined` is the inverse.

    Absolute if they have no root in common: one in a store, or the two in different buckets.
    """
    if is_remote(path) and is_remote(folder):
        path, folder = _key(path), _key(folder)
        same = path.split("/")[0] == folder.split("/")[0]
        return posixpath.relpath(path, folder) if same else STORE + path
    if is_remote(path):
        return STORE + _key(path)
    path = Path(path).resolve()
    return str(path) if is_remote(folder) else os.path.relpath(path, Path(folder).resolve())


def joined(folder: AnyPath, name: str) -> AnyPath:
    """The path that `name`, from `relative`, leads to from `folder`."""
    if is_remote(name) or os.path.isabs(name):
        return as_path(name)
    if is_remote(folder):
        return as_path(STORE + posixpath.normpath(posixpath.join(_key(folder), name)))
    return (folder / name).resolve()


def write(path: AnyPath, data: str | bytes) -> None:
    """Writes a file so that a reader, or a run that is killed meanwhile, finds all of it or what was there before.

    Raises OSError for what the disk or the store refuses.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        with reaching(path):
            path.write_bytes(data)
        return
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def move(source: AnyPath, target: AnyPath) -> None:
    """Moves a folder in the place of what `target` is; in a store object by object, as copies."""
    remove(target)
    if not is_remote(source):
        source.rename(target)
        return
    _copy(source, target)
    remove(source)


def _copy(source: AnyPath, target: AnyPath) -> None:
    for path in source.iterdir():
        if path == source:  # an object by the name of the folder itself, which other programs put there
            continue
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)


def remove(folder: AnyPath) -> None:
    """Takes away a folder and all that is in it, if it is there and as far as it can."""
    if is_remote(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reaching(path: str | AnyPath) -> Iterator[None]:
    """What the client of a store raises within (rights, network), of classes of its own, is raised as OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def _key(path: str | AnyPath) -> str:
    """BUCKET/FOLDER of a path in a store."""
    return posixpath.normpath(str(path).removeprefix("gs:").lstrip("/"))
