"""Two evaluations or more, side by side: their numbers, and how far they differ beyond chance.

A difference d = x₂ - x₁ of numbers with intervals [l₁, u₁] and [l₂, u₂] has the interval

    d - √((x₂ - l₂)² + (u₁ - x₁)²)   to   d + √((u₂ - x₂)² + (x₁ - l₁)²).

For rates with Wilson's intervals this is Newcombe's hybrid score interval (Stat. Med. 17, 873, 1998, method 10); for
means, medians and distances with intervals of resampling it is what Zou and Donner (Stat. Med. 27, 1693, 2008) made of
it for any statistic. It takes the runs as independent. The recall side of coverage asks the same reference crystals of
both: where they agree on which are found, its intervals are wider than they need be. A number without an interval has a
difference without one.

There is a difference only where both numbers mean the same: by one protocol, against the same training or reference
crystals, by the same potential and hull. Else the reason stands in its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError, printable
from jaxcrystal.evaluation.results import read_metrics
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
    "hhi": ("protocol",),
    "prediction": ("protocol", "truth"),
    "conditions": ("protocol", "space groups", "potential", "relaxation", "hull"),
}
_ALL_BASES = ("protocol", "train", "reference", "truth", "cut-offs", "space groups", "potential", "relaxation", "hull")
#: Of a number that is of relaxed crystals where there is a potential: then the same of those sampled stands beside it.
_OF_RELAXED = ("potential", "relaxation")
#: Of the numbers that do not depend on what the rest of their section does.
_EXCEPTIONS = {
    "stability.relaxation_rmsd.": ("protocol", "potential", "relaxation"),
    "coverage.recall": ("protocol", "reference", "cut-offs"),
    "coverage.precision": ("protocol", "reference", "cut-offs"),
    "prediction.new_formulas.": ("protocol", "truth", "train"),
    "prediction.lowest.": ("protocol", "truth", "train"),
}


@dataclass(frozen=True)
class Run:
    """An evaluation that was done."""

    name: str  #: of its folder, with as many parents as tell it from the others
    metrics: Mapping[str, Any]

    def base(self, name: str) -> str | None:
        """What the run's numbers rest on: one of `_ALL_BASES`, as `metrics.json` states it; None if it does not."""
        if name == "protocol":
            return self.metrics["protocol"]
        if name == "cut-offs":
            return self.metrics.get("coverage", {}).get("cutoffs")
        return self.metrics["versions"].get(name)


@dataclass(frozen=True)
class Difference:
    """Of a run's number from the first run's."""

    value: float | None  #: None: not taken, because
    because: str = ""
    interval: tuple[float, float] | None = None  #: 95 %; None: not known

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def write(self, quantity: Quantity) -> str:
        """In the quantity's unit, rates in percentage points; * if the interval leaves 0 out."""
        if self.value is None:
            return f"not compared: {self.because}"
        written = quantity.write(self.value, signed=True)
        if self.interval is not None:
            low, high = (quantity.write(bound, signed=True) for bound in self.interval)
            written += f" ({low} to {high})" + " *" * self.beyond_chance
        return written


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


def comparison(paths: Sequence[str | Path]) -> Comparison:
    """`metrics.json` files, or the folders that hold them, each beside the first.

    Raises UserError if there are fewer than two, one comes twice, or one is not what `evaluate` writes.
    """
    files = [path / "metrics.json" if (path := Path(p)).is_dir() else path for p in paths]
    if len(files) < 2:
        raise UserError(f"a comparison needs two metrics.json or more, not {len(files)}")
    if twice := [str(file) for file, n in Counter(map(Path.resolve, files)).items() if n > 1]:
        raise UserError(f"{twice[0]} is named twice; each run can be compared once")
    runs = tuple(Run(printable(name), read_metrics(file)) for name, file in zip(_names(files), files, strict=True))
    found = [{number.quantity.name: number for number in measured(run.metrics)} for run in runs]
    quantities: dict[str, Quantity] = {}
    for numbers in found:
        for name, number in numbers.items():
            quantities.setdefault(name, number.quantity)
    relaxed = {name.removesuffix("_as_sampled") for name in quantities if name.endswith("_as_sampled")}
    order = list(SECTIONS)
    lines = []
    for name, quantity in sorted(
        quantities.items(), key=lambda item: order.index(s) if (s := item[1].section) in order else len(order)
    ):
        row = tuple(numbers.get(name) for numbers in found)
        shortened = name.removesuffix("_of_valid").removesuffix("_of_kept")
        bases = _bases(quantity) + _OF_RELAXED * (shortened in relaxed)
        differences = tuple(
            _difference(bases, runs[0], row[0], run, number) for run, number in zip(runs[1:], row[1:], strict=True)
        )
        lines.append(Line(quantity, row, differences))
    return Comparison(runs, tuple(lines), tuple(_remarks(runs)))


def difference(first: Measured, second: Measured) -> Difference:
    """`second` minus `first`, with the interval that the top of this file states."""
    value = second.value - first.value
    if first.interval is None or second.interval is None:
        return Difference(value)
    (low1, high1), (low2, high2) = first.interval, second.interval
    low = value - math.hypot(second.value - low2, high1 - first.value)
    high = value + math.hypot(high2 - second.value, first.value - low1)
    return Difference(value, interval=(low, high))


def _bases(quantity: Quantity) -> tuple[str, ...]:
    found = next((bases for start, bases in _EXCEPTIONS.items() if quantity.name.startswith(start)), None)
    return found or _BASES.get(quantity.section, _ALL_BASES)


def _difference(
    bases: Sequence[str], one: Run, first: Measured | None, other: Run, second: Measured | None
) -> Difference | None:
    if first is None or second is None:
        return None
    for base in bases:
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
