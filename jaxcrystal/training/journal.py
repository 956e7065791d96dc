"""`metrics.jsonl`: the events of a run, one JSON object a line, in the order in which they happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from jaxcrystal import paths
from jaxcrystal.errors import UserError


class Journal:
    """Appends to a run's `metrics.jsonl`, unless it is `silent`; leaving it uploads what is there.

    That of a run in a store grows in the local folder `paths.on_disk` and is uploaded whole (`upload`). Lines beyond
    the step at which a run goes on are taken out first.
    """

    def __init__(self, path: paths.AnyPath, step: int, silent: bool = False) -> None:
        self._stored, self._path = path, paths.on_disk(path)
        self._silent = silent  # of several processes, one writes
        if silent:
            return
        with self._writing():
            # In a store is what the last of the run's machines had when it saved, whichever that was.
            text = path.read_text() if path.exists() else ""
            complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            paths.write(self._path, "".join(line for line in complete if json.loads(line)["step"] <= step))

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line, handed to the system when this returns. Raises UserError if the disk does not take it."""
        if self._silent:
            return
        with self._writing(), self._path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")

    def upload(self) -> None:
        """Puts all lines into the store, for a run that lies in one; before the checkpoint that they lead to."""
        if paths.is_remote(self._stored) and not self._silent:
            with self._writing():
                paths.write(self._stored, self._path.read_bytes())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.upload()
        except UserError:
            if error is None:  # otherwise this came after the error that is being raised
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with paths.reaching(self._stored):
                yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {self._stored}: {reason}; make room and start again") from error
