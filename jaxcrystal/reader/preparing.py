"""Foreign files -> the stored data set, with an account of every row: what `jaxcrystal prepare` does.

train.csv ─┐              ┌─▶ OUT/train.parquet     what `crystals.dataset.load` reads
cifs/     ─┼─ rows, checks ┼─▶ OUT/cifs.parquet
prototypes┘              ├─▶ OUT/left_out.csv      every row that is not there, with the reason
                          ├─▶ OUT/doubts.csv        every label that was not believed
                          └─▶ OUT/report.json       all of it, counted
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

import jaxcrystal
from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.dataset import CrystalSet, store, written_whole
from jaxcrystal.errors import UserError
from jaxcrystal.reader import sources
from jaxcrystal.reader.checks import Checked, Checks, Finding, check
from jaxcrystal.reader.sources import Source

#: Fewer rows than this are done before a second process has started.
WORTH_A_POOL = 1000


@dataclass(frozen=True)
class PartReport:
    """What became of the rows of one source."""

    part: str  #: name of the part; its file is `<part>.parquet`
    origin: str  #: what the user named
    sha256: str | None  #: of the file or folder
    read: int
    kept: int
    left_out: dict[str, int]  #: rows by `checks.Reason`
    doubts: dict[str, int]  #: disbelieved labels of kept rows, by `checks.Doubt`
    missing: dict[str, int]  #: kept rows that lack a label, by name of `config.ATTRIBUTES`
    atoms: dict[int, int]  #: kept rows by number of atoms
    repeated_ids: dict[str, int]  #: ids of more than one kept row, with their number
    ignored_columns: tuple[str, ...]
    seconds: float

    def __post_init__(self) -> None:
        if self.read != self.kept + sum(self.left_out.values()):
            raise AssertionError(f"{self.part}: {self.read} rows read, {self.kept} kept, {self.left_out} left out")

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none"
        lines = [f"{self.part}: {self.read} rows read, {self.kept} kept, left out: {reasons} ({self.seconds:.0f} s)"]
        for what, counts in (("labels missing", self.missing), ("labels doubted", self.doubts)):
            if any(counts.values()):
                lines.append(f"  {what}: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n))
        if self.ignored_columns:
            lines.append(f"  columns ignored: {', '.join(self.ignored_columns)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did; `report.json` holds the same."""

    parts: tuple[PartReport, ...]
    duplicates: tuple[tuple[str, ...], ...]  #: rows that hold one crystal (`part:id`), group by group; all are kept
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        across = sum(len({name.partition(":")[0] for name in group}) > 1 for group in self.duplicates)
        repeats = sum(len(group) - 1 for group in self.duplicates)
        return "\n".join([*map(str, self.parts), f"duplicates: {repeats} rows repeat another; {across} across parts"])


def prepare(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    niggli: bool = True,
    max_atoms: int | None = 20,
    workers: int = 2,
) -> PrepareReport:
    """Writes one part an input to the folder `out` (two for `prototypes`), and the account.

    Rows are reduced to the Niggli cell if `niggli`, left out if they have more than `max_atoms` atoms, and checked in
    `workers` processes. Raises UserError if an input cannot be read, two have one name, or `out` cannot be written.
    """
    started = time.monotonic()
    checks = Checks(niggli, max_atoms)
    # Read all before writing any: a misspelt last input must not cost the work on the others.
    parts = [source for origin in inputs for source in sources.read(origin)]
    for name, count in Counter(source.part for source in parts).items():
        if count > 1:
            same = ", ".join(source.origin for source in parts if source.part == name)
            raise UserError(f"{same} would all be written to {out / name}.parquet; rename them or choose two folders")
    versions = {"jaxcrystal": jaxcrystal.__version__} | {n: importlib.metadata.version(n) for n in ("pymatgen", "ase")}
    settings = dataclasses.asdict(checks)
    _check_writable(out)

    reports, left_out, doubts, groups = [], [], [], {}
    with _pool(workers if sum(len(source.rows) for source in parts) >= WORTH_A_POOL else 1) as each:
        for source in parts:
            clock = time.monotonic()
            outcomes = list(
                tqdm(each(partial(check, checks=checks), source.rows), source.part, len(source.rows), unit="row")
            )
            kept = [outcome for outcome in outcomes if isinstance(outcome, Checked)]
            provenance = {"source": source.origin, "sha256": source.sha256, "settings": settings, "versions": versions}
            _store(kept, out / f"{source.part}.parquet", provenance)
            lost = [outcome for outcome in outcomes if isinstance(outcome, Finding)]
            disbelieved = [doubt for row in kept for doubt in row.doubts]
            left_out += [(source.origin, finding) for finding in lost]
            doubts += [(source.origin, finding) for finding in disbelieved]
            for row in kept:
                groups.setdefault(row.duplicate_key, []).append(f"{source.part}:{row.id}")
            reports.append(_account(source, kept, lost, disbelieved, time.monotonic() - clock))

    duplicates = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    report = PrepareReport(tuple(reports), duplicates, settings, versions, round(time.monotonic() - started, 1))
    _write_table(out / "left_out.csv", left_out)
    _write_table(out / "doubts.csv", doubts)
    with written_whole(out / "report.json") as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return report


def _check_writable(out: Path) -> None:
    """Minutes of work must not end at a folder that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None


def _account(
    source: Source, kept: Sequence[Checked], lost: Sequence[Finding], doubts: Sequence[Finding], seconds: float
) -> PartReport:
    return PartReport(
        part=source.part,
        origin=source.origin,
        sha256=source.sha256,
        read=len(source.rows),
        kept=len(kept),
        left_out=_counted(finding.kind.value for finding in lost),
        doubts=_counted(finding.kind.value for finding in doubts),
        missing={name: sum(name not in row.labels for row in kept) for name in ATTRIBUTES},
        atoms=_counted(len(row.crystal) for row in kept),
        repeated_ids={name: n for name, n in _counted(row.id for row in kept).items() if n > 1},
        ignored_columns=source.ignored_columns,
        seconds=round(seconds, 1),
    )


def _counted(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))


def _store(kept: Sequence[Checked], path: Path, provenance: dict[str, Any]) -> None:
    ids, crystals, labels = ([getattr(row, name) for row in kept] for name in ("id", "crystal", "labels"))
    store(CrystalSet.from_crystals(ids, crystals, labels), path, provenance)


def _write_table(path: Path, findings: Sequence[tuple[str, Finding]]) -> None:
    with written_whole(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "row", "id", "reason", "message"])
        writer.writerows([origin, f.row, f.id, f.kind, f.message] for origin, f in findings)


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    """A `map` over that many processes, in order."""
    if workers < 2:
        yield map
        return
    # Spawned, not forked: jax's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=64)
