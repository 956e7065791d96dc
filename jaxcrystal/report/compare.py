"""Two evaluations or more, side by side: their numbers, and how far they differ beyond chance.

A difference d = x₂ - x₁ of numbers with intervals [l₁, u₁] and [l₂, u₂] has the interval

    d - √((x₂ - l₂)² + (u₁ - x₁)²)   to   d + √((u₂ - x₂)² + (x₁ - l₁)²).

For rates with Wilson's intervals this is Newcombe's hybrid score interval (Stat. Med. 17, 873, 1998, method 10); for
means, medians and distances with intervals of resampling it is what Zou and Donner (Stat. Med. 27, 1693, 2008) made of
it for any statistic. It takes the runs as independent. The recall side of coverage asks the same reference crystals of
both: where they agree on which are found, its intervals are wider than they need be. A number without an interval has a
difference without one.

A difference is told only where both numbers mean the same: by one protocol, against the same training or reference
crystals, by the same potential and hull. Else the reason stands in its place.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.report.quantities import SECTIONS, Measured, Quantity, measured

#: What the numbers of a section depend on, beside the samples. A section that is not here depends on all of it.
_BASES = {
    "stability": ("protocol", "potential", "relaxation", "hull"),
    "sun": ("protocol", "train", "potential", "relaxation", "hull"),
    "validity": ("protocol",),
    "uniqueness": ("protocol",),
    "novelty": ("protocol", "train"),
    "coverage": ("protocol", "reference"),
    "distribution": ("protocol", "reference"),
    "diversity": ("protocol",),
    "prediction": ("protocol", "truth"),
}
_ALL_BASES = ("protocol", "train", "reference", "truth", "cut-offs", "potential", "relaxation", "hull")
#: Of the numbers that do not depend on what the rest of their section does.
_EXCEPTIONS = {
    "stability.relaxation_rmsd.": ("protocol", "potential", "relaxation"),
    "coverage.recall": ("protocol", "reference", "cut-offs"),
    "coverage.precision": ("protocol", "reference", "cut-offs"),
}
_PARTS = {"protocol": str, "counts": dict, "confidence_95": dict, "versions": dict}  #: what no metrics.json is without


@dataclass(frozen=True)
class Run:
    """An evaluation that was done."""

    name: str  #: of its folder, with as many parents as tell it from the others
    metrics: Mapping[str, Any]

    def base(self, name: str) -> str | None:
        """What the run's numbers rest on: one of `_ALL_BASES`, as `metrics.json` tells it; None if it does not."""
        if name == "protocol":
            return self.metrics["protocol"]
        if name == "cut-offs":
            return self.metrics.get("coverage", {}).get("cutoffs")
        return self.metrics["versions"].get(name)


@dataclass(frozen=True)
class Difference:
    """Of a run's number from the first run's."""

    value: float | None  #: None: not told, because
    because: str = ""
    interval: tuple[float, float] | None = None  #: 95 %; None: not known

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Line:
    """One quantity in all runs, None where a run has it not."""

    quantity: Quantity
    numbers: tuple[Measured | None, ...]
    differences: tuple[Difference | None, ...]  #: from the first run, of all others


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: tuple[Run, ...]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]  #: what a reader should know, in whole sentences


def compare(paths: Sequence[str | Path], out: Path | None = None) -> Comparison:
    """Compares `metrics.json` files, or the folders that hold them, each with the first; writes it to the folder `out`.

    Raises UserError if there are fewer than two, one comes twice, one is not what `evaluate` writes, or `out` cannot be
    written.
    """
    files = [path / "metrics.json" if (path := Path(p)).is_dir() else path for p in paths]
    if len(files) < 2:
        raise UserError(f"a comparison needs two metrics.json or more, not {len(files)}")
    if twice := [str(file) for file, n in Counter(map(Path.resolve, files)).items() if n > 1]:
        raise UserError(f"{twice[0]} is named twice; each run can be compared once")
    runs = tuple(Run(name, _read(file)) for name, file in zip(_names(files), files, strict=True))
    found = [{number.quantity.name: number for number in measured(run.metrics)} for run in runs]
    quantities: dict[str, Quantity] = {}
    for numbers in found:
        for name, number in numbers.items():
            quantities.setdefault(name, number.quantity)
    order = list(SECTIONS)
    lines = []
    for name, quantity in sorted(
        quantities.items(), key=lambda item: order.index(s) if (s := item[1].section) in order else len(order)
    ):
        row = tuple(numbers.get(name) for numbers in found)
        differences = tuple(_difference(name, runs[0], row[0], *other) for other in zip(runs[1:], row[1:], strict=True))
        lines.append(Line(quantity, row, differences))
    comparison = Comparison(runs, tuple(lines), tuple(_remarks(runs)))
    if out is not None:
        write(comparison, out)
    return comparison


def difference(first: Measured, second: Measured) -> Difference:
    """`second` minus `first`, with the interval told at the top of this file."""
    value = second.value - first.value
    if first.interval is None or second.interval is None:
        return Difference(value)
    (low1, high1), (low2, high2) = first.interval, second.interval
    low = value - math.hypot(second.value - low2, high1 - first.value)
    high = value + math.hypot(high2 - second.value, first.value - low1)
    return Difference(value, interval=(low, high))


def _difference(name: str, one: Run, first: Measured | None, other: Run, second: Measured | None) -> Difference | None:
    if first is None or second is None:
        return None
    bases = next((b for start, b in _EXCEPTIONS.items() if name.startswith(start)), None)
    for base in bases or _BASES.get(first.quantity.section, _ALL_BASES):
        if _identity(one.base(base)) != _identity(other.base(base)):
            return Difference(None, f"other {base}")
    return difference(first, second)


def _identity(base: str | None) -> str | None:
    """Two files with the same content are the same, whatever they are called."""
    return base if base is None else base.rpartition("sha256:")[2]


def _remarks(runs: Sequence[Run]) -> list[str]:
    first, *others = runs
    remarks = []
    for other in others:
        for base in _ALL_BASES:
            ours, theirs = first.base(base), other.base(base)
            if ours is not None and theirs is not None and _identity(ours) != _identity(theirs):
                remarks.append(f"Other {base}: {first.name} has {ours}, {other.name} has {theirs}.")
                if base == "hull":
                    remarks.append("Build one hull for all runs, and give it to each evaluation, to compare stability.")
        programs = [
            f"{name} {first.metrics['versions'][name]} and {version}"
            for name, version in other.metrics["versions"].items()
            if "sha256:" not in version and name not in _ALL_BASES
            if name in first.metrics["versions"] and first.metrics["versions"][name] != version
        ]
        if programs:
            remarks.append(f"{first.name} and {other.name} were evaluated with {'; '.join(programs)}.")
        samples = [_identity(run.metrics["versions"].get("samples")) for run in (first, other)]
        if samples[0] is not None and samples[0] == samples[1]:
            remarks.append(f"{first.name} and {other.name} judge the same file of samples: they are not independent.")
    return remarks


def _names(files: Sequence[Path]) -> list[str]:
    """The folder of each file; where two have the same name, with as many parents as tell them apart."""
    parts = [
        file.resolve().parent.parts if file.name == "metrics.json" else file.resolve().with_suffix("").parts
        for file in files
    ]
    taken = [1] * len(files)
    while True:
        names = ["/".join(part[-n:]) for part, n in zip(parts, taken, strict=True)]
        repeated = {name for name, count in Counter(names).items() if count > 1}
        if not repeated:
            return names
        longer = [min(n + (name in repeated), len(part)) for n, name, part in zip(taken, names, parts, strict=True)]
        if longer == taken:  # x/a.json and x/a.csv: only the ends tell them apart
            return [str(file) for file in files]
        taken = longer


def _read(path: Path) -> Mapping[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; expected metrics.json, or the folder that `evaluate` wrote"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); expected the metrics.json of `jaxcrystal evaluate`") from None
    for part, kind in _PARTS.items():
        if not isinstance(metrics, dict) or not isinstance(metrics.get(part), kind):
            raise UserError(f"{path} is not the metrics.json of `jaxcrystal evaluate`: its {part!r} is not as expected")
    for name, interval in metrics["confidence_95"].items():
        if not (
            isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, (int, float)) for x in interval)
        ):
            raise UserError(f"{path}: the interval of {name} is {interval!r}; expected two numbers")
    return metrics


def as_text(comparison: Comparison) -> str:
    """A table for a terminal."""
    rows = _table(comparison, with_intervals=False)
    widths = [max(len(row[k]) for row in rows if len(row) > 1) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        # Numbers stand to the right, names and differences to the left.
        cells = [cell.rjust(widths[k]) if _is_number(k) else cell.ljust(widths[k]) for k, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_notes(comparison)])


def as_markdown(comparison: Comparison) -> str:
    """The table with every number's own interval."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _table(comparison, with_intervals=True)]
    lines = [head, ["---", *["---:" if _is_number(k) else "---" for k in range(1, len(head))]]]
    lines += [row if len(row) > 1 else [f"**{row[0]}**", *[""] * (len(head) - 1)] for row in rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in _notes(comparison)) + "\n"


def as_csv(comparison: Comparison) -> str:
    """A row for each number of each run, rates as shares; empty where nothing is known."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["name", "title", "unit", "run", "value", "low_95", "high_95"]
    writer.writerow([*head, "difference_from_first", "difference_low_95", "difference_high_95", "not_compared_because"])
    for line in comparison.lines:
        quantity = line.quantity
        for run, number, change in zip(comparison.runs, line.numbers, (None, *line.differences), strict=True):
            if number is not None:
                value = [number.value, *(number.interval or ("", ""))]
                told = ["", "", "", ""]
                if change is not None:
                    low, high = change.interval or ("", "")
                    told = ["" if change.value is None else change.value, low, high, change.because]
                unit = "share" if quantity.is_rate else quantity.unit
                writer.writerow([quantity.name, quantity.title, unit, run.name, *value, *told])
    return file.getvalue()


def write(comparison: Comparison, out: Path) -> None:
    """Writes `comparison.csv`, `comparison.md` and `comparison.svg` to the folder `out`.

    Raises UserError if that is not possible.
    """
    from jaxcrystal.report.forest import draw

    texts = {"csv": as_csv(comparison), "md": as_markdown(comparison), "svg": draw(comparison)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            (out / f"comparison.{kind}").write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"cannot write to the folder {out}: {error.strerror}") from None


def _table(comparison: Comparison, *, with_intervals: bool) -> list[list[str]]:
    """A heading, and rows of a name, the first run's number, and of each other run its number and the difference.

    A row of one cell opens a section.
    """
    first, *others = comparison.runs
    rows = [["", first.name]]
    for run in others:
        rows[0] += [run.name, f"{run.name} − {first.name}"]
    section = None
    for line in comparison.lines:
        quantity = line.quantity
        if quantity.section != section:
            section = quantity.section
            rows.append([SECTIONS.get(section, section)])
        numbers = ["–" if n is None else _number(n, with_intervals) for n in line.numbers]
        row = [f"{quantity.title}, {quantity.unit}" if quantity.unit else quantity.title, numbers[0]]
        for number, change in zip(numbers[1:], line.differences, strict=True):
            row += [number, told(quantity, change)]
        rows.append(row)
    return rows


def _is_number(column: int) -> bool:
    """Whether a column of `_table` holds numbers, rather than names or differences."""
    return column == 1 or (column > 0 and column % 2 == 0)


def _number(number: Measured, with_interval: bool) -> str:
    written = number.quantity.write(number.value)
    if with_interval and number.interval is not None:
        low, high = map(number.quantity.write, number.interval)
        written += f" ({low} to {high})"
    return written


def told(quantity: Quantity, change: Difference | None) -> str:
    """A difference in the quantity's unit, rates in percentage points; * if its interval leaves 0 out."""
    if change is None:
        return ""
    if change.value is None:
        return f"not compared: {change.because}"
    written = quantity.write(change.value, signed=True)
    if change.interval is not None:
        low, high = (quantity.write(bound, signed=True) for bound in change.interval)
        written += f" ({low} to {high})" + " *" * change.beyond_chance
    return written


def _notes(comparison: Comparison) -> list[str]:
    intervals = sum(
        change is not None and change.interval is not None for x in comparison.lines for change in x.differences
    )
    attempts = ", ".join(f"{run.name} {run.metrics['counts'].get('attempts', 0):,}" for run in comparison.runs)
    notes = [
        f"Attempts: {attempts}.",
        "Differences are from the first run, with 95 % intervals, of rates in percentage points: Newcombe's hybrid "
        "score interval, and for other numbers the same sum of squares of their own bounds.",
    ]
    if intervals:
        notes.append(
            f"* marks an interval without 0; of {intervals} intervals about {math.ceil(intervals / 20)} would leave it "
            "out by chance alone."
        )
    return [*notes, *comparison.remarks]
