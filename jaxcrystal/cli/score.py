"""`jaxcrystal score`: say how probable a model finds crystals."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options
from jaxcrystal.texts.conditions import CONDITIONS


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "score",
        run,
        "say how probable a model finds crystals",
        "The exact log-probability of each crystal's text, or of all texts that describe it; of P1 texts, where "
        "training drew translations, that of the mean probability, with its interval. Every row of CRYSTALS becomes a "
        "row of --out, with its rank (docs/likelihood.md).",
        resumes=True,
    )
    command.add_argument(
        "crystals", type=Path, metavar="CRYSTALS", help="any table, CIF, POSCAR, JSON or extxyz file, or folder of them"
    )
    options.add_reading(command)
    options.add_base(command)
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="x.parquet or x.csv")
    command.add_argument(
        "--beside",
        type=Path,
        metavar="DATA",
        help="other crystals, such as the validation set: adds each one's quantile among them, and flags what training "
        "had and is remembered, and what is unlike any",
    )
    command.add_argument(
        "--draws",
        type=int,
        default=20,
        metavar="N",
        help="translations and orders of atoms of P1 texts, where training drew them; 0: the crystal's own text alone",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other draws")
    conditions = command.add_argument_group("conditions, stated in the prompt of all (none: the prompt states nothing)")
    command._negative_number_matcher = re.compile(r"-[\d.]")  # of argparse: what is no option though it begins with -
    for each in CONDITIONS:
        unit = each.unit.partition(",")[0].partition(";")[0]  # a prompt states one value, and there is no grammar
        conditions.add_argument(each.option, type=each.typed, metavar=each.metavar, help=unit)
    options.add_property(conditions, "a property of the model's own")


def run(args: argparse.Namespace) -> None:
    """Scores, and prints the likeliest crystals and the least likely ones."""
    from jaxcrystal.interface.scoring import score
    from jaxcrystal.sampling.conditions import Trained
    from jaxcrystal.weights.saved import model_directory

    stated = {each.attribute: getattr(args, each.name) for each in CONDITIONS}
    stated |= options.properties(args.property, Trained.read(model_directory(args.model)).text.properties)
    found = score(
        args.model,
        args.crystals,
        args.out,
        base=args.base,
        draws=args.draws,
        seed=args.seed,
        beside=args.beside,
        conditions={name: value for name, value in stated.items() if value is not None},
        at_once=args.at_once,
        workers=args.workers,
    )
    print(found)
    print(f"written to {args.out}; `jaxcrystal evaluate {args.crystals} --scores {args.out}` sets it beside energies")
