"""`jaxcrystal prepare`: check crystals, reduce them to the Niggli cell, store them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "prepare",
        run,
        "check crystals, reduce them to the Niggli cell, store them",
        "INPUT is a CSV, parquet or JSON file of crystals, a CIF, POSCAR or extxyz file, a folder of CIFs and POSCARs, "
        "or the word prototypes (the data set that comes with the package). Each becomes DIR/<its name>.parquet; "
        "report.json, left_out.csv, doubts.csv and notes.csv beside it say what was left out, not believed and "
        "changed. Exits with 1 if an INPUT gives no crystal.",
    )
    command.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="file, folder, or a name of the package's data (mp20, prototypes)"
    )
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    command.add_argument("--no-niggli", dest="niggli", action="store_false", help="keep the cells as they are")
    command.add_argument("--max-atoms", type=int, default=20, metavar="N", help="leave larger cells out; 0: none")
    command.add_argument("--symprec", type=float, default=0.1, metavar="X", help="Å, how far from symmetric (0.1)")
    command.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="CSV or parquet of labels of one's own, joined to the crystals by a column of ids (material_id)",
    )
    command.add_argument("--workers", type=int, default=options.cores(), metavar="N", help="processes")


def run(args: argparse.Namespace) -> int:
    """Prepares, and prints the account; 1 if an input gives no crystal."""
    import jaxcrystal

    most = args.max_atoms or None
    report = jaxcrystal.prepare(
        args.inputs,
        args.out,
        niggli=args.niggli,
        max_atoms=most,
        symprec=args.symprec,
        labels=args.labels,
        workers=args.workers,
    )
    print(report)
    return 0 if all(part.kept for part in report.parts) else 1
