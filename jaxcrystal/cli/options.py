"""Options that several verbs share, and what is typed as their values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.paths import is_remote
from jaxcrystal.texts.conditions import Properties, condition


def cores() -> int:
    """Those that this process may use: a cluster gives fewer than the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place(typed: str) -> Path | str:
    """A local path, or one in a store as it is, which pathlib would read as a folder `gs:`."""
    return typed if is_remote(typed) else Path(typed)


def symbols(typed: str) -> list[str]:
    """`Li,O` as a list."""
    return typed.replace(" ", "").split(",")


def atoms(typed: str) -> tuple[int, int] | str:
    """`8` or `4-12` as the least and the most; `any` as it is."""
    if typed == "any":
        return typed
    low, dash, high = typed.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed!r} is neither a number nor a range like 4-12 nor any") from None


def groups(typed: str) -> tuple[int, ...]:
    """`221,225` or `195-230`, or several of these, as numbers of space groups."""
    return _numbers(typed, f"{typed!r} are no space groups; write them like 221,225 or 195-230")


def numbers(typed: str) -> tuple[int, ...]:
    """`0,2` or `4-6`, or several of these, as numbers of sites."""
    return _numbers(typed, f"{typed!r} are no numbers of sites; write them like 0,2 or 4-6")


def rows(typed: str) -> tuple[int, ...]:
    """`3,17` or `4-6`, or several of these, as numbers of rows."""
    return _numbers(typed, f"{typed!r} are no numbers of rows; write them like 3,17 or 4-6")


def _numbers(typed: str, wrong: str) -> tuple[int, ...]:
    found: list[int] = []
    try:
        for part in typed.replace(" ", "").split(","):
            low, dash, high = part.partition("-")
            these = range(int(low), int(high if dash else low) + 1)
            if not these:
                raise ValueError
            found += these
    except ValueError:
        raise argparse.ArgumentTypeError(wrong) from None
    return tuple(found)


def interval(typed: str) -> tuple[float, float]:
    """`2.5-30` as two numbers."""
    try:
        low, high = map(float, typed.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed!r} is no range; write it like 2.5-30") from None
    return low, high


def add_hosts(command: argparse.ArgumentParser) -> None:
    """How the processes of a job on many hosts find each other."""
    hosts = command.add_argument_group(
        "many hosts", "needed only outside Slurm, TPU pods and GKE, which are recognised"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    hosts.add_argument("--processes", type=int, metavar="N", help="number of processes of the job")
    hosts.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def add_labels(command: argparse.ArgumentParser, option: str) -> None:
    """How a potential labels the crystals of a hull."""
    command.add_argument(
        option,
        choices=["relaxed", "single-point"],
        default="relaxed",
        help="how the potential labels the hull's crystals: where they relax to, or where they stand, which is quicker",
    )


def add_property(command: Any, what: str) -> None:
    """Of the verbs that state conditions in a prompt; `what` they take."""
    command.add_argument(
        "--property",
        action="append",
        default=[],
        metavar="NAME=X",
        help=what,
    )


def properties(typed: Sequence[str], known: Properties) -> dict[str, Any]:
    """Values by name. Raises UserError for a property that is not known."""
    return dict(_property(each, known) for each in typed)


def _property(typed: str, properties: Properties) -> tuple[str, Any]:
    name, separator, value = typed.partition("=")
    if not separator:
        raise UserError(f"--property {typed}: write NAME=VALUE, or NAME=LOW:HIGH")
    own = [each.name for each in properties]
    if name not in own:
        raise UserError(f"--property {typed}: the model has {', '.join(own) or 'none'}")
    return name, condition(name, properties).read(value)


def add_reading(command: argparse.ArgumentParser) -> None:
    """Which model reads crystals, and where."""
    command.add_argument(
        "--model",
        required=True,
        type=place,
        metavar="DIR",
        help="written by train or convert; or mini, which comes with the package",
    )
    command.add_argument(
        "--at-once",
        type=int,
        default=8,
        metavar="N",
        help="rows of 1,024 tokens that a copy of the model reads together",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=cores(),
        metavar="N",
        help="processes that read crystals and find their symmetry; 0: none but this",
    )


def add_base(command: argparse.ArgumentParser) -> None:
    """Of the verbs that load a model."""
    command.add_argument(
        "--base",
        type=place,
        metavar="DIR",
        help="of adapters: another base, made of the same float weights, such as `convert --weights int8` writes "
        "(default: the one they were trained on)",
    )


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Of the verbs that draw."""
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of activations and matrix products (default: the model's)"
    )
