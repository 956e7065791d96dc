"""`jaxcrystal infill`: say which elements could stand in the place of one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "infill",
        run,
        "say which elements could stand in the place of one",
        "An element of each crystal is masked, and the model says of every element how probable it is there, exactly, "
        "and not by samples. For a model that was trained to infill (docs/infilling.md).",
        resumes=True,
    )
    command.add_argument(
        "crystals", type=Path, metavar="CRYSTALS", help="any table, CIF, POSCAR, JSON or extxyz file, or folder of them"
    )
    command.add_argument(
        "--model", required=True, type=options.place, metavar="DIR", help="written by train or convert"
    )
    options.add_base(command)
    command.add_argument("--mask", metavar="A", help="the element, all of whose atoms are masked")
    command.add_argument(
        "--site",
        type=int,
        metavar="N",
        help="instead: one atom by its number, from 0 in the order in which the crystal is read; a model that writes "
        "crystals by their symmetry masks its orbit",
    )
    command.add_argument(
        "--allow", type=options.symbols, metavar="A,B", help="elements among which is chosen (default: all)"
    )
    command.add_argument(
        "--similar",
        type=float,
        metavar="X",
        help="only elements whose ionic radius is within X Å of that of the one that was there",
    )
    command.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for elements.parquet and elements.html; or x.csv or x.parquet, beside which is x.html",
    )


def run(args: argparse.Namespace) -> None:
    """Infills, and prints the likeliest elements of the first crystals."""
    from jaxcrystal.interface.infilled import table_of
    from jaxcrystal.interface.infilling import infill

    found = infill(
        args.model,
        args.crystals,
        args.out,
        base=args.base,
        mask=args.mask,
        site=args.site,
        allow=args.allow,
        similar=args.similar,
    )
    print(found)
    table = table_of(args.out)
    print(f"written to {table.parent}: {table.name}, {table.with_suffix('.html').name}")
