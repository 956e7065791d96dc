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
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jaxcrystal
from jaxcrystal import box, locks
from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.dataset import PROTOTYPES, CrystalSet, store, written_whole
from jaxcrystal.crystals.symmetry import SYMPREC
from jaxcrystal.errors import UserError, printable
from jaxcrystal.reader.checks import Checked, Checks, Finding, check
from jaxcrystal.reader.own_labels import OwnLabels
from jaxcrystal.reader.reading import interpret
from jaxcrystal.reader.rows import Rows, tally
from jaxcrystal.reader.sources import Record, Source, named, open_source, stem
from jaxcrystal.workers import Lost, each, local

#: Fewer rows than this are done before a second process has started.
WORTH_PROCESSES = 1000
MOVED = 0.05  #: Å; crystals with an atom that moves further when they are made symmetric are counted


@dataclass(frozen=True)
class PartReport:
    """What became of the rows of one source."""

    part: str  #: name of the part; its file is `<part>.parquet`
    origin: str  #: what the user named
    sha256: str | None  #: of the file or folder
    read: int
    kept: int
    left_out: dict[str, int]  #: rows by reason: `rows.Outcome` or `checks.Reason`
    because: dict[str, str]  #: of each reason, what it was for the first row
    unread: dict[str, tuple[str, ...]]  #: what a folder holds beside, by kind
    notes: dict[str, int]  #: kept rows by what was changed to read them, or is stated and not used
    doubts: dict[str, int]  #: disbelieved labels of kept rows, by `checks.Doubt`
    missing: dict[str, int]  #: kept rows that lack a label, by its name
    atoms: dict[int, int]  #: kept rows by number of atoms
    symmetry: dict[str, int]  #: kept rows by what came of looking for their space group, see `_symmetry`
    repeated_ids: dict[str, int]  #: ids of more than one kept row, with their number
    ignored_columns: tuple[str, ...]
    seconds: float

    def __post_init__(self) -> None:
        if self.read != self.kept + sum(self.left_out.values()):
            raise AssertionError(f"{self.part}: {self.read} rows read, {self.kept} kept, {self.left_out} left out")

    def __str__(self) -> str:
        lines = [f"{self.part}: {self.read} rows read, {self.kept} kept ({self.seconds:.0f} s)"]
        lines += [f"  left out: {n} {reason}, first {self.because[reason]}" for reason, n in self.left_out.items()]
        if self.unread:
            lines.append(f"  not read: {named(self.unread)}")
        for what, counts in (("labels missing", self.missing), ("labels doubted", self.doubts)):
            if any(counts.values()):
                lines.append(f"  {what}: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n))
        if found := {what: n for what, n in self.symmetry.items() if n}:
            lines.append("  symmetry: " + ", ".join(f"{n} {what}" for what, n in found.items()))
        lines += [f"  noted: {n} x {note}" for note, n in self.notes.items()]
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


@locks.holds(lambda inputs, out, **_: out)
def prepare(
    inputs: Sequence[str | Path | Rows],
    out: Path,
    *,
    niggli: bool = True,
    max_atoms: int | None = 20,
    symprec: float = SYMPREC,
    labels: str | Path | None = None,
    workers: int = 2,
) -> PrepareReport:
    """Writes one part an input (a path, or what was read before) to the folder `out` (two for `prototypes`).

    Rows are reduced to the Niggli cell if `niggli`, left out if they have more than `max_atoms` atoms, written by their
    symmetry too, which is looked for within `symprec` (Å), and checked in `workers` processes. `labels` is a table of
    labels of one's own (`own_labels`). Raises UserError if an input or the labels cannot be read, two inputs have one
    name, or `out` cannot be written.
    """
    started = time.monotonic()
    checks = Checks(niggli, max_atoms, symprec)
    # Read all before writing any: a misspelt last input must not cost the work on the others.
    sides = (f"{PROTOTYPES}:train", f"{PROTOTYPES}:validation")
    origins = [one for origin in inputs for one in (sides if str(origin) == PROTOTYPES else [origin])]
    own = None if labels is None else OwnLabels.read(labels)
    parts = [
        (printable(source.path if isinstance(origin, Rows) else origin), _part(origin, source.path), source)
        for origin in origins
        for source in [open_source(origin) if own is None else own.joined(open_source(origin))]
    ]
    for name, count in Counter(part for _, part, _ in parts).items():
        if count > 1:
            same = ", ".join(origin for origin, part, _ in parts if part == name)
            raise UserError(f"{same} would all be written to {out / name}.parquet; rename them or choose two folders")
    versions = {"jaxcrystal": jaxcrystal.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("ase", "gemmi", "moyopy", "pymatgen", "spglib")}
    settings = dataclasses.asdict(checks) | ({} if own is None else {"labels": str(own.path)})
    names = () if own is None else tuple(own.columns)
    _check_writable(out)

    reports, left_out, doubts, notes, groups = [], [], [], [], {}
    rows = sum(len(source.records) for _, _, source in parts)
    with local(workers) if workers > 1 and rows >= WORTH_PROCESSES else nullcontext() as pool:
        for origin, part, source in parts:
            clock = time.monotonic()
            outcomes = each(partial(_checked, checks=checks, own=names), source.records, pool, label=part, lost=_lost)
            kept = [outcome for outcome in outcomes if isinstance(outcome, Checked)]
            provenance = {"source": origin, "sha256": source.sha256, "settings": settings, "versions": versions}
            _store(kept, out / f"{part}.parquet", provenance)
            lost = [outcome for outcome in outcomes if isinstance(outcome, Finding)]
            disbelieved = [doubt for row in kept for doubt in row.doubts]
            left_out += [(origin, finding) for finding in lost]
            doubts += [(origin, finding) for finding in disbelieved]
            notes += [(origin, Finding(row.row, row.id, "note", note)) for row in kept for note in row.notes]
            for row in kept:
                groups.setdefault(row.duplicate_key, []).append(f"{part}:{row.id}")
            reports.append(
                _account(origin, part, source, kept, lost, disbelieved, symprec, names, time.monotonic() - clock)
            )

    duplicates = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    report = PrepareReport(tuple(reports), duplicates, settings, versions, round(time.monotonic() - started, 1))
    for name, findings in (("left_out", left_out), ("doubts", doubts), ("notes", notes)):
        _write_table(out / f"{name}.csv", findings)
    with written_whole(out / "report.json") as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def _part(origin: str | Path | Rows, path: Path) -> str:
    """The name of the part that a source becomes."""
    if not isinstance(origin, Rows) and box.crystals(origin):
        return box.PARTS[str(origin)]
    name = path.resolve().name if path.is_dir() else path.name  # "." has a name too
    return stem(name).replace(":", "_")


def _checked(record: Record, checks: Checks, own: Sequence[str]) -> Checked | Finding:
    return check(interpret(record), checks, own)


def _lost(record: Record, why: Lost) -> Finding:
    return Finding(record.row, record.id, why.value, why.reason)


def _check_writable(out: Path) -> None:
    """Minutes of work must not end at a folder that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None


def _account(
    origin: str,
    part: str,
    source: Source,
    kept: Sequence[Checked],
    lost: Sequence[Finding],
    doubts: Sequence[Finding],
    symprec: float,
    own: Sequence[str],
    seconds: float,
) -> PartReport:
    return PartReport(
        part=part,
        origin=origin,
        sha256=source.sha256,
        read=len(source.records),
        kept=len(kept),
        left_out=tally(finding.kind for finding in lost),
        because={finding.kind: f"row {finding.row} ({finding.id}): {finding.message}" for finding in reversed(lost)},
        unread=dict(source.unread),
        notes=tally(note for row in kept for note in row.notes),
        doubts=_counted(finding.kind.value for finding in doubts),
        missing={name: sum(name not in row.labels for row in kept) for name in (*ATTRIBUTES, *own)},
        atoms=_counted(len(row.crystal) for row in kept),
        symmetry=_symmetry(kept, symprec),
        repeated_ids={name: n for name, n in _counted(row.id for row in kept).items() if n > 1},
        ignored_columns=source.ignored_columns,
        seconds=round(seconds, 1),
    )


def _symmetry(kept: Sequence[Checked], symprec: float) -> dict[str, int]:
    """How many rows have no space group, one at a smaller tolerance, another than is stated, or moved far for it."""
    found = [row for row in kept if row.symmetry is not None]
    return {
        "without a space group": len(kept) - len(found),
        "found at a smaller tolerance": sum(row.symmetry.symprec < symprec for row in found),
        "of another group than stated": sum(
            row.labels.get("spacegroup.number", number) != number
            for row in found
            for number in [row.symmetry.crystal.space_group]
        ),
        f"moved by more than {MOVED:g} Å": sum(row.symmetry.moved > MOVED for row in found),
    }


def _counted(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))


def _store(kept: Sequence[Checked], path: Path, provenance: dict[str, Any]) -> None:
    ids, crystals, labels = ([getattr(row, name) for row in kept] for name in ("id", "crystal", "labels"))
    symmetries = [row.symmetry for row in kept]
    store(CrystalSet.from_crystals(ids, crystals, labels), path, provenance, symmetries)


def _write_table(path: Path, findings: Sequence[tuple[str, Finding]]) -> None:
    with written_whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "row", "id", "reason", "message"])
        writer.writerows([origin, f.row, f.id, f.kind, f.message] for origin, f in findings)
