"""Seconds to prepare MP-20's training set, by this checkout and by an earlier version of it, in turns.

    python benchmarks/prepare.py               27,108 rows, all cores, beside a3d077c; some minutes
    python benchmarks/prepare.py --quick       40 rows, a check that it runs; its figures mean nothing

Each run is a process of its own, from its start to the written data set, so that imports count. The earlier version is
checked out of this repository's history into a temporary folder. Before a time counts, both data sets are compared: as
many rows, and each crystal with the other's formula and, to 1e-4, its volume.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd

from jaxcrystal.crystals.dataset import CrystalSet, load

ROOT = Path(__file__).parents[1]
TRAIN = ROOT.parent / "shared" / "data" / "mp20" / "train.parquet"
OURS = "this version"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="a3d077c", metavar="COMMIT", help="the earlier version (a3d077c)")
    parser.add_argument("--data", type=Path, default=TRAIN, help="what is prepared (MP-20 beside the checkout)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is run (3)")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if not options.data.is_file():
        parser.error(f"{options.data} does not exist; give a file with --data")
    measured = machine.facts(uses_accelerator=False)
    with tempfile.TemporaryDirectory() as folder:
        work, data = Path(folder), options.data
        if options.quick:
            options.rounds, data = 1, work / "some.parquet"
            pd.read_parquet(options.data).head(40).to_parquet(data)
        old = work / "old"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(old), options.against], check=True
        )
        try:
            sides = {OURS: ROOT, options.against: old}
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side, checkout in sides.items():
                    seconds[side].append(_prepare(checkout, data, work / side.replace(" ", "_")))
            ours, theirs = (load(work / side.replace(" ", "_") / f"{data.stem}.parquet") for side in sides)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(old)], check=True)
    _compare(ours, theirs)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    result = {
        "benchmark": "prepare",
        "quick": options.quick,
        "measured": measured,
        "rows": len(ours),
        "seconds": seconds,
        "median_seconds": medians,
        "ratios_pair_by_pair": [b / a for a, b in zip(*seconds.values(), strict=True)],
        "ratio": medians[options.against] / medians[OURS],
    }
    print(
        f"{len(ours)} rows: {medians[OURS]:.1f} s against {medians[options.against]:.1f} s, {result['ratio']:.2f} times"
    )
    print(machine.write("prepare", result, options.out))
    return result


def _prepare(checkout: Path, data: Path, out: Path) -> float:
    """Seconds of one run of `prepare` by the code of a checkout, on all cores."""
    command = [sys.executable, "-m", "jaxcrystal.cli", "prepare", str(data), "--out", str(out)]
    command += ["--workers", str(machine.cores())]
    start = time.perf_counter()
    subprocess.run(
        command, check=True, capture_output=True, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}
    )
    return time.perf_counter() - start


def _compare(ours: CrystalSet, theirs: CrystalSet) -> None:
    assert ours.ids == theirs.ids
    for i in range(len(ours)):
        one, other = ours.crystal(i), theirs.crystal(i)
        assert one.formula == other.formula and len(one) == len(other), ours.ids[i]
        assert np.isclose(one.volume, other.volume, rtol=1e-4), ours.ids[i]


if __name__ == "__main__":
    main()
