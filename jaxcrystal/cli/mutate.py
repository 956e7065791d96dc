"""`jaxcrystal mutate`: change an element of known crystals, as a model would, and see what it is worth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "mutate",
        run,
        "change an element of known crystals in three ways, and compare what they are worth",
        "One element of each crystal becomes another: one that the model draws for its place, one whose ions are as "
        "large, and any. All are rescaled, relaxed and placed against the hull alike; the table says which live. For a "
        "model that was trained to infill (docs/infilling.md).",
        resumes=True,
    )
    command.add_argument("crystals", metavar="CRYSTALS", help="any set of crystals, as of `infill`")
    command.add_argument(
        "--model", required=True, type=options.place, metavar="DIR", help="written by train or convert"
    )
    options.add_base(command)
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for the mutations (language.parquet, radius.parquet, random.parquet), an evaluation of each, and "
        "their comparison",
    )
    command.add_argument("--num", type=int, default=1, metavar="N", help="mutations of each crystal")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other mutations")
    command.add_argument(
        "--tolerance", type=float, default=0.1, metavar="X", help="Å, of the radii of ions that are as large"
    )
    command.add_argument("--potential", default="chgnet", metavar="P", help="`chgnet` or a matgl directory")
    command.add_argument("--hull", nargs="+", default=["mp"], metavar="FILE", help="competing phases, as of `evaluate`")
    command.add_argument("--references", metavar="FILE", help="elemental reference entries, as of `evaluate`")
    command.add_argument("--train", metavar="FILE", help="crystals that count as known: adds novelty")
    command.add_argument("--fmax", type=float, default=0.1, metavar="F", help="relax until forces are below, eV/Å")
    command.add_argument("--max-steps", type=int, default=500, metavar="N", help="of one relaxation")
    command.add_argument(
        "--workers", type=int, default=options.cores(), metavar="N", help="processes on this machine; 0: none but this"
    )


def run(args: argparse.Namespace) -> None:
    """Mutates, and prints the comparison."""
    from jaxcrystal.interface.mutating import mutate

    found = mutate(
        args.crystals,
        args.model,
        args.out,
        base=args.base,
        num=args.num,
        seed=args.seed,
        tolerance=args.tolerance,
        potential=args.potential,
        hull=args.hull,
        references=args.references,
        train=args.train,
        fmax=args.fmax,
        max_steps=args.max_steps,
        workers=args.workers,
    )
    print(found)
    print(f"written to {args.out}: a table and a report of each kind, and comparison/")
