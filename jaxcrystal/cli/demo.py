"""`jaxcrystal demo`: train, sample, evaluate and report, small and offline, in minutes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "demo",
        run,
        "train, sample, evaluate and report, small and offline, in minutes",
        "Ends with DIR/report/report.html. A demo that was stopped goes on when it is started again.",
        resumes=True,
    )
    command.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to")


def run(args: argparse.Namespace) -> None:
    """Runs the demo."""
    from jaxcrystal.demo import demo

    demo(args.out)
