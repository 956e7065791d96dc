"""What came of the rounds: whether the model improves, or only repeats itself.

    rounds.csv    a row a round and quantity, with its 95 % interval: all of it is counted anew from the rounds' folders
    rounds.md     the same as a table, a column a round
    rounds.svg    the rates over the rounds
    comparison/   the judged evaluations side by side, as `jaxcrystal compare` has them

Rates are of the judged attempts, which nothing selected. A crystal is novel against all that the model was trained on,
earlier rounds included; `_original` is novel against the set that it began with alone. `validation_nats` are those of
the tokens that the loss counts, a crystal of the validation rows; `seconds` are of all starts together.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from jaxcrystal.crystals.dataset import written_whole
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.intervals import bootstrap_mean, wilson
from jaxcrystal.evaluation.metrics import metastable_rows
from jaxcrystal.improvement.recipe import Improvement
from jaxcrystal.report.compare import compare

#: What is drawn over the rounds, by the name of the quantity.
DRAWN = {
    "metastable_sun": "metastable, unique, novel",
    "metastable_sun_original": "the same, novel to the original set",
    "metastable": "metastable",
    "unique": "unique",
    "novel": "novel",
    "one_element": "of one element",
}


class Round(Protocol):
    """What is told of: a round that is done."""

    number: int  #: 0: the model as it came
    parts: tuple[Path, ...]  #: what its model was trained on: the original set, and what each round kept

    @property
    def folder(self) -> Path: ...

    @property
    def train_set(self) -> Path: ...  # all of that in one file


def write(recipe: Improvement, rounds: Sequence[Round]) -> pd.DataFrame:
    """Writes the story of the rounds that are done; returns what rounds.csv holds.

    Raises UserError if the folder cannot be written.
    """
    out = Path(recipe.out)
    rows = [(one.number, *row) for one in rounds for row in quantities(one)]
    story = pd.DataFrame(rows, columns=["round", "quantity", "value", "low_95", "high_95"])
    with written_whole(out / "rounds.csv") as unfinished:
        story.to_csv(unfinished, index=False)
    with written_whole(out / "rounds.md") as unfinished:
        unfinished.write_text(as_markdown(recipe, story), encoding="utf-8")
    with written_whole(out / "rounds.svg") as unfinished:
        _draw(title(recipe), story, unfinished)
    if len(rounds) > 1:
        compare([one.folder / "judged" for one in rounds], out / "comparison")
    return story


def title(recipe: Improvement) -> str:
    """Who was improved, who selected, and who judged."""
    selects, judges = Path(recipe.selection.potential).name, recipe.judging.potential
    if judges is None:
        return f"{recipe.model}, improved by what {selects} selects; energies are not judged"
    if recipe.judging.judge_selects:
        return f"{recipe.model}, improved by what {selects} selects, which judges too: energies flatter"
    return f"{recipe.model}, improved by what {selects} selects, judged by {Path(judges).name}"


def quantities(one: Round) -> Iterator[tuple[str, float, float, float]]:
    """Of a round: name, value and interval, nan where it has none."""
    none = (np.nan, np.nan)
    yield "trained_on", pq.read_metadata(one.train_set).num_rows, *none
    if one.number:
        verdicts = Counter(pd.read_csv(one.folder / "verdicts.csv")["verdict"])
        for verdict, count in sorted(verdicts.items()):
            yield f"attempts_{verdict}", count, *none
        logged = [json.loads(line) for line in (one.folder / "model/metrics.jsonl").read_text().splitlines()]
        validated = [line for line in logged if line["event"] == "validation"][-1]
        yield "validation_nats", validated["loss"] * validated["tokens"] / validated["crystals"], *none
        seconds = json.loads((one.folder / "seconds.json").read_text())
        yield "seconds", sum(seconds.values()), *none
    table = results.read(one.folder / "judged").table
    for name, mask in rates(table, _added(one.parts[1:])).items():
        yield name, mask.mean(), *wilson(int(mask.sum()), len(mask))
    counts = table["num_elements"].dropna().to_numpy(np.float64)
    yield "elements", counts.mean(), *bootstrap_mean(counts)
    yield "distinct_formulas", table["formula"].nunique(), *none


def _added(parts: Sequence[Path]) -> set[str]:
    """Ids of the crystals that the rounds kept."""
    return {name for path in parts for name in pd.read_parquet(path, columns=["material_id"])["material_id"]}


def rates(table: pd.DataFrame, added: set[str]) -> dict[str, pd.Series]:
    """Which judged attempts are what, by the name of the rate; relaxed where there was a potential."""
    suffix = "_relaxed" if "unique_relaxed" in table else ""
    unique, novel = (table[f"{name}{suffix}"].astype(bool) for name in ("unique", "novel"))
    known_as = table[f"known_as{suffix}"]
    original = novel | known_as.isin(added)  # the original set's rows come first, and so it would be named
    found = {
        "valid": table["structural_valid"] & table["compositional_valid"],
        "unique": unique,
        "novel": novel,
        "novel_original": original,
        "replay": known_as.notna(),
        "one_element": table["num_elements"].eq(1).fillna(False).astype(bool),
    }
    if "e_above_hull" in table:
        metastable = metastable_rows(table)
        found |= {
            "metastable": metastable,
            "metastable_sun": metastable & unique & novel,
            "metastable_sun_original": metastable & unique & original,
        }
    return found


def as_markdown(recipe: Improvement, story: pd.DataFrame) -> str:
    """A column a round."""
    rounds = sorted(story["round"].unique())
    lines = [f"# {title(recipe)}", "", "| | " + " | ".join(f"round {n}" for n in rounds) + " |"]
    lines.append("| --- |" + " --: |" * len(rounds))
    for name, rows in story.groupby("quantity", sort=False):
        cells = {row.round: _cell(name, row) for row in rows.itertuples()}
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells.get(n, "") for n in rounds) + " |")
    return "\n".join([*lines, ""])


def _cell(name: str, row: Any) -> str:
    if np.isnan(row.low_95):
        return f"{row.value:,.0f}" if float(row.value).is_integer() or name == "seconds" else f"{row.value:.4f}"
    if name == "elements":
        return f"{row.value:.2f} ({row.low_95:.2f} to {row.high_95:.2f})"
    return f"{row.value:.1%} ({row.low_95:.1%} to {row.high_95:.1%})"


def _draw(heading: str, story: pd.DataFrame, path: Path) -> None:
    """The rates of `DRAWN` over the rounds, with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for place, (name, label) in enumerate(DRAWN.items()):
        rows = story[story["quantity"] == name]
        if len(rows):
            values = 100 * rows[["value", "low_95", "high_95"]].to_numpy().T
            spread = np.maximum(0, [values[0] - values[1], values[2] - values[0]])
            beside = rows["round"] + 0.03 * (place - len(DRAWN) / 2)  # equal numbers do not hide each other
            axes.errorbar(beside, values[0], spread, marker="o", markersize=4, capsize=2, linewidth=1.2, label=label)
    figure.suptitle(textwrap.fill(heading, 90), x=0.01, horizontalalignment="left", fontsize="medium")
    axes.set(xlabel="round", ylabel="of judged attempts, %", ylim=(-2, 102))
    axes.set_xticks(sorted(story["round"].unique()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="svg")
    plt.close(figure)
