"""`jaxcrystal demo`: what mini designs, relaxed, placed and reported, in minutes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "demo",
        run,
        "what mini designs, relaxed, placed against a hull and reported: offline, in minutes",
        "mini is a small model that comes with the package. Ends with DIR/new/report.html. A demo that was stopped "
        "goes on when it is started again.",
        resumes=True,
    )
    command.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to")


def run(args: argparse.Namespace) -> None:
    """Runs the demo."""
    from jaxcrystal.demo import demo

    demo(args.out)
