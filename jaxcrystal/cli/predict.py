"""`jaxcrystal predict`: say which crystal a formula has."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "predict",
        run,
        "say which crystal a formula has",
        "Attempts at the crystal of each formula, which the grammar keeps to, in the order of their rank: a row each, "
        "whatever became of it, which `evaluate --truth` reads (docs/prediction.md).",
        resumes=True,
    )
    command.add_argument(
        "formulas",
        nargs="+",
        metavar="FORMULAS",
        help="such as SrTiO3 LiFePO4; or a CSV or parquet file with a column formula, and perhaps material_id and "
        "num_atoms; or mp20-test",
    )
    command.add_argument(
        "--model",
        required=True,
        type=options.place,
        metavar="DIR",
        help="written by train or convert; or mini, which comes with the package",
    )
    command.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="x.parquet or x.csv, beside which is x.drawn.parquet"
    )
    command.add_argument("--attempts", type=int, default=20, metavar="N", help="at the crystal of each formula")
    atoms = command.add_mutually_exclusive_group()
    atoms.add_argument(
        "--num-atoms",
        type=options.atoms,
        metavar="N",
        help="of every cell, as of `sample` (default: the column num_atoms; where there is none, as in training)",
    )
    atoms.add_argument(
        "--no-num-atoms", dest="given_atoms", action="store_false", help="leave the column num_atoms aside"
    )
    command.add_argument("--limit", type=int, metavar="N", help="only the first N rows of the table")
    command.add_argument(
        "--rank-by",
        choices=["log_probability", "energy"],
        default="log_probability",
        help="the likeliest first; or what relaxes to the lowest energy",
    )
    command.add_argument("--potential", metavar="P", help="of --rank-by energy: `chgnet` or a matgl directory")
    command.add_argument("--fmax", type=float, default=0.1, metavar="F", help="relax until forces are below, eV/Å")
    command.add_argument("--max-steps", type=int, default=500, metavar="N", help="of one relaxation")
    command.add_argument("--temperature", type=float, default=0.9, metavar="T", help="below 1: likelier crystals")
    command.add_argument("--top-p", type=float, default=0.9, metavar="P", help="keep the likeliest tokens up to P")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other crystals")
    command.add_argument("--symprec", type=float, default=0.1, metavar="X", help="Å, of space groups")
    options.add_dtype(command)
    command.add_argument(
        "--slots", type=int, metavar="B", help="crystals that a copy draws at once (default: what its memory holds)"
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text (default: what the model holds)")
    command.add_argument(
        "--workers", type=int, default=options.cores(), metavar="N", help="processes that relax; 0: none but this"
    )


def run(args: argparse.Namespace) -> None:
    """Predicts, and prints the first prediction of the first crystals."""
    from jaxcrystal.interface.predicting import predict
    from jaxcrystal.mesh import copies_mesh

    found = predict(
        args.formulas,
        args.model,
        args.out,
        attempts=args.attempts,
        num_atoms=args.num_atoms,
        given_atoms=args.given_atoms,
        limit=args.limit,
        rank_by=args.rank_by,
        potential=args.potential,
        fmax=args.fmax,
        max_steps=args.max_steps,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        symprec=args.symprec,
        slots=args.slots,
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
        workers=args.workers,
        mesh=copies_mesh(1),
    )
    print(found)
    print(f"written to {args.out}; with the true crystals: `jaxcrystal evaluate {args.out} --truth FILE --out DIR`")
