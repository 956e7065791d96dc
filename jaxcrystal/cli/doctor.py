"""`jaxcrystal doctor`: check this installation: versions, devices, speed, tokens, potentials."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb("doctor", run, "check this installation: versions, devices, speed, tokens, potentials")
    command.add_argument("--potential", default="chgnet", metavar="P", help="`chgnet` or a matgl directory")


def run(args: argparse.Namespace) -> int:
    """Checks, and prints what it found; 1 if something is wrong."""
    from jaxcrystal.doctor import doctor

    return 0 if doctor(args.potential) else 1
