"""`jaxcrystal hull`: build the convex hull that `evaluate --hull` takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "hull",
        run,
        "build the convex hull that `evaluate --hull` takes",
        "INPUT is mp:Li-Fe-O (the Materials Project, by mp-api, with your key in MP_API_KEY), JSON of pymatgen's "
        "computed entries, a phase diagram such as matbench-discovery's, or a table of formation energies with "
        "--references; several are joined. With --potential it is crystals, which the potential labels. The file says "
        "on which scale it stands, from what it was made and what was left out.",
    )
    command.add_argument("action", choices=["build"], metavar="build", help="what to do")
    command.add_argument("inputs", nargs="+", metavar="INPUT", help="of one kind")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="the parquet to write")
    command.add_argument(
        "--references", metavar="FILE", help="elemental reference entries, where INPUT holds formation energies"
    )
    command.add_argument("--potential", metavar="P", help="labels crystals itself: `chgnet` or a matgl directory")
    options.add_labels(command, "--labels")
    command.add_argument("--samples", metavar="FILE", help="label only crystals in the chemical systems of these")
    command.add_argument("--trust-pickle", action="store_true", help="read a pickle, which runs whatever code is in it")
    command.add_argument("--workers", type=int, default=options.cores(), metavar="N", help="processes")


def run(args: argparse.Namespace) -> None:
    """Builds the hull, and prints what is in it."""
    from jaxcrystal.hull.sources import build
    from jaxcrystal.workers import local

    args.resumes = args.potential is not None  # the labels of a potential are kept one by one
    with local(args.workers) as workers:
        hull = build(
            args.inputs,
            args.out,
            references=args.references,
            potential=args.potential,
            labels=args.labels,
            samples=args.samples,
            trust_pickle=args.trust_pickle,
            workers=workers,
        )
    phases = sum(map(len, hull.phases.values()))
    print(f"{args.out}: {phases} phases of {len(hull.phases)} chemical systems, from {hull.name}")
    print(f"  energies {hull.scale}")
    for reason, count in sorted((hull.left_out or {}).items()):
        print(f"  left out: {count:>6} {reason}")
