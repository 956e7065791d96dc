"""`jaxcrystal report`: write the page of an evaluation again, from its tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "report",
        run,
        "write the page of an evaluation again, from its tables",
        "DIR is a folder that `evaluate` wrote. After an upgrade this makes the newer page without evaluating anew; "
        "where nothing changed it makes the same page, byte for byte.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="the folder of the evaluation")


def run(args: argparse.Namespace) -> None:
    """Writes the page, and prints where it is."""
    from jaxcrystal import locks
    from jaxcrystal.report import report

    with locks.held(args.folder):
        print(f"written: {report.write(args.folder)}")
