"""The ledger: one row for every attempt to draw a crystal, whatever became of it.

    samples.parquet.json      what was asked, and, once all is done, how many attempts ended how
    samples.parquet.journal   one line of JSON an attempt, in the order of their indices, while sampling goes on
    samples.parquet           the same rows as a table, once all are there; the journal is then removed

A run that was killed goes on after the journal's last whole line, so nothing that was finished is drawn twice and the
table is the same as if nothing had happened. `out` may also be a CSV file, or a folder: then each crystal is a CIF
file of its own, named by its index, and once more with its symmetry in `symmetrized/`, beside `attempts.parquet`.

Processes that share a run have each a ledger for its part of the rows, samples-00002-of-00016.parquet, which knows
nothing of the others; `join` makes the one table of them, the same as a single process would have written.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import OK, Attempt

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("draw", pa.int64()),
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
        ("space_group", pa.int64()),
        ("symmetrized_cif", pa.string()),
        ("symmetry_failure", pa.string()),
    ]
)
ROWS_PER_GROUP = 1024
LONGEST = 200  #: letters of a setting that an error repeats


@dataclass(frozen=True)
class Request:
    """All that decides what the ledger's rows will be."""

    model: str  #: fingerprint of the weights
    prompts: list[str]
    conditions: list[str]  #: of each prompt, as JSON
    grammar: list[str] | None  #: each prompt's constraints, as JSON; None if the model writes what it likes
    guidance: str | None  #: with the prompt that states nothing; None without
    methods: list[str]  #: in the order of their application
    cache: str  #: dtype of keys and values
    symprec: float  #: Å
    max_new_tokens: int
    seed: int
    num: int  #: attempts for each prompt, prompt after prompt
    num_valid: int | None = None  #: attempts end once so many are ok
    draws: str = "hash of the prompt's tokens, index"  #: what a draw's key is made of, beside the seed

    @property
    def rows(self) -> int:
        """Attempts in all."""
        return self.num * len(self.prompts)


class Part(NamedTuple):
    """A range of a run's rows that one process draws."""

    number: int = 0
    of: int = 1

    def rows(self, total: int) -> range:
        """Which of all rows: parts follow each other, and differ by one row at most."""
        return range(total * self.number // self.of, total * (self.number + 1) // self.of)

    def path(self, out: Path) -> Path:
        """Of its own ledger, where `out` is that of all parts."""
        return out if self.of == 1 else out.with_name(f"{out.stem}-{self.number:05d}-of-{self.of:05d}{out.suffix}")

    def paths(self, out: Path) -> list[Path]:
        """Of all parts."""
        return [Part(number, self.of).path(out) for number in range(self.of)]


class Ledger:
    """Opens the ledger of `request` at `out`, or of a part of its rows beside it, as far as it was written before.

    Raises UserError if `out` is neither .parquet, .csv nor a folder's name, if it cannot be written, if it exists and
    is no ledger, or if it is the ledger of another request: the message names what differs.
    """

    def __init__(self, out: str | Path, request: Request, part: Part = Part()) -> None:  # noqa: B008
        self.out = part.path(Path(out))
        self.request = request
        self.rows = part.rows(request.rows)  #: their indices
        self._header = _beside(self.out, ".json")
        self._journal = _beside(self.out, ".journal")
        if self.out.suffix not in (".parquet", ".csv", ""):
            raise UserError(f"cannot write {out}: give a name that ends in .parquet or .csv, or that of a folder")
        others = [other for other in _parts(Path(out)) if other.of != part.of]
        if others:
            raise UserError(
                f"{others[0].path(Path(out))} is a part of a run on {others[0].of} processes, this one is on "
                f"{part.of}; go on with as many, or remove it with its .json and .journal"
            )
        try:
            self.counts: Counter[str] = self._open()
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror} ({error.filename})") from None

    def __len__(self) -> int:
        """Rows that are there."""
        return self.counts.total()

    @property
    def complete(self) -> bool:
        """Nothing is left to be drawn."""
        valid = self.request.num_valid
        return len(self) >= len(self.rows) or (valid is not None and self.counts[OK] >= valid)

    def append(self, attempt: Attempt) -> None:
        """Writes the next row; it outlives this process from here on."""
        if attempt.index != self.rows.start + len(self):
            raise ValueError(f"the ledger's next row is {self.rows.start + len(self)}, not {attempt.index}")
        with self._journal.open("a") as journal:
            journal.write(json.dumps(dataclasses.asdict(attempt)) + "\n")
        self.counts[attempt.status] += 1

    def finish(self) -> None:
        """Makes the table (and the CIF files) of a complete journal; a second call does nothing."""
        if self._journal.exists():
            with self._journal.open() as journal:
                _write_table(self.out, map(json.loads, journal))
            _describe(self.out, self.request, self.counts)
            self._journal.unlink()

    def _open(self) -> Counter[str]:
        counts = _counted(self.out, self.request)
        if self._header.exists() and self._journal.exists():
            return self._resume()
        if self.out.exists():
            if counts is None:
                raise UserError(f"{self.out} exists already; remove it or choose another name")
            return counts
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _describe(self.out, self.request)
        self._journal.write_text("")
        return Counter()

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
                    if row["index"] != self.rows.start + counts.total():
                        raise ValueError
                    counts[row["status"]] += 1
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{self._journal}, line {counts.total() + 1} is damaged; remove the file") from None
                whole += len(line)
        os.truncate(self._journal, whole)
        return counts


def finished(out: str | Path, request: Request) -> Counter[str] | None:
    """How the attempts of a finished ledger ended; None if it is not there, or not finished."""
    return _counted(Path(out), request) if Path(out).exists() else None


def join(out: str | Path, request: Request) -> Counter[str] | None:
    """Makes one ledger of all parts beside `out`, which are then removed; None where there are no parts.

    Raises UserError if some are missing or unfinished, or are of another request: the message names them.
    """
    out = Path(out)
    parts = _parts(out)
    if not parts:
        return None
    counts = finished(out, request)  # a former join may have been killed while it removed the parts
    if counts is None:
        wanted = [Part(number, parts[0].of) for number in range(parts[0].of)]
        each = [finished(part.path(out), request) for part in wanted]
        missing = [part.path(out).name for part, counted in zip(wanted, each, strict=True) if counted is None]
        if missing or parts != wanted:
            raise UserError(
                f"{out} has parts of a run of {parts[0].of} processes that is not done: {', '.join(missing[:3])}"
                f"{', …' * (len(missing) > 3)}; go on with as many processes, bring the parts of all hosts to one "
                "folder, or remove them"
            )
        counts = sum(each, Counter())
        _write_table(out, chain.from_iterable(_read_table(part.path(out)) for part in parts))
        _describe(out, request, counts)
    for path in (part.path(out) for part in parts):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _beside(path, ".json").unlink()
    return counts


def _parts(out: Path) -> list[Part]:
    """All parts of a ledger that have begun, in order."""
    name = re.compile(rf"{re.escape(out.stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(out.suffix)}\.json")
    found = (name.fullmatch(path.name) for path in out.parent.glob(f"{glob.escape(out.stem)}-*.json"))
    return sorted(Part(*map(int, match.groups())) for match in found if match)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _describe(out: Path, request: Request, counts: Mapping[str, int] | None = None) -> None:
    result = {} if counts is None else {"counts": dict(sorted(counts.items()))}
    description = json.dumps({"request": dataclasses.asdict(request), **result}, indent=2)
    _write(_beside(out, ".json"), lambda path: path.write_text(description + "\n"))


def _counted(out: Path, request: Request) -> Counter[str] | None:
    """What the .json file says of a finished ledger; None if there is none, or it is not finished."""
    header = _beside(out, ".json")
    if not header.exists():
        return None
    try:
        saved = json.loads(header.read_text())
        then = saved["request"]
        now = json.loads(json.dumps(dataclasses.asdict(request)))
        decided = {"draws"} if "counts" in saved else set()  # of a finished ledger nothing is drawn any more
        differing = [(key, then.get(key), now[key]) for key in now if key not in decided and then.get(key) != now[key]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{header} describes no samples; remove it or choose another name") from None
    if differing:
        changes = "; ".join(f"{key} was {_short(old)}, now it is {_short(new)}" for key, old, new in differing)
        raise UserError(
            f"{out} belongs to another run: {changes}. Choose another name, or remove {out.name} with its .json and "
            ".journal"
        )
    return Counter(saved["counts"]) if "counts" in saved else None


def _short(setting: Any) -> str:
    return text if len(text := repr(setting)) <= LONGEST else f"{text[:LONGEST]}…"


def _write_table(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    if out.suffix == ".csv":
        _write(out, partial(_csv, rows))
    elif out.suffix == ".parquet":
        _write(out, partial(_parquet, rows))
    else:
        (out / "symmetrized").mkdir(parents=True, exist_ok=True)
        _write(out / "attempts.parquet", partial(_parquet, _with_files(out, rows)))


def _with_files(out: Path, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows; each crystal is written to files of its own on the way."""
    for row in rows:
        if row["status"] == OK:
            name = f"{row['index']:06d}.cif"
            (out / name).write_text(row["cif"])
            if row["symmetrized_cif"] is not None:
                (out / "symmetrized" / name).write_text(row["symmetrized_cif"])
        yield row


def _read_table(out: Path) -> Iterator[dict[str, Any]]:
    if out.suffix == ".csv":
        with out.open(newline="") as file:
            yield from csv.DictReader(file)
    else:
        with pq.ParquetFile(out if out.suffix else out / "attempts.parquet") as table:
            for batch in table.iter_batches(ROWS_PER_GROUP):
                yield from batch.to_pylist()


def _csv(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, SCHEMA.names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _parquet(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with pq.ParquetWriter(path, SCHEMA) as table:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            table.write_table(pa.Table.from_pylist(group, SCHEMA))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """A file at `path` is whole or not there: it is written under another name first."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
