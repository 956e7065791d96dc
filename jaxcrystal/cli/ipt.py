"""`jaxcrystal ipt`: say how much a model's perplexity depends on the way a crystal is written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "ipt",
        run,
        "say how much perplexity depends on the way a crystal is written",
        "IPT, the increase in perplexity under transformation (arXiv 2402.04379): of each crystal, written in several "
        "ways that mean the same, the mean perplexity less the least. 0: the model knows that they are the same "
        "(docs/likelihood.md).",
        resumes=True,
    )
    command.add_argument(
        "crystals", type=Path, metavar="CRYSTALS", help="any table, CIF, POSCAR, JSON or extxyz file, or folder of them"
    )
    options.add_reading(command)
    options.add_base(command)
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="x.parquet or x.csv, beside which is x.svg"
    )
    command.add_argument(
        "--over",
        choices=["translations", "orders", "cells", "descriptions"],
        help="what the ways are: of P1 texts translations, orders of atoms, or cells of the same lattice; of texts by "
        "symmetry descriptions (default: the first that the model's texts have)",
    )
    command.add_argument("--draws", type=int, default=20, metavar="N", help="ways that are drawn of each crystal")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other draws")


def run(args: argparse.Namespace) -> None:
    """Measures, and prints the mean."""
    from jaxcrystal.interface.scoring import ipt

    found = ipt(
        args.model,
        args.crystals,
        args.out,
        base=args.base,
        over=args.over,
        draws=args.draws,
        seed=args.seed,
        at_once=args.at_once,
        workers=args.workers,
    )
    print(found)
    print(f"written to {args.out.parent}: {args.out.name}, {args.out.with_suffix('.svg').name}")
