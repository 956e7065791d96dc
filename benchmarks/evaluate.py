"""Fingerprints per second and core, ours against matminer's; and the published figures of DiffCSP's crystals.

    python benchmarks/evaluate.py             on DiffCSP's crystals and MP-20 test beside the checkout
    python benchmarks/evaluate.py --quick     seconds, a check that it runs; its figures mean nothing

It is asserted first that both sides give each crystal the same fingerprint, within 1e-6. Then they take turns, each in
one process with one thread, and seconds of CPU are told, since other processes may share the cores. The reference is
timed a second time as a second evaluation meets it: read from where the first stored it.
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
from pathlib import Path
from typing import Any

import featurizer
import machine
import numpy as np

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.evaluate.coverage import DRAW_SEED, coverage, distribution, drawn, valid_rows, with_nearest
from jaxcrystal.evaluate.fingerprints import Fingerprints, fingerprints, stored_fingerprints
from jaxcrystal.evaluate.protocols import PROTOCOLS, coverage_cutoffs
from jaxcrystal.evaluate.samples import read
from jaxcrystal.evaluate.table import describe
from jaxcrystal.evaluate.workers import Workers, local

DATA = Path(__file__).parents[1].parent / "shared/data"
GENERATED, REFERENCE = DATA / "generated/diffcsp_mp20.parquet", DATA / "mp20/test.parquet"
TOLERANCE = 1e-6
DRAWS = 20  #: of 1,000 valid crystals, to show what chance does to a figure

#: What was published for these 10,000 crystals against MP-20 test.
PUBLISHED = {
    "coverage_recall": 0.9982,
    "coverage_precision": 0.9684,
    "density_wasserstein": 0.35,
    "num_elements_wasserstein": 0.346,
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=150, help="compared and timed, of each kind (150)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is timed (3)")
    parser.add_argument("--workers", type=int, default=machine.cores(), help="processes for the published figures")
    parser.add_argument("--quick", action="store_true", help="a minimal size, without the published figures")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.crystals, options.rounds = 4, 1
    measured = machine.facts(uses_accelerator=False)
    peer_name, peer = featurizer.featurizer()

    kinds = {name: some(path, options.crystals) for name, path in (("generated", GENERATED), ("reference", REFERENCE))}
    timed = {name: compare(crystals, peer, options.rounds) for name, crystals in kinds.items()}
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
        "data": {"generated": GENERATED.name, "reference": REFERENCE.name} if DATA.exists() else "prototypes",
        "quick": options.quick,
        "measured": measured,
    }
    if not options.quick and DATA.exists():
        result["published"] = PUBLISHED
        with local(options.workers) as workers:
            result["reproduced"] = reproduced(workers)
    path = machine.write("evaluate", result, options.out)
    print(
        f"{measured['machine']}\n{2 * options.crystals} crystals, fingerprints within {result['worst_difference']:.1e}"
    )
    for name in ("ratio_generated", "ratio_reference", "ratio_reference_stored"):
        print(f"  {name:25} {result[name]:10,.1f} times {peer_name}")
    for name, value in result.get("reproduced", {}).items():
        print(f"  {name:60} {value}")
    print(f"written to {path}")
    return result


def some(path: Path, count: int) -> list[Crystal]:
    """Crystals from all over a file; without the data beside the checkout, embedded ones."""
    crystals = [s.crystal for s in read(path).samples] if path.exists() else [e.crystal for e in embedded()]
    if count < 10:
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


def reproduced(workers: Workers) -> dict[str, Any]:
    """Coverage and distributions of DiffCSP's crystals, by protocol and by what was drawn."""
    tables, found = [], []
    for path in (GENERATED, REFERENCE):
        samples = read(path, workers=workers).samples
        tables.append(describe(samples, PROTOCOLS["cdvae"], symmetry=False, workers=workers))
        found.append(fingerprints([sample.crystal for sample in samples], workers=workers))
    valid, cutoffs = valid_rows(tables[0]), coverage_cutoffs("mp_20")
    everything, sound = np.arange(len(valid)), np.flatnonzero(valid)

    def numbers(rows: np.ndarray) -> dict[str, float]:
        own: Fingerprints = found[0][rows]
        table = with_nearest(tables[0].iloc[rows].assign(drawn=True), own, found[1], "reference")
        reference = with_nearest(tables[1], found[1], own, "generated")
        return coverage(table, reference, PROTOCOLS["cdvae"], cutoffs)[0] | distribution(table, tables[1])

    draws = [np.random.default_rng(seed).choice(sound, 1000, replace=False) for seed in range(DRAWS)]
    by_draw = [numbers(rows) for rows in draws]
    chosen = numbers(np.flatnonzero(drawn(valid, PROTOCOLS["cdvae"])))
    result = {f"{name}, all {len(valid)}": value for name, value in numbers(everything).items()}
    result |= {f"{name}, all {valid.sum()} valid": value for name, value in numbers(sound).items()}
    result |= {f"{name}, 1000 valid, seed {DRAW_SEED}": value for name, value in chosen.items()}
    for name in chosen:
        values = [draw[name] for draw in by_draw]
        result[f"{name}, 1000 valid, mean and deviation of {DRAWS} draws"] = [
            float(np.mean(values)),
            float(np.std(values)),
        ]
    return result


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
