"""`metrics.jsonl`: the events of a run, one JSON object a line, in the order in which they happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError


class Journal:
    """Appends to a run's `metrics.jsonl`, unless it is `silent`.

    Lines beyond the step at which a run goes on are taken out first.
    """

    def __init__(self, path: Path, step: int, silent: bool = False) -> None:
        self._path = path
        self._silent = silent  # of several processes, one writes
        if path.exists() and not silent:
            complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in complete if json.loads(line)["step"] <= step]
            unfinished = path.with_suffix(".unfinished")
            with self._writing():
                unfinished.write_text("".join(kept))
                unfinished.replace(path)

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line, handed to the system when this returns. Raises UserError if the disk does not take it."""
        if self._silent:
            return
        with self._writing(), self._path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **values}) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; make room and start again") from error
