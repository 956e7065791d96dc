"""Structure prediction: of crystals predicted for given compositions, how many are the true one, and how closely?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.evaluate.intervals import bootstrap_mean, wilson
from jaxcrystal.evaluate.workers import Workers, each

#: CDVAE's tolerances (arXiv 2110.06197): of lengths (fraction), of sites (units of (V/N)^⅓), of angles (degrees).
LENGTH_TOLERANCE, SITE_TOLERANCE, ANGLE_TOLERANCE = 0.3, 0.5, 10.0


@dataclass(frozen=True)
class Prediction:
    """How the predictions did, and each of them."""

    match_rate: float  #: over all pairs
    match_rate_95: tuple[float, float]
    rmse: float | None  #: mean over the matches, in units of (V/N)^⅓; None without a match
    rmse_95: tuple[float, float] | None
    displacements: Float[np.ndarray, "pairs"]  #: root mean square of a match, in units of (V/N)^⅓; NaN without one


def compare(
    predicted: Sequence[Crystal | None], true: Sequence[Crystal], *, workers: Workers | None = None
) -> Prediction:
    """Each prediction against its own true crystal; None, as an invalid prediction, does not match.

    A match is one of pymatgen's StructureMatcher with the tolerances above, which reduces to primitive cells and
    scales volumes to be equal.
    """
    pairs = list(zip(predicted, true, strict=True))
    found = each(_displacement, pairs, workers, label="matching", lost=lambda pair, why: np.nan)
    displacements = np.array(found, dtype=np.float64)
    matched = displacements[~np.isnan(displacements)]
    return Prediction(
        match_rate=len(matched) / len(pairs),
        match_rate_95=wilson(len(matched), len(pairs)),
        rmse=float(matched.mean()) if len(matched) else None,
        rmse_95=bootstrap_mean(matched) if len(matched) else None,
        displacements=displacements,
    )


def _displacement(pair: tuple[Crystal | None, Crystal]) -> float:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    predicted, true = pair
    if predicted is None:
        return np.nan
    matcher = StructureMatcher(ltol=LENGTH_TOLERANCE, stol=SITE_TOLERANCE, angle_tol=ANGLE_TOLERANCE)
    found = matcher.get_rms_dist(predicted.to_structure(), true.to_structure())
    return np.nan if found is None else float(found[0])
