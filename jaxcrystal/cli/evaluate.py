"""`jaxcrystal evaluate`: say which crystals would exist."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from jaxcrystal.cli import options


def add(verb: Callable) -> None:
    """Adds the verb with its options."""
    command = verb(
        "evaluate",
        run,
        "say which crystals would exist",
        "SAMPLES is what `sample` wrote, or any table, CIF, POSCAR, JSON or extxyz file, or folder of crystals "
        "(docs/reading.md). Writes structures.parquet (a row an attempt), metrics.json (sums over it), and report.html "
        "to --out.",
        resumes=True,
    )
    command.add_argument("samples", type=Path, metavar="SAMPLES", help="the crystals to judge")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    command.add_argument(
        "--train", metavar="FILE", action="append", help="crystals that count as known: adds novelty; may be repeated"
    )
    command.add_argument(
        "--nearest",
        action="store_true",
        help="the training crystal most like each sample, and novelty by fingerprints where the protocol has it; "
        "minutes for tens of thousands of training crystals, the first time",
    )
    command.add_argument(
        "--truth",
        metavar="FILE",
        help="the crystals that SAMPLES predict, by the ids of both, or in order if neither has ids: adds match rate",
    )
    command.add_argument(
        "--reference", metavar="FILE", help="crystals to compare with: adds coverage and distributions"
    )
    command.add_argument(
        "--unconditional",
        metavar="DIR",
        help="what evaluate wrote of crystals for which nothing was asked: adds how many of these meet what was asked "
        "for SAMPLES",
    )
    command.add_argument(
        "--scores",
        metavar="FILE",
        help="what score wrote of SAMPLES: adds how probable the model found each (a ledger has that anyway)",
    )
    command.add_argument(
        "--protocol",
        default="cdvae",
        metavar="P",
        help="cdvae, crystal-text-llm, strict or lemat; with +smact-icsd24, by smact's newer oxidation states",
    )
    command.add_argument(
        "--cutoffs",
        default="mp_20",
        metavar="SET",
        help="the data set whose cut-offs coverage takes: mp_20, perov_5 or carbon_24",
    )
    command.add_argument("--potential", metavar="P", help="`chgnet` or a matgl directory: adds relaxation")
    command.add_argument(
        "--hull",
        nargs="+",
        default=[],
        metavar="FILE",
        help="competing phases: adds the distance to their hull. What `hull build` wrote; crystals, which the "
        "potential labels; or, with --references, a table with formula and formation_energy_per_atom (eV/atom)",
    )
    command.add_argument("--references", metavar="FILE", help="elemental reference entries, as Materials Project's")
    options.add_labels(command, "--hull-labels")
    command.add_argument("--fmax", type=float, default=0.1, metavar="F", help="relax until forces are below, eV/Å")
    command.add_argument("--max-steps", type=int, default=500, metavar="N", help="of one relaxation")
    command.add_argument("--symprec", type=float, default=0.1, metavar="X", help="Å, of space groups (0.1)")
    command.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="of a property of one's own: a Python function from a pymatgen Structure; MODULE may be FILE.py",
    )
    command.add_argument("--limit", type=int, metavar="N", help="only the first N attempts")
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=int, default=options.cores(), metavar="N", help="processes on this machine; 0: none but this"
    )
    where.add_argument("--dask", metavar="ADDRESS", help="a cluster's scheduler instead, such as tcp://10.0.0.1:8786")


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints the rates."""
    import jaxcrystal
    from jaxcrystal.evaluation.own_judges import load

    found = jaxcrystal.evaluate(
        args.samples,
        args.out,
        train=args.train,
        nearest=args.nearest,
        truth=args.truth,
        reference=args.reference,
        unconditional=args.unconditional,
        scores=args.scores,
        protocol=args.protocol,
        cutoffs=args.cutoffs,
        potential=args.potential,
        hull=args.hull,
        references=args.references,
        hull_labels=args.hull_labels,
        fmax=args.fmax,
        max_steps=args.max_steps,
        symprec=args.symprec,
        judges=dict(map(load, args.judge)),
        limit=args.limit,
        workers=args.dask or args.workers,
    )
    print(found)
    if not {"novelty", "stability", "coverage", "prediction"} & found.metrics.keys():
        print("--train mp20 says what is new, --potential chgnet --hull mp what is stable")
    print(f"written to {found.out}: structures.parquet, metrics.json, report.html")
