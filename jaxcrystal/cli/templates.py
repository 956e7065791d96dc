"""`jaxcrystal templates`: make new crystals of known ones, by other elements of like size."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "templates",
        run,
        "make new crystals of known ones, by other elements of like size",
        "Each attempt takes a crystal of SOURCE at random, gives the sites of its elements to others whose ions are as "
        "large, and rescales its volume: a baseline for any model. It becomes a row of --out, whatever came of it; "
        "attempt I of seed S is the same however many are made.",
    )
    command.add_argument(
        "source",
        nargs="?",
        default="mp20",
        metavar="SOURCE",
        help="file, folder, or a name of the package's data (default: mp20)",
    )
    command.add_argument("--num", required=True, type=int, metavar="N", help="attempts")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="x.parquet or x.csv")
    command.add_argument(
        "--swaps",
        type=int,
        metavar="K",
        help="elements of a crystal that become others, drawn at random (default: all)",
    )
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="X",
        help="Å, between the radii of an ion and the one it replaces",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="decides, with its number, each attempt")
    command.add_argument("--new", action="store_true", help="draw again where a crystal of SOURCE has the formula")
    command.add_argument(
        "--workers", type=int, default=options.cores(), metavar="N", help="processes that read SOURCE; 0: none but this"
    )


def run(args: argparse.Namespace) -> None:
    """Makes them, and prints what came of it."""
    import jaxcrystal

    made = jaxcrystal.templates(
        args.source,
        args.num,
        args.out,
        swaps=args.swaps,
        tolerance=args.tolerance,
        seed=args.seed,
        new=args.new,
        workers=args.workers,
    )
    shares = ", ".join(f"{count} {status}" for status, count in made.counts.items())
    print(f"{len(made)} attempts in {args.out}: {shares}; judge them with `jaxcrystal evaluate {args.out}`")
    if args.new:
        redraws = sum(row.redraws for row in made)
        print(f"drawn again, for {args.source} had their formula: {redraws} (column `redraws`)")
