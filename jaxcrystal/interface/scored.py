"""What a model has said of crystals: how probable it finds each, and how much that depends on how each is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64

from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.evaluation.intervals import bootstrap_mean
from jaxcrystal.interface import files
from jaxcrystal.interface.pictures import Pictures, picture
from jaxcrystal.interface.tables import SHOWN, html_table
from jaxcrystal.reader.rows import Row, tally
from jaxcrystal.report import plots
from jaxcrystal.scoring.descriptions import OK, Likelihoods
from jaxcrystal.scoring.estimates import increase, log_mean_exp, log_mean_exp_interval, log_sum_exp, perplexity

UNSEEN = "unseen_element"  #: no training crystal has one of its elements
EXTREME = 0.01  #: share of the crystals beside, at either end, beyond which a crystal is flagged
REMEMBERED, UNLIKE = "remembered", "unlike"
PRINTED = 5  #: crystals at each end

_STYLE = (
    "text {font-family: sans-serif; fill: #30343c; font-size: 12px} .tick {font-size: 10.5px; fill: #6b7079} "
    ".end {text-anchor: end} .middle {text-anchor: middle} .grid {stroke: #e5e2dc} .axis {stroke: #6b7079} "
    ".bar {fill: #2563b8; fill-opacity: .78} .mark {stroke: #30343c; stroke-dasharray: 3 3}"
)


@dataclass(frozen=True, eq=False, repr=False)
class Scored:
    """How probable a model finds crystals, a row each, in their order: a table, the likeliest, those that stand out."""

    rows: tuple[Row, ...]
    found: tuple[Likelihoods, ...]
    listed: bool  #: whether the texts of a crystal are all that there are, and not a sample
    formulas: frozenset[str] | None  #: of the training set; None: not known
    beside: Float64[np.ndarray, "crystals"] | None = None  #: nats a token of the crystals beside, sorted

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each row of the source.

        `id`, `row` (in the source), `outcome`, `reason`, `formula`, `num_atoms`; `texts` that were read of it, and
        their `tokens`, the end included (the mean, where they differ); `log_probability` in nats, of all of them where
        they can be listed, else the logarithm of their mean probability, with its 95 % interval from
        `log_probability_low` to `log_probability_high`; `mean_log_probability` of a text; `log_probability_per_token`,
        `log_probability_per_atom`; `rank` by token, 1 the likeliest; `known_formula`, whether training had it;
        `quantile`, the share of the crystals beside that have fewer nats a token; `flag`, `remembered` or `unlike`.
        """
        table = pd.DataFrame([self._row(row, found) for row, found in zip(self.rows, self.found, strict=True)])
        ok = table["outcome"] == OK
        per_token = table["log_probability_per_token"].where(ok)
        table["rank"] = per_token.rank(ascending=False, method="first").astype("Int64")
        table["known_formula"] = pd.array([self._is_known(row) for row in self.rows], "boolean")
        table["quantile"] = np.nan
        if self.beside is not None:
            table.loc[ok, "quantile"] = quantiles(-per_token[ok].to_numpy(), self.beside)
        near, far = table["quantile"] <= EXTREME, table["quantile"] >= 1 - EXTREME
        table["flag"] = np.select([near & table["known_formula"].fillna(False), far], [REMEMBERED, UNLIKE], "")
        return table

    def to_pandas(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def _row(self, row: Row, found: Likelihoods) -> dict[str, Any]:
        values, tokens = found.log_probabilities, found.tokens
        nothing = float("nan")
        total = low = high = mean = length = nothing
        if len(values):
            exact = self.listed or len(values) == 1
            total = float((log_sum_exp if exact else log_mean_exp)(values))
            low, high = (nothing, nothing) if exact else log_mean_exp_interval(values)
            mean, length = float(values.mean()), float(tokens.mean())
        return _head(row, found) | {
            "texts": len(values),
            "tokens": length,
            "log_probability": total,
            "log_probability_low": low,
            "log_probability_high": high,
            "mean_log_probability": mean,
            "log_probability_per_token": total / length,
            "log_probability_per_atom": nothing if row.crystal is None else total / len(row.crystal),
        }

    def _is_known(self, row: Row) -> bool | None:
        unknown = row.crystal is None or self.formulas is None
        return None if unknown else row.crystal.formula in self.formulas

    @property
    def counts(self) -> dict[str, int]:
        """How many rows ended with each outcome, the most frequent first."""
        return tally(self.table["outcome"])

    def best(self, count: int) -> pd.DataFrame:
        """The rows of so many crystals, the likeliest by token first."""
        return self.table.sort_values("rank").head(min(count, self.table["rank"].count())).reset_index(drop=True)

    def write(self, out: str | PathLike[str]) -> Path:
        """Writes the table to x.parquet or x.csv. Raises UserError for another name, and what the disk refuses."""
        files.write_table(self.table, files.checked_table(Path(out)))
        return Path(out)

    def __str__(self) -> str:
        ranked = self.best(len(self))
        if len(ranked) > 2 * PRINTED:
            parts = [_lines(ranked.head(PRINTED)), ["  …"], _lines(ranked.tail(PRINTED))]
        else:
            parts = [_lines(ranked)]
        return "\n".join([self._summary(), *(line for part in parts for line in part)])

    def _summary(self) -> str:
        ok = self.table[self.table["outcome"] == OK]
        parts = [_counted(len(self), self.counts)]
        if len(ok):
            means = [_mean(-ok[name]) for name in ("log_probability", "log_probability_per_token")]
            parts.append(f"{means[0]} nats each, {means[1]} a token")
        if self.beside is not None:
            flags = Counter(ok["flag"])
            parts.append(
                f"beside {len(self.beside)} others {flags[REMEMBERED]} {REMEMBERED}, {flags[UNLIKE]} {UNLIKE} any"
            )
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"<Scored: {self._summary()}>"

    def _repr_html_(self) -> str:
        heads = ["", "rank", "id", "formula", "nats", "nats a token", "quantile", "outcome", "why"]
        cells = []
        for row, one in zip(self.rows[:SHOWN], self.table.itertuples(), strict=False):
            numbers = [_written(-one.log_probability, ".1f"), _written(-one.log_probability_per_token, ".2f")]
            why = escape(one.reason or one.flag)
            rank = "" if pd.isna(one.rank) else str(one.rank)
            numbers.append(_written(one.quantile, ".3f"))
            cells.append([_picture(row), rank, escape(one.id), _formula(row), *numbers, escape(one.outcome), why])
        return html_table(self._summary(), heads, cells, len(self))


@dataclass(frozen=True, eq=False, repr=False)
class Transformed:
    """The perplexities of the same crystals written in other ways, a row each, in their order: IPT, and its picture."""

    rows: tuple[Row, ...]
    found: tuple[Likelihoods, ...]
    over: str  #: what the ways are

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each row of the source.

        `id`, `row` (in the source), `outcome`, `reason`, `formula`, `num_atoms`; `texts` that were read of it;
        `perplexity`, their mean; `least_perplexity`; `ipt`, the difference of the two.
        """
        return pd.DataFrame([self._row(row, found) for row, found in zip(self.rows, self.found, strict=True)])

    def to_pandas(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    @staticmethod
    def _row(row: Row, found: Likelihoods) -> dict[str, Any]:
        mean = least = rise = float("nan")
        if len(found.log_probabilities):
            values = perplexity(found.log_probabilities, found.tokens)
            mean, least, rise = float(values.mean()), float(values.min()), float(increase(values))
        numbers = {"perplexity": mean, "least_perplexity": least, "ipt": rise}
        return _head(row, found) | {"texts": len(found.log_probabilities)} | numbers

    @property
    def counts(self) -> dict[str, int]:
        """How many rows ended with each outcome, the most frequent first."""
        return tally(self.table["outcome"])

    @property
    def mean(self) -> float:
        """IPT, the mean over crystals; NaN where there is none."""
        return float(self.table["ipt"].mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `mean`, over crystals."""
        values = self.table["ipt"].dropna().to_numpy()
        return bootstrap_mean(values) if len(values) else (float("nan"), float("nan"))

    def picture(self) -> Pictures:
        """How IPT is distributed over the crystals, with its mean."""
        values = self.table["ipt"].dropna().to_numpy()
        label = f"increase in perplexity over {self.over}"
        drawn = plots.histogram(values, label=label, marks={f"mean {self.mean:.3g}": self.mean}) if len(values) else ""
        width, height = 680, 380
        inner = drawn.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
        return Pictures(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="white"/>{inner}</svg>'
        )

    def write(self, out: str | PathLike[str]) -> list[Path]:
        """Writes the table to x.parquet or x.csv, and the picture to x.svg; their paths. Raises UserError for another
        name, and what the disk refuses."""
        table = files.checked_table(Path(out))
        files.write_table(self.table, table)
        return [table, self.picture().write(table.with_suffix(".svg"))]

    def __str__(self) -> str:
        return self._summary()

    def _summary(self) -> str:
        ok = self.table.dropna(subset=["ipt"])
        parts = [_counted(len(self), self.counts)]
        if len(ok):
            low, high = self.interval
            parts.append(f"IPT {self.mean:.4g} ({low:.4g} to {high:.4g}) over {self.over}")
            parts.append(f"perplexity {ok['perplexity'].mean():.4g}, the least {ok['least_perplexity'].mean():.4g}")
        if alone := (ok["texts"] == 1).sum():
            parts.append(f"{alone} have one text alone, and so 0")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"<Transformed: {self._summary()}>"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._summary())}</p>{self.picture().svg}"


def quantiles(values: Float64[np.ndarray, "n"], others: Float64[np.ndarray, "sorted"]) -> Float64[np.ndarray, "n"]:
    """The share of `others` below each value, equal ones counting half."""
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))


def _head(row: Row, found: Likelihoods) -> dict[str, Any]:
    crystal = row.crystal
    return {
        "id": row.id,
        "row": row.row,
        "outcome": found.outcome,
        "reason": found.reason,
        "formula": None if crystal is None else spelled(crystal.formula),
        "num_atoms": pd.NA if crystal is None else len(crystal),
    }


def _lines(table: pd.DataFrame) -> list[str]:
    return [
        f"  {row.rank:>6}  {row.id}  {row.formula}  {-row.log_probability:.1f} nats, "
        f"{-row.log_probability_per_token:.2f} a token{f', {row.flag}' if row.flag else ''}"
        for row in table.itertuples()
    ]


def _counted(count: int, counts: dict[str, int]) -> str:
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    return f"{count} row{'s' * (count != 1)}: {outcomes}"


def _mean(values: Sequence[float]) -> str:
    values = np.asarray(values, np.float64)
    low, high = bootstrap_mean(values)
    return f"{values.mean():.4g} ({low:.4g} to {high:.4g})"


def _written(value: float, form: str) -> str:
    return "" if np.isnan(value) else f"{value:{form}}"


def _picture(row: Row) -> str:
    return "" if row.crystal is None else picture(row.crystal.to_structure())


def _formula(row: Row) -> str:
    return "" if row.crystal is None else row.crystal.formula_html
