"""Answers of a model that are kept in a file as they come, so that a stopped run goes on.

A line of JSON an answer: the key, which is all that decides it (the model and the prompt), and what was answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.infilling import Answer


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

    def known(self, keys: Collection[str]) -> dict[str, Answer]:
        """Those of `keys` that are there; a line at which a killed run stopped is none."""
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["key"] in keys:
                    found[row["key"]] = Answer(np.array(row["log_probabilities"], np.float64), row["outside"])
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def append(self, key: str, answer: Answer) -> None:
        """One more. Raises UserError where the disk refuses it; what was written before is kept."""
        row = {"key": key, "log_probabilities": answer.log_probabilities.tolist(), "outside": answer.outside}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; what was written before is kept: with room on "
                "the disk the same command goes on after it"
            ) from None
