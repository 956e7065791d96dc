"""Several predictions of one true crystal: is it among the first n, and how close is the best of them?

The n-shot figures of the field (DiffCSP, arXiv 2309.04475; CrystaLLM, arXiv 2307.04340): a true crystal is found if one
of its first n predictions matches it, and its displacement is the least of theirs. Predictions have the order of the
column `rank`, or else that of the rows. Rates are over true crystals, not over attempts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import bootstrap_mean, wilson
from jaxcrystal.reader.rows import Rows
from jaxcrystal.reader.sources import RANK

SHOTS = (1, 5, 20)  #: of these n those are told that the data hold

#: Columns that say which true crystals are a part of their own, and what it is called.
_PARTS = {"truth_new_formula": "new_formulas", "truth_lowest": "lowest"}

#: Labels by which crystals of one formula are compared, eV/atom; the first that a true crystal has.
_ENERGIES = ("formation_energy_per_atom", "e_above_hull")

Numbers = dict[str, float]
Intervals = dict[str, tuple[float, float]]


def columns(predicted: Rows, true: Rows, positions: Sequence[int], known: Rows | None = None) -> dict[str, list]:
    """What the table of attempts has of each prediction: `truth_id`; its `rank` among those of its true crystal, from
    1; with a training set, `known`, whether none of it has the true crystal's formula; and, where true crystals have
    an energy, whether no other of their formula, true or known, has a lower one.

    `positions` are those of the true crystals. Raises UserError for a rank that is missing or no number, and for one
    that two predictions of a true crystal have.
    """
    found: dict[str, list] = {
        "truth_id": [true.rows[i].id for i in positions],
        "rank": _places(predicted, positions),
    }
    if known is not None:
        there = {row.crystal.formula for row in known.rows if row.crystal is not None}
        found["truth_new_formula"] = [true.rows[i].crystal.formula not in there for i in positions]
    energies = [_energy(row.labels) for row in true.rows]
    if name := next((name for name in _ENERGIES if any(name in one for one in energies)), None):
        least: dict[str, float] = {}
        for row in (*true.rows, *(() if known is None else known.rows)):
            if row.crystal is not None and name in (energy := _energy(row.labels)):
                formula = row.crystal.formula
                least[formula] = min(energy[name], least.get(formula, np.inf))
        found["truth_lowest"] = [
            name in energies[i] and energies[i][name] <= least[true.rows[i].crystal.formula] for i in positions
        ]
    return found


def shots(table: pd.DataFrame) -> Iterator[tuple[Numbers, Intervals]]:
    """`prediction.match_rate_at_N` and `prediction.rmse_at_N`, in (V/N)^⅓, of all true crystals and of the parts that
    the table tells; of all also `_if_valid`, where a match counts only if both crystals are valid."""
    displacement, both_valid = by_rank(table, table["truth_displacement"]), table["structural_valid"]
    both_valid = both_valid & table["compositional_valid"] & table["truth_valid"]
    yield from _at("prediction", "", displacement)
    yield from _at("prediction", "_if_valid", by_rank(table, table["truth_displacement"].where(both_valid)))
    for part, rows in parts(table).items():
        if rows.any():
            yield from _at(f"prediction.{part}", "", displacement[rows])


def by_rank(table: pd.DataFrame, displacement: pd.Series) -> Float[np.ndarray, "truths most"]:
    """The displacements of each true crystal's predictions, by their rank; NaN where there is no match, or none of
    that rank. True crystals are in the order of their ids, whatever that of the rows."""
    truth, ids = pd.factorize(table["truth_id"], sort=True)
    rank = table["rank"].to_numpy(np.int64)
    found = np.full((len(ids), rank.max(initial=1)), np.nan)
    found[truth, rank - 1] = displacement
    return found


def parts(table: pd.DataFrame) -> dict[str, Bool[np.ndarray, "truths"]]:
    """Which true crystals, in the order of their ids, are of each part that the table tells."""
    each = table.drop_duplicates("truth_id").sort_values("truth_id")
    return {name: each[column].to_numpy(bool) for column, name in _PARTS.items() if column in table}


def counts(table: pd.DataFrame) -> dict[str, int]:
    """True crystals, those of each part, and the least and the most predictions of one."""
    each = table.groupby("truth_id").size()
    found = {"crystals": len(each)} | {part: int(rows.sum()) for part, rows in parts(table).items()}
    return found | {"fewest_predictions": int(each.min()), "most_predictions": int(each.max())}


def _at(place: str, suffix: str, displacement: Float[np.ndarray, "truths most"]) -> Iterator[tuple[Numbers, Intervals]]:
    for n in SHOTS:
        if n > displacement.shape[1]:
            return
        best = np.fmin.reduce(displacement[:, :n], axis=1)
        matched = best[~np.isnan(best)]
        name = f"{place}.match_rate_at_{n}{suffix}"
        yield {name: len(matched) / len(best)}, {name: wilson(len(matched), len(best))}
        if len(matched):
            name = f"{place}.rmse_at_{n}{suffix}"
            yield {name: float(matched.mean())}, {name: bootstrap_mean(matched)}


def _places(predicted: Rows, positions: Sequence[int]) -> list[int]:
    ranked = any(RANK in sample.labels for sample in predicted.rows)
    order: dict[int, list[tuple[float, int]]] = {}
    for i, (sample, position) in enumerate(zip(predicted.rows, positions, strict=True)):
        order.setdefault(position, []).append((_rank(predicted, i) if ranked else float(sample.row), i))
    found = [0] * len(positions)
    for predictions in map(sorted, order.values()):
        for place, (rank, i) in enumerate(predictions, start=1):
            found[i] = place
            if place > 1 and rank == predictions[place - 2][0]:
                sample = predicted.rows[i]
                raise UserError(
                    f"{predicted.path}, row {sample.row}: another prediction of {sample.id!r} has the rank {rank:g} "
                    f"too; give each its own, or remove the column {RANK!r}: then rows count in their order"
                )
    return found


def _rank(predicted: Rows, i: int) -> float:
    sample = predicted.rows[i]
    rank = _number(sample.labels.get(RANK))
    if rank is None:
        raise UserError(
            f"{predicted.path}, row {sample.row}: the rank is {sample.labels.get(RANK)!r}; give a number, the least to "
            f"the first prediction, or remove the column {RANK!r}: then rows count in their order"
        )
    return rank


def _energy(labels: Any) -> dict[str, float]:
    found = {name: _number(labels.get(name)) for name in _ENERGIES}
    return {name: energy for name, energy in found.items() if energy is not None}


def _number(value: Any) -> float | None:
    """None for what is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
