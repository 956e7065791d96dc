"""`jaxcrystal improve`: a loop in which the evaluator teaches the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "improve",
        run,
        "let a model learn from those of its crystals that a potential believes in",
        "RECIPE is a YAML file, or improve_mini, which comes with the package. Each round draws crystals, relaxes "
        "them, keeps those that are new and lie near the hull, trains on all, and judges the new model by another "
        "potential (docs/improving.md). What was stopped goes on when it is started again.",
        resumes=True,
    )
    command.add_argument("recipe", type=options.place, metavar="RECIPE", help="YAML file, or improve_mini")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe, for example judging.potential=POTENTIALS/M3GNet; may be repeated",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=int, default=options.cores(), metavar="N", help="processes on this machine; 0: none but this"
    )
    where.add_argument("--dask", metavar="ADDRESS", help="a cluster's scheduler instead, such as tcp://10.0.0.1:8786")


def run(args: argparse.Namespace) -> None:
    """Improves, and prints the story."""
    from jaxcrystal.config import load
    from jaxcrystal.improvement.recipe import Improvement
    from jaxcrystal.improvement.rounds import improve
    from jaxcrystal.improvement.story import as_markdown

    recipe = load(Improvement, args.recipe, args.set)
    print(as_markdown(recipe, improve(recipe, args.dask or args.workers)))
    print(f"written to {recipe.out}: rounds.csv, rounds.md, rounds.svg; the last model is round_{recipe.rounds}/model")
