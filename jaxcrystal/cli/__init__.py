"""The command line: one file a verb, each a thin call of the function that does the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from jaxcrystal import __version__
from jaxcrystal.cli import compare, convert, demo, doctor, evaluate, export, hull, prepare, sample, train
from jaxcrystal.errors import UserError

#: In the order in which `jaxcrystal --help` lists them.
VERBS = (prepare, convert, export, train, sample, evaluate, compare, hull, doctor, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 bad input (one line says what), 2 usage, 130 interrupted."""
    args = _parser().parse_args(arguments)
    # XLA's own chatter is no message of ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return args.run(args) or 0
    except UserError as error:
        if args.debug:
            raise
        print(f"jaxcrystal {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "go on" if args.resumes else "start over"
        print(f"jaxcrystal {args.verb}: interrupted; run the same command again to {again}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxcrystal",
        description="Designs crystals with language models: prepare data, train, sample, evaluate.",
        epilog="Start with `jaxcrystal demo`; `jaxcrystal VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"jaxcrystal {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, run: Callable, summary: str, detail: str = "", *, resumes: bool = False
    ) -> argparse.ArgumentParser:
        """`resumes`: the same command, typed again, goes on where the interrupted one stood."""
        command = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, resumes=resumes)
        return command

    for module in VERBS:
        module.add(verb)
    return parser
