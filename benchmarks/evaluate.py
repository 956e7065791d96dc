"""Fingerprints per second and core, ours against matminer's; matching a whole set; DiffCSP's published figures.

    python benchmarks/evaluate.py             on DiffCSP's crystals and MP-20 test beside the checkout
    python benchmarks/evaluate.py --quick     seconds, a check that it runs; its figures mean nothing

It is asserted first that both sides give each crystal the same fingerprint, within 1e-6. Then they take turns, each in
one process with one thread, and seconds of CPU are told, since other processes may share the cores. The reference is
timed a second time as a second evaluation meets it: read from where the first stored it. Matching has no peer but
pymatgen's matcher, which it calls for each pair of equal composition: it is timed on the whole sets, from crystals to
which are unique and which are new, by matching and by fingerprints.
"""

from __future__ import annotations

import os

os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")})

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import featurizer
import machine
import numpy as np
import reproduction

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.evaluation.coverage import nearest
from jaxcrystal.evaluation.likeness.fingerprints import fingerprints, stored_fingerprints
from jaxcrystal.evaluation.likeness.uniqueness import group_ids, matches
from jaxcrystal.reader.reading import read
from jaxcrystal.workers import Workers, local

DATA = Path(__file__).parents[1].parent / "shared/data"
GENERATED, REFERENCE = DATA / "generated/diffcsp_mp20.parquet", DATA / "mp20/test.parquet"
KNOWN = DATA / "mp20/train.parquet"
TOLERANCE = 1e-6


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=150, help="compared and timed, of each kind (150)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is timed (3)")
    parser.add_argument("--workers", type=int, default=machine.cores(), help="processes for whole sets")
    parser.add_argument("--quick", action="store_true", help="a minimal size, without the published figures")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.crystals, options.rounds = 4, 1
    measured = machine.facts(uses_accelerator=False)
    peer_name, peer = featurizer.featurizer()

    kinds = {name: some(path, options.crystals) for name, path in (("generated", GENERATED), ("reference", REFERENCE))}
    timed = {name: compare(crystals, peer, options.rounds) for name, crystals in kinds.items()}
    whole = [some(path, options.crystals if options.quick else None) for path in (GENERATED, KNOWN)]
    published = DATA.exists() and not options.quick
    with nullcontext() if options.quick else local(options.workers) as workers:
        matching = match(*whole, workers)
        reproduced = reproduction.reproduced(GENERATED, REFERENCE, workers) if published else {}
    result = {
        "benchmark": "evaluate",
        "claim": "crystals/s and core whose structure is fingerprinted / by matminer's loop over crystals and atoms",
        "peer": peer_name,
        "ratio_generated": timed["generated"]["ratio"],
        "ratio_reference": timed["reference"]["ratio"],
        "ratio_reference_stored": timed["reference"]["ratio_stored"],
        "worst_difference": max(found["worst_difference"] for found in timed.values()),
        "tolerance": TOLERANCE,
        **timed,
        "matching": matching,
        "data": [path.name for path in (GENERATED, REFERENCE, KNOWN)] if DATA.exists() else "prototypes",
        "quick": options.quick,
        "measured": measured,
    }
    if published:
        result |= {"published": reproduction.PUBLISHED, "reproduced": reproduced}
    path = machine.write("evaluate", result, options.out)
    print(
        f"{measured['machine']}\n{2 * options.crystals} crystals, fingerprints within {result['worst_difference']:.1e}"
    )
    for name in ("ratio_generated", "ratio_reference", "ratio_reference_stored"):
        print(f"  {name:25} {result[name]:10,.1f} times {peer_name}")
    print(f"  {matching['generated']} matched with {matching['known']} in {matching['total_seconds']:.0f} s")
    for name, value in reproduced.items():
        for line in value.items() if isinstance(value, dict) else [("", value)]:
            print("  ", name, *line)
    print(f"written to {path}")
    return result


def some(path: Path, count: int | None) -> list[Crystal]:
    """Crystals from all over a file, or all of them; without the data beside the checkout, embedded ones."""
    few = count is not None and count < 10
    limit = 200 if few else None
    crystals = [s.crystal for s in read(path, limit=limit).rows] if path.exists() else [e.crystal for e in embedded()]
    if count is None:
        return crystals
    if few:
        crystals = [crystal for crystal in crystals if len(crystal) < 8]
    return crystals[:: len(crystals) // count][:count]


def compare(crystals: Sequence[Crystal], peer: featurizer.Featurizer, rounds: int) -> dict[str, Any]:
    """Asserts that both sides agree; then seconds of CPU that each needs for all crystals."""
    theirs = np.array([peer(crystal.to_structure()) for crystal in crystals])
    ours = fingerprints(crystals)
    worst = float(np.abs(ours.structure - theirs).max())
    assert worst <= TOLERANCE, f"fingerprints differ by {worst}"
    with tempfile.TemporaryDirectory() as folder:
        stored_fingerprints(crystals, Path(folder))
        sides: dict[str, Callable[[], Any]] = {
            "ours": lambda: fingerprints(crystals),
            "stored": lambda: stored_fingerprints(crystals, Path(folder)),
            "peer": lambda: [peer(crystal.to_structure()) for crystal in crystals],
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "crystals": len(crystals),
        "atoms": sum(map(len, crystals)),
        "worst_difference": worst,
        "ratio": middle["peer"] / middle["ours"],
        "ratio_stored": middle["peer"] / middle["stored"],
        "cpu_seconds": seconds,
    }


def match(generated: Sequence[Crystal], known: Sequence[Crystal], workers: Workers | None) -> dict[str, Any]:
    """Seconds on the clock of each step; matching runs in this process, fingerprints by `workers`."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        steps: dict[str, Callable[[], Any]] = {
            "unique, by matching": lambda: group_ids(generated),
            "novel, by matching": lambda: matches(generated, known),
            "fingerprints of the generated": lambda: fingerprints(generated, workers=workers),
            "fingerprints of the known": lambda: stored_fingerprints(known, Path(folder), workers=workers),
            "the same, stored": lambda: stored_fingerprints(known, Path(folder), workers=workers),
            "novel, by fingerprints": lambda: [
                nearest(getattr(found["fingerprints of the generated"], kind), getattr(found["the same, stored"], kind))
                for kind in ("structure", "composition")
            ],
        }
        seconds = {}
        for name, run in steps.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name] = time.perf_counter() - start
    return {
        "generated": len(generated),
        "known": len(known),
        "unique": len(set(found["unique, by matching"])),
        "found among the known": sum(i is not None for i in found["novel, by matching"]),
        "processes": workers.slots if workers else 1,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
