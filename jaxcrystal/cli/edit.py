"""`jaxcrystal edit`: keep parts of a crystal, and have a model write the rest anew."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "edit",
        run,
        "keep parts of a crystal, and write the rest anew",
        "The model writes --num crystals in which the kept part is the given crystal's own, to its last digit. Every "
        "attempt becomes a row of --out, as of sample; a run that was stopped goes on when it is started again.",
        resumes=True,
    )
    command.add_argument("source", metavar="CRYSTAL", help="file that holds one crystal, whatever the reader reads")
    command.add_argument(
        "--model",
        required=True,
        type=options.place,
        metavar="DIR",
        help="written by train or convert; or mini, which comes with the package",
    )
    options.add_base(command)
    command.add_argument("--num", required=True, type=int, metavar="N", help="attempts")
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="x.parquet, x.csv, or a folder for CIFs"
    )
    kept = command.add_argument_group("what is kept")
    kept.add_argument(
        "--keep-sites",
        type=options.numbers,
        default=(),
        metavar="I,J",
        help="atoms by their place in CRYSTAL, from 0: 0,2 or 4-6; by symmetry with their orbits and the space group",
    )
    kept.add_argument("--keep-elements", action="store_true", help="all of them, and no others")
    kept.add_argument("--keep-composition", action="store_true", help="the formula, and the number of atoms")
    kept.add_argument("--keep-cell", action="store_true", help="lengths and angles")
    kept.add_argument(
        "--keep-group", action="store_true", help="the space group; for models that write crystals by their symmetry"
    )
    limits = command.add_argument_group("constraints, which the grammar keeps; the prompt does not state them")
    limits.add_argument(
        "--num-atoms",
        type=options.atoms,
        metavar="N",
        help="of the new cell, the kept ones included: 8, or from 4 to 12 as 4-12, or any (default: where sites or "
        "the cell are kept, as many as CRYSTAL has)",
    )
    limits.add_argument("--allow", type=options.symbols, metavar="A,B", help="elements; all others are forbidden")
    limits.add_argument("--forbid", type=options.symbols, metavar="A,B", help="elements")
    command.add_argument(
        "--resample",
        type=int,
        metavar="M",
        help="draw M of the attempts again by the grammar's weights, as the model alone draws around what is kept; "
        "needs --temperature 1 --top-p 1",
    )
    command.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="press the kept composition, elements or group, which the prompt states: as of `sample`",
    )
    command.add_argument("--temperature", type=float, default=0.9, metavar="T", help="below 1: likelier crystals")
    command.add_argument("--top-p", type=float, default=0.9, metavar="P", help="keep the likeliest tokens up to P")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other crystals")
    command.add_argument(
        "--symprec", type=float, default=0.1, metavar="X", help="Å, within which CRYSTAL and what comes are symmetric"
    )
    options.add_dtype(command)
    command.add_argument(
        "--slots", type=int, metavar="B", help="crystals that a copy draws at once (default: what its memory holds)"
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text (default: what the model holds)")


def run(args: argparse.Namespace) -> None:
    """Edits, and prints how the attempts ended."""
    from jaxcrystal.interface.editing import edit
    from jaxcrystal.mesh import copies_mesh
    from jaxcrystal.texts.constraints import Constraints

    report = edit(
        args.model,
        args.source,
        args.num,
        args.out,
        sites=args.keep_sites,
        elements=args.keep_elements,
        composition=args.keep_composition,
        cell=args.keep_cell,
        group=args.keep_group,
        num_atoms=args.num_atoms,
        constraints=Constraints(allowed=args.allow and tuple(args.allow), forbidden=tuple(args.forbid or ())),
        base=args.base,
        resample=args.resample,
        guidance=args.guidance,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        symprec=args.symprec,
        slots=args.slots,
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
        mesh=copies_mesh(1),
    )
    shares = ", ".join(f"{count} {status}" for status, count in report.counts.items())
    print(f"{report.attempts} attempts in {report.out}: {shares}; judge them with `jaxcrystal evaluate {report.out}`")
    if report.effective_number is not None:
        print(
            f"column `resampled`: {args.resample} of the attempts, by weights under which the {report.attempts} amount "
            f"to {report.effective_number:.1f} independent draws"
        )
