"""What was compiled for TPUs, as the table of docs/tpu.md: `python benchmarks/aot_table.py` writes it there.

Every figure is read from a JSON file of `results/aot/`, which `launch/aot_compile.py --json` wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from machine import RESULTS

PAGE = Path(__file__).parents[1] / "docs/tpu.md"
BEGIN, END = "<!-- compiled: written by benchmarks/aot_table.py -->\n", "<!-- end of compiled -->\n"
COLUMNS = "recipe, step|pod, mesh|tokens|GiB a chip|fits|TFLOP a chip|received a chip|at least|tokens/s, at most"
GIB = 2**30


def rendered(directory: Path = RESULTS / "aot") -> str:
    """A row for each program, the small models first, training before sampling."""
    reports = [report for path in sorted(directory.glob("*.json")) for report in json.loads(path.read_text())]
    reports.sort(key=lambda report: (_billions(report), report["topology"], report["step"] == "decode", report["set"]))
    columns = COLUMNS.split("|")
    rows = [columns, ["---"] * len(columns), *(_row(report) for report in reports)]
    versions = sorted({f"jax {report['jax']}, libtpu {report['libtpu']}" for report in reports})
    return "\n".join([f"{'; '.join(versions)}.", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _row(report: dict[str, Any]) -> list[str]:
    changed = "".join(f", `{change}`" for change in report["set"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    limit, spare = report["chip"]["usable_hbm"], report["spare_bytes"] / GIB
    least = "" if "memory" in report else "≥ "
    cells = [
        f"{report['config']}{changed}, **{report['step']}**",
        f"{report['topology']}, {mesh}",
        f"{report['tokens']:,}",
        f"{least}{report['needed_bytes'] / GIB:.2f} of {limit:.2f}",
        f"yes, {spare:.2f} to spare" if report["fits"] else f"**no**, {-spare:.2f} too much",
    ]
    if "memory" not in report:
        return [*cells, "", "", "", ""]
    received = sum(message["received_bytes"] for message in report["collectives"]) / GIB
    roofline = report["roofline"]
    bounds = sorted(("compute", "hbm", "interconnect"), key=lambda name: -roofline[name])
    times = ", ".join(f"{name} {roofline[name] * 1e3:.0f}" for name in bounds)
    cells += [f"{report['flops'] / 1e12:.1f}", f"{received:.1f} GiB", f"{roofline['seconds'] * 1e3:.0f} ms ({times})"]
    return [*cells, f"{roofline['tokens_per_second']:,.0f}"]


def _billions(report: dict[str, Any]) -> int:
    """LLaMA-2's size, from the recipe's name: llama2_7b_mp20."""
    return int(report["config"].split("_")[1].removesuffix("b"))


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + rendered() + END + rest.partition(END)[2])
