"""Answers of a model that are kept in a file as they come, so that a stopped run goes on.

A line of JSON an answer: the key, which is all that decides it (the model and the question), and what was answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxcrystal.errors import UserError

T = TypeVar("T")


def key_of(model: str, prompt: str) -> str:
    """Of the answer that a model, by its fingerprint, gives to a prompt."""
    return hashlib.sha256(json.dumps([model, prompt]).encode()).hexdigest()


class Answers:
    """The file at `path`, which is made. Raises UserError for what the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if file.tell() and path.read_bytes()[-1:] != b"\n":
                    file.write(b"\n")  # of a line at which a killed run stopped, so that the next is not lost with it
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another output") from None

    def known(self, keys: Collection[str], read: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
        """What `read` makes of those of `keys` that are there; a line at which a killed run stopped is none."""
        found = {}
        for line in self.path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                if row["key"] in keys:
                    found[row["key"]] = read(row)
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def append(self, key: str, answer: Mapping[str, Any]) -> None:
        """One more. Raises UserError where the disk refuses it; what was written before is kept."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **answer}) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; what was written before is kept: with room on "
                "the disk the same command goes on after it"
            ) from None
