"""Structure prediction: of crystals predicted for given compositions, how many are the true one, and how closely?

CDVAE's code (arXiv 2110.06197), and all that follow it, let a pair match only if both its crystals are valid, also in
composition. As that leaves out a tenth of MP-20 whatever is predicted, both figures are told: `_if_valid` is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.evaluation.intervals import bootstrap_mean, wilson
from jaxcrystal.workers import Workers, each

#: CDVAE's tolerances: of lengths (fraction), of sites (units of (V/N)^⅓), of angles (degrees).
LENGTH_TOLERANCE, SITE_TOLERANCE, ANGLE_TOLERANCE = 0.3, 0.5, 10.0


def displacements(
    predicted: Sequence[Crystal | None], true: Sequence[Crystal], *, workers: Workers | None = None
) -> tuple[Float[np.ndarray, "pairs"], list[str]]:
    """Root mean square displacement of each prediction from its own true crystal, in units of (V/N)^⅓.

    NaN if they do not match, and then why not. A match is one of pymatgen's StructureMatcher with the tolerances above,
    which reduces to primitive cells and scales volumes to be equal. None is a prediction that is no crystal.
    """
    pairs = list(zip(predicted, true, strict=True))
    found = each(_displacement, pairs, workers, label="matching", lost=lambda pair, why: why.reason)
    values = [np.nan if isinstance(x, str) else x for x in found]
    return np.array(values, dtype=np.float64), [x if isinstance(x, str) else "" for x in found]


def _displacement(pair: tuple[Crystal | None, Crystal]) -> float | str:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    predicted, true = pair
    if predicted is None:
        return "there is no crystal"
    matcher = StructureMatcher(ltol=LENGTH_TOLERANCE, stol=SITE_TOLERANCE, angle_tol=ANGLE_TOLERANCE)
    found = matcher.get_rms_dist(predicted.to_structure(), true.to_structure())
    return "it is another crystal" if found is None else float(found[0])


def prediction(table: pd.DataFrame) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """`prediction.*`: the share of all attempts that match, and the mean displacement of those that do."""
    numbers, intervals = {}, {}
    matched = table["truth_displacement"].notna()
    both_valid = table["structural_valid"] & table["compositional_valid"] & table["truth_valid"]
    for suffix, mask in (("", matched), ("_if_valid", matched & both_valid)):
        numbers[f"prediction.match_rate{suffix}"] = int(mask.sum()) / len(table)
        intervals[f"prediction.match_rate{suffix}"] = wilson(int(mask.sum()), len(table))
        if mask.any():
            found = table["truth_displacement"][mask].to_numpy()
            numbers[f"prediction.rmse{suffix}"] = float(found.mean())
            intervals[f"prediction.rmse{suffix}"] = bootstrap_mean(found)
    return numbers, intervals
