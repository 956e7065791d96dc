"""Evaluations side by side, as `jaxcrystal compare` shows them: for a terminal, as CSV, Markdown and SVG."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcrystal import locks
from jaxcrystal.errors import UserError
from jaxcrystal.report.comparison import Comparison, comparison
from jaxcrystal.report.forest import draw
from jaxcrystal.report.quantities import SECTIONS, Measured


def compare(paths: Sequence[str | Path], out: Path | None = None) -> Comparison:
    """Compares `metrics.json` files, or the folders that hold them, each with the first.

    To the folder `out` it writes `comparison.csv`, `comparison.md` and `comparison.svg`. Raises UserError if there are
    fewer than two, one comes twice, one is not what `evaluate` writes, or `out` cannot be written or is being written.
    """
    if out is None:
        return comparison(paths)
    with locks.held(out):
        found = comparison(paths)
        _write(found, out)
    return found


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
                value: list[Any] = [number.value, *(number.interval or ("", ""))]
                from_first: list[Any] = ["", "", "", ""]
                if change is not None:
                    low, high = change.interval or ("", "")
                    from_first = ["" if change.value is None else change.value, low, high, change.because]
                unit = "share" if quantity.is_rate else quantity.unit
                writer.writerow([quantity.name, quantity.title, unit, run.name, *value, *from_first])
    return file.getvalue()


def _write(comparison: Comparison, out: Path) -> None:
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
            row += [number, "" if change is None else change.write(quantity)]
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
