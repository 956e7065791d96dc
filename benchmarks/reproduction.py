"""What was published for DiffCSP's 10,000 crystals against MP-20 test, and what this evaluator finds.

Coverage and distributions depend on which crystals are taken: all, the valid ones, or 1,000 drawn of these. So each is
there, and for the draws also how far they spread, by which a tolerance can be judged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wasserstein_distance

from jaxcrystal.evaluation.coverage import DRAW_SEED, coverage, distribution, drawn, nearest, valid_rows, with_nearest
from jaxcrystal.evaluation.likeness.fingerprints import Fingerprints, fingerprints
from jaxcrystal.evaluation.protocols import PROTOCOLS, coverage_cutoffs
from jaxcrystal.evaluation.table import describe
from jaxcrystal.reader.reading import read
from jaxcrystal.workers import Workers

DRAWS = 200
DRAWN = 1000  #: crystals

PUBLISHED = {
    "validity.structural": 1.0,
    "validity.compositional": 0.8322,
    "coverage.recall": 0.9982,
    "coverage.precision": 0.9684,
    "distribution.density_wasserstein": 0.35,
    "distribution.num_elements_wasserstein": 0.346,
}


def reproduced(generated: Path, reference: Path, workers: Workers | None, draws: int = DRAWS) -> dict[str, Any]:
    """Every published number, of each choice of crystals; of draws their mean, deviation, and 95 % of them."""
    protocol, cutoffs = PROTOCOLS["cdvae"], coverage_cutoffs("mp_20")
    sets = [read(path, workers=workers).rows for path in (generated, reference)]
    table, known = (describe(samples, protocol, symmetry=False, workers=workers) for samples in sets)
    own, others = (fingerprints([sample.crystal for sample in samples], workers=workers) for samples in sets)
    valid = valid_rows(table)

    def numbers(rows: np.ndarray) -> dict[str, Any]:
        chosen = with_nearest(table.iloc[rows].assign(drawn=True), own[rows], others, known["id"], "reference")
        covered = with_nearest(known, others, own[rows], table["id"].iloc[rows].tolist(), "generated")
        published = {}
        for found, intervals in (coverage(chosen, covered, protocol, cutoffs), distribution(chosen, known)):
            published |= {name: {"found": found[name], "95 %": intervals[name]} for name in found if name in PUBLISHED}
        return published

    def within(one: Fingerprints, other: Fingerprints) -> np.ndarray:
        structure, composition = (
            nearest(getattr(one, kind), getattr(other, kind))[0] for kind in ("structure", "composition")
        )
        return (structure <= cutoffs.structure) & (composition <= cutoffs.composition)

    near = within(own, others)

    def of_draw(seed: int) -> dict[str, float]:
        rows = np.random.default_rng(seed).choice(np.flatnonzero(valid), min(DRAWN, valid.sum()), replace=False)
        shares = {"coverage.recall": within(others, own[rows]).mean(), "coverage.precision": near[rows].mean()}
        return shares | {
            f"distribution.{column}_wasserstein": wasserstein_distance(table[column].iloc[rows], known[column])
            for column in ("density", "num_elements")
        }

    spread = [of_draw(seed) for seed in range(draws)]
    return {
        "validity.structural": float(table["structural_valid"].mean()),
        "validity.compositional": float(table["compositional_valid"].mean()),
        "without a fingerprint": int((~own.known).sum()),
        f"all {len(valid)}": numbers(np.arange(len(valid))),
        f"all {valid.sum()} valid": numbers(np.flatnonzero(valid)),
        f"{DRAWN} valid, seed {DRAW_SEED}": numbers(np.flatnonzero(drawn(valid, protocol))),
        f"{DRAWN} valid, {draws} draws": {name: _spread([draw[name] for draw in spread]) for name in spread[0]},
        "load": os.getloadavg()[0],
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    percentiles = [float(p) for p in np.percentile(values, [2.5, 97.5])]
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values)), "95 % of draws": percentiles}
