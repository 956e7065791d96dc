"""`jaxcrystal dft-inputs`: write inputs of DFT calculations for crystals that an evaluation found."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "dft-inputs",
        run,
        "write inputs of DFT calculations for crystals that an evaluation found",
        "EVALUATION is a folder that `evaluate` wrote. Each crystal, as it relaxed or else as sampled, becomes a "
        "folder of --out; index.csv says which is which. VASP's inputs are pymatgen's MPRelaxSet, with POTCAR.spec in "
        "place of the licensed POTCAR (docs/dft.md).",
    )
    command.add_argument("evaluation", type=Path, metavar="EVALUATION", help="the folder of the evaluation")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--best", type=int, default=100, metavar="N", help="the new crystals nearest to the hull, none twice"
    )
    which.add_argument(
        "--rows", type=options.rows, metavar="ROWS", help="these rows of structures.parquet, such as 3,17 or 4-6"
    )
    command.add_argument(
        "--code", choices=["vasp", "quantum-espresso"], default="vasp", help="the program that will calculate"
    )
    command.add_argument(
        "--pseudopotentials",
        type=Path,
        metavar="FILE",
        help="for Quantum ESPRESSO: SSSP's JSON file, or one like it, of pseudopotentials and cut-offs",
    )


def run(args: argparse.Namespace) -> None:
    """Writes them, and prints how many, and what their energies are not."""
    from jaxcrystal.interface.dft import NOT_COMPARABLE
    from jaxcrystal.interface.evaluation import Evaluation

    evaluation = Evaluation.read(args.evaluation)
    index = evaluation.dft_inputs(
        args.out, rows=args.rows, best=args.best, code=args.code, pseudopotentials=args.pseudopotentials
    )
    relaxed = int((index["structure"] == "relaxed").sum())
    counted = "1 crystal" if len(index) == 1 else f"{len(index)} crystals"
    print(f"{counted} in {args.out}, {relaxed} as they relaxed; {args.out / 'index.csv'} lists them")
    if args.code == "quantum-espresso":
        print(f"Quantum ESPRESSO with these settings: {NOT_COMPARABLE}")
    else:
        print(f"`pmg potcar --recursive {args.out}` makes each POTCAR of its POTCAR.spec")
