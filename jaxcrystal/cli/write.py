"""`jaxcrystal write`: crystals as the files that others read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "write",
        run,
        "write crystals as the files that others read",
        "SOURCE is what `sample` wrote, or any table, file or folder of crystals (docs/reading.md). OUT that ends in "
        ".csv or .parquet is a table with pymatgen's structures in the column `structure`, as LeMat-GenBench takes it, "
        "empty where a row is no crystal; any other OUT is a new folder with a file of each crystal.",
    )
    command.add_argument("source", metavar="SOURCE", help="file, folder, or a name of the package's data")
    command.add_argument("--out", required=True, type=Path, metavar="OUT", help="x.csv, x.parquet, or a folder")
    command.add_argument("--form", default="cif", choices=["cif", "poscar"], help="of the files in a folder")
    command.add_argument(
        "--workers", type=int, default=options.cores(), metavar="N", help="processes that read SOURCE; 0: none but this"
    )


def run(args: argparse.Namespace) -> None:
    """Writes, and prints how many rows were crystals."""
    from jaxcrystal.interface.writing import write

    crystals, _ = write(args.source, args.out, form=args.form, workers=args.workers)
    ok = sum(row.crystal is not None for row in crystals)
    others = "".join(f", {count} {outcome}" for outcome, count in crystals.counts.items() if outcome != "ok")
    print(f"{args.out}: {ok} crystals of {len(crystals)} rows{others}")
