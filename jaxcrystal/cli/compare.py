"""`jaxcrystal compare`: set evaluations side by side, with the differences' intervals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "compare",
        run,
        "set evaluations side by side, with the differences' intervals",
        "RUN is a folder that `evaluate` wrote, or its metrics.json. Each is compared with the first; what means "
        "something else there (another protocol, reference, potential, hull) is not, and says why.",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="two or more")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for comparison.csv, comparison.md and comparison.svg"
    )


def run(args: argparse.Namespace) -> None:
    """Compares, and prints the table."""
    from jaxcrystal.report.compare import as_text, compare

    print(as_text(compare(args.runs, args.out)))
    if args.out is not None:
        print(f"written to {args.out}: comparison.csv, comparison.md, comparison.svg")
