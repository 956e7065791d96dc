"""The ledger: one row for every attempt to draw a crystal, whatever became of it.

    samples.parquet.json      what was asked, and, once all is done, how many attempts ended how
    samples.parquet.journal   one line of JSON an attempt, in the order of their indices, while sampling goes on
    samples.parquet           the same rows as a table, once all are there; the journal is then removed

A run that was killed goes on after the journal's last whole line, so nothing that was finished is drawn twice and the
table is the same as if nothing had happened. `out` may also be a CSV file, or a folder: then each crystal is a CIF
file of its own, named by its index, beside `attempts.parquet`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.errors import UserError
from jaxcrystal.sample.attempt import OK, Attempt

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("conditions", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),
        ("log_probability", pa.float64()),
        ("grammar_log_probability", pa.float64()),
        ("tokens", pa.int64()),
        ("formula", pa.string()),
        ("cif", pa.string()),
    ]
)
ROWS_PER_GROUP = 1024


@dataclass(frozen=True)
class Request:
    """All that decides what the ledger's rows will be."""

    model: str  #: fingerprint of the weights
    prompt: str
    conditions: str  #: as JSON
    grammar: str | None  #: its constraints, as JSON; None if the model writes what it likes
    methods: list[str]  #: in the order of their application
    max_new_tokens: int
    seed: int
    num: int  #: attempts; their indices are 0 to num - 1
    num_valid: int | None = None  #: attempts end once so many are ok


class Ledger:
    """Opens the ledger of `request` at `out`, or the part of it that an earlier run has written.

    Raises UserError if `out` is neither .parquet, .csv nor a folder's name, if it cannot be written, if it exists and
    is no ledger, or if it is the ledger of another request: the message names what differs.
    """

    def __init__(self, out: str | Path, request: Request) -> None:
        self.out = Path(out)
        self.request = request
        self._header = self.out.with_name(self.out.name + ".json")
        self._journal = self.out.with_name(self.out.name + ".journal")
        if self.out.suffix not in (".parquet", ".csv", ""):
            raise UserError(f"cannot write {out}: give a name that ends in .parquet or .csv, or that of a folder")
        try:
            self.counts: Counter[str] = self._open()
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror} ({error.filename})") from None

    def __len__(self) -> int:
        """Rows that are there; also the index of the next one."""
        return self.counts.total()

    @property
    def complete(self) -> bool:
        """Nothing is left to be drawn."""
        valid = self.request.num_valid
        return len(self) >= self.request.num or (valid is not None and self.counts[OK] >= valid)

    def append(self, attempt: Attempt) -> None:
        """Writes the next row; it outlives this process from here on."""
        if attempt.index != len(self):
            raise ValueError(f"the ledger's next row is {len(self)}, not {attempt.index}")
        with self._journal.open("a") as journal:
            journal.write(json.dumps(dataclasses.asdict(attempt)) + "\n")
        self.counts[attempt.status] += 1

    def finish(self) -> None:
        """Makes the table (and the CIF files) of a complete journal; a second call does nothing."""
        if not self._journal.exists():
            return
        if self.out.suffix == ".csv":
            _write(self.out, self._csv)
        elif self.out.suffix == ".parquet":
            _write(self.out, self._parquet)
        else:
            self.out.mkdir(exist_ok=True)
            for row in self._rows():
                if row["status"] == OK:
                    (self.out / f"{row['index']:06d}.cif").write_text(row["cif"])
            _write(self.out / "attempts.parquet", self._parquet)
        self._describe(counts=dict(sorted(self.counts.items())))
        self._journal.unlink()

    def _open(self) -> Counter[str]:
        saved = self._saved()
        if saved and self._journal.exists():
            return self._resume()
        if self.out.exists():
            if "counts" not in saved:
                raise UserError(f"{self.out} exists already; remove it or choose another name")
            return Counter(saved["counts"])
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._describe()
        self._journal.write_text("")
        return Counter()

    def _saved(self) -> dict[str, Any]:
        """What the .json file says; empty if there is none."""
        if not self._header.exists():
            return {}
        try:
            saved = json.loads(self._header.read_text())
            then = saved["request"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self._header} describes no samples; remove it or choose another name") from None
        now = dataclasses.asdict(self.request)
        differing = [f"{key} was {then.get(key)!r}, now it is {now[key]!r}" for key in now if then.get(key) != now[key]]
        if differing:
            raise UserError(
                f"{self.out} belongs to another run: {'; '.join(differing)}. "
                f"Choose another name, or remove {self.out.name} with its .json and .journal"
            )
        return saved

    def _resume(self) -> Counter[str]:
        """Counts the journal's rows and cuts off the last one if it was being written when the run was killed."""
        counts: Counter[str] = Counter()
        whole = 0
        with self._journal.open("rb") as journal:
            for line in journal:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    if row["index"] != counts.total():
                        raise ValueError
                    counts[row["status"]] += 1
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{self._journal}, line {counts.total() + 1} is damaged; remove the file") from None
                whole += len(line)
        os.truncate(self._journal, whole)
        return counts

    def _rows(self) -> Iterator[dict[str, Any]]:
        with self._journal.open() as journal:
            yield from map(json.loads, journal)

    def _describe(self, **result: Any) -> None:
        description = json.dumps({"request": dataclasses.asdict(self.request), **result}, indent=2)
        _write(self._header, lambda path: path.write_text(description + "\n"))

    def _csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, SCHEMA.names, lineterminator="\n")
            table.writeheader()
            table.writerows(self._rows())

    def _parquet(self, path: Path) -> None:
        rows = self._rows()
        with pq.ParquetWriter(path, SCHEMA) as table:
            while group := list(islice(rows, ROWS_PER_GROUP)):
                table.write_table(pa.Table.from_pylist(group, SCHEMA))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """A file at `path` is whole or not there: it is written under another name first."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
