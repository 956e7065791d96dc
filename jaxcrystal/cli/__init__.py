"""The command line: one file a verb, each a thin call of the function that does the work."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
from collections.abc import Callable, Sequence

from jaxcrystal import __version__
from jaxcrystal.cli import (
    compare,
    convert,
    demo,
    dft_inputs,
    doctor,
    edit,
    evaluate,
    export,
    hull,
    improve,
    infill,
    ipt,
    mutate,
    predict,
    prepare,
    report,
    sample,
    score,
    templates,
    train,
    write,
)
from jaxcrystal.errors import UserError

#: In the order in which `jaxcrystal --help` lists them.
VERBS = (prepare, convert, export, train, sample, predict, edit, infill, mutate, templates, score, ipt)
VERBS += (improve, write, evaluate, report, compare, dft_inputs, hull, doctor, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Exit codes: 0 done, 1 bad input (one line says what), 2 usage, 130 interrupted, 141 nobody reads the output.
    """
    # A terminal or a pipe may have no letter for Å or α, or for the bytes of a file's name: \xc5 is better than an end.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where it may fail, and not as Python ends
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # `| head` has read enough. As Python ends it flushes again: to nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return 141  # as a shell reports a command that SIGPIPE ended


def _run(arguments: Sequence[str] | None) -> int:
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
    except ModuleNotFoundError as error:  # or a package's version that nothing tells: a host that only trains
        if args.debug or not error.name or error.name.partition(".")[0] == "jaxcrystal":
            raise
        remedy = "pip install 'jaxcrystal[evaluate]'"
        print(f"jaxcrystal {args.verb}: {error.name} is not installed; {remedy}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        # Python keeps the bytes of a name that are no text as lone surrogates; many libraries take no such name.
        if args.debug or not any("\ud800" <= letter <= "\udfff" for letter in error.object):
            raise
        name = os.fsencode(error.object)
        print(f"jaxcrystal {args.verb}: the name {name!r} is not UTF-8; rename the file or folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "go on" if args.resumes else "start over"
        print(f"jaxcrystal {args.verb}: interrupted; run the same command again to {again}", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether standard output or standard error is a pipe whose other end is closed."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _Help(argparse.HelpFormatter):
    """Names the default of an option where that says something and its help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is None or isinstance(action.default, bool | list) or "default" in text
        return text if silent or not action.option_strings or action.nargs == 0 else f"{text} (default: %(default)s)"


class _Verbs(argparse.HelpFormatter):
    """Each verb on the line of its summary: argparse forgets that verbs are indented twice."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = max(len(module.__name__.rpartition(".")[2]) for module in VERBS) + 4


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxcrystal",
        formatter_class=_Verbs,
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
            formatter_class=_Help,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run, resumes=resumes)
        return command

    for module in VERBS:
        module.add(verb)
    return parser
