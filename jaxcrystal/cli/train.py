"""`jaxcrystal train`: fine-tune a LLaMA with adapters, or train a small one from random weights."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxcrystal.cli import options

if TYPE_CHECKING:
    from jaxcrystal.training.loop import TrainReport


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "train",
        run,
        "fine-tune a LLaMA with adapters, or train a small one from random weights",
        "CONFIG is a YAML recipe, or the name of one that comes with the package, such as tiny_cpu. A run that was "
        "stopped goes on when it is started again.",
        resumes=True,
    )
    command.add_argument("config", type=options.place, metavar="CONFIG", help="YAML recipe, or the name of one")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the recipe, for example optimizer.learning_rate=1e-3; may be repeated",
    )
    options.add_hosts(command)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints the last losses; 130 if Ctrl-C stopped it."""
    import jaxcrystal
    from jaxcrystal import hosts
    from jaxcrystal.config import Recipe, load

    recipe = load(Recipe, args.config, args.set)
    hosts.start(args.coordinator, args.processes, args.process_id)
    report = jaxcrystal.train(recipe)
    if hosts.is_first():
        print(_ending(report))
    return 130 if report.stopped is signal.SIGINT else 0


def _ending(report: TrainReport) -> str:
    if report.stopped is not None:
        return f"saved after step {report.steps}, on {report.stopped.name}; run the same command again to go on"
    losses = "all done before"
    if report.loss is not None:
        losses = f"loss {report.loss:.4f}, validation loss {report.validation_loss:.4f}"
    command = f"jaxcrystal sample --model {report.out} --num 100 --out samples.parquet"
    return f"{report.steps} steps, {losses}; sample from it with `{command}`"
