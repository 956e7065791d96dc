"""What `pretraining.py` found, as tables and figure of docs/pretraining.md: `python benchmarks/pretraining_page.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import machine
import numpy as np

PAGE = Path(__file__).parents[1] / "docs/pretraining.md"
FIGURE = PAGE.with_suffix(".svg")
BEGIN, END = "<!-- written by benchmarks/pretraining_page.py -->\n", "<!-- end -->\n"


def results(directory: Path = machine.RESULTS) -> list[dict[str, Any]]:
    """One of each machine."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("pretraining_*.json"))]


def rendered(found: list[dict[str, Any]]) -> str:
    """A table for each machine: a row for each way of training, a column for each number of crystals seen."""
    lines = []
    for result in found:
        measured, base, *points = result["measured"], *result["points"]
        lines += [f"On {measured['machine']}, {measured['date'][:10]}, {measured['commit']}.", ""]
        lines += [f"{result['earlier'][0].upper()}{result['earlier'][1:]}.", ""] if "earlier" in result else []
        lines += _rates(result)
        seen = sorted({point["crystals"] for point in points})
        for title, cell in (("nats a held-out crystal", _nats), ("compositions that balance", _compositional)):
            lines.append(f"| {title} | rate | 0 crystals seen |" + "".join(f" {n:,} |" for n in seen))
            lines.append("| --- | --: | --: |" + " --: |" * len(seen))
            lines.append(f"| base, untrained | | {cell(base)} |" + " |" * len(seen))
            for variant, dtype in dict.fromkeys((point["variant"], point["trained_in"]) for point in points):
                row = {p["crystals"]: p for p in points if (p["variant"], p["trained_in"]) == (variant, dtype)}
                rate = next(iter(row.values()))["rate"]
                cells = "".join(f" {cell(row[n])} |" if n in row else " |" for n in seen)
                lines.append(f"| {variant}, {dtype} | {rate:g} | |{cells}")
            lines.append("")
    return "\n".join([*lines, ""])


def _rates(result: dict[str, Any]) -> list[str]:
    """What each rate that was tried came to, by which the best was chosen; a row for each way of training."""
    rows = f"the first {result['rows'] // 4} of the held-out crystals"
    lines = [f"| nats after {result['first']:,} crystals, {rows} | by rate |", "| --- | --- |"]
    for variant, tried in result["rates"].items():
        best = min((one["nats"] for one in tried.values()), default=None)
        cells = []
        for rate in sorted(tried, key=float):
            nats = f"{tried[rate]['nats']:.1f}"
            cells.append(f"{f'**{nats}**' if tried[rate]['nats'] == best else nats} at {float(rate):g}")
        dtypes = " and ".join(sorted({one["trained_in"] for one in tried.values()}))
        lines.append(f"| {variant}, {dtypes} | {', '.join(cells)} |")
    return [*lines, ""]


def _nats(point: dict[str, Any]) -> str:
    low, high = point["interval"]
    return f"{point['nats']:.1f} ({low:.1f} to {high:.1f})"


def _compositional(point: dict[str, Any]) -> str:
    low, high = point["compositional_interval"]
    return f"{100 * point['compositional']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def draw(result: dict[str, Any], path: Path) -> None:
    """Nats over crystals seen, a line for each way of training; the base before any as a level."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    base, *points = result["points"]
    for variant, dtype in dict.fromkeys((point["variant"], point["trained_in"]) for point in points):
        row = [p for p in points if (p["variant"], p["trained_in"]) == (variant, dtype)]
        middle, ends = np.array([p["nats"] for p in row]), np.array([p["interval"] for p in row]).T
        seen = [p["crystals"] for p in row]
        axes.errorbar(
            seen, middle, np.abs(ends - middle), marker="o", markersize=4, capsize=2, label=f"{variant}, {dtype}"
        )
    axes.axhline(base["nats"], color="gray", linestyle="--", label="base, untrained")
    axes.set(xscale="log", yscale="log", xlabel="crystals seen", ylabel="−log p of a held-out crystal, nats")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + rendered(results()) + END + rest.partition(END)[2])
    draw(results()[-1], FIGURE)
