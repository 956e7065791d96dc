"""How alike are what was generated and what is known? Coverage, distributions, diversity and novelty.

Coverage (Xie et al., arXiv 2110.06197, section 5.2): recall is the share of reference crystals that have a generated
one near them, precision the share of generated ones that have a reference crystal near. Near is within two cut-offs at
once, one of the structure's fingerprint and one of the composition's, each to its own nearest. AMSD and AMCD are the
means of these nearest distances. Diversity is the mean distance of two generated crystals.

Everything that needs pairs of crystals becomes a column of one of two tables, a row an attempt or a row a reference
crystal. What is reported is then a sum over rows, as all else is. A number has its protocol's denominator. Where that
leaves out what failed, the number is counted over all rows too, as `_of_all`, and a failed crystal counts as one that
is near nothing and not new. A distribution, of valid crystals by all protocols, is there of all crystals too. An
interval is for the side that is counted; the other is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from jaxcrystal.evaluation.intervals import bootstrap_mean, bootstrap_wasserstein, wilson
from jaxcrystal.evaluation.likeness.fingerprints import Fingerprints
from jaxcrystal.evaluation.protocols import COVERAGE_CUTOFFS, Cutoffs, Protocol

DRAW_SEED = 0  #: of the crystals that a protocol draws
BLOCK = 1024  #: rows of a matrix of distances that are there at once
#: Distances of structures and of compositions that weigh the same: the cut-offs between which MP-20's coverage counts.
SAME_LIKENESS = COVERAGE_CUTOFFS["mp_20"]


def nearest(
    points: Float[np.ndarray, "n d"], others: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Distance to the nearest of `others`, and its row. Points with NaN have NaN and -1, and are nobody's nearest."""
    distance, index = np.full(len(points), np.nan), np.full(len(points), -1)
    candidates = np.flatnonzero(~np.isnan(others).any(axis=1))
    rows = np.flatnonzero(~np.isnan(points).any(axis=1))
    if len(candidates):
        known = others[candidates]
        squares = (known**2).sum(1)
        for block in _blocks(rows):
            # |a - b|² = |a|² + |b|² - 2ab is one product of matrices, but loses digits: it only says who is nearest.
            index[block] = candidates[np.argmin(squares - 2 * points[block] @ known.T, axis=1)]
        distance[rows] = np.linalg.norm(points[rows] - others[index[rows]], axis=1)
    return distance, index


def mean_distances(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
    """The mean distance of each point to all others; the mean over them is that over all pairs. NaN for one point."""
    totals = [cdist(points[block], points).sum(1) for block in _blocks(np.arange(len(points)))]
    return np.concatenate(totals) / (len(points) - 1) if len(points) > 1 else np.full(len(points), np.nan)


def _blocks(rows: Int[np.ndarray, "n"]) -> Iterator[Int[np.ndarray, "block"]]:
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]


def drawn(valid: Bool[np.ndarray, "n"], protocol: Protocol) -> Bool[np.ndarray, "n"]:
    """The valid crystals that stand for all in distributions and diversity: all, or as many as the protocol draws."""
    rows = np.flatnonzero(valid)
    if protocol.draw is not None and len(rows) > protocol.draw:
        rows = np.random.default_rng(DRAW_SEED).choice(rows, protocol.draw, replace=False)
    return np.isin(np.arange(len(valid)), rows)


def only_valid(found: Fingerprints, table: pd.DataFrame) -> Fingerprints:
    """Without the fingerprints of crystals that `table` calls invalid."""
    valid = valid_rows(table)
    reasons = [why if ok or why else "it is invalid" for why, ok in zip(found.reasons, valid, strict=True)]
    structure = np.where(valid[:, None], found.structure, np.nan)
    return Fingerprints(structure, np.where(valid[:, None], found.composition, np.nan), tuple(reasons))


def valid_rows(table: pd.DataFrame) -> Bool[np.ndarray, "n"]:
    """Structurally and compositionally."""
    return (table["structural_valid"] & table["compositional_valid"]).to_numpy()


def with_diversity(table: pd.DataFrame, own: Fingerprints, protocol: Protocol) -> pd.DataFrame:
    """Adds why an attempt has no fingerprint, whether it was drawn, and its mean distances to the others drawn."""
    chosen = drawn(valid_rows(table) & own.known, protocol)
    spread = np.full((2, len(table)), np.nan)
    spread[0, chosen] = mean_distances(own.structure[chosen])
    spread[1, chosen] = mean_distances(own.composition[chosen])
    return table.assign(
        no_fingerprint_because=own.reasons,
        drawn=chosen,
        mean_structure_distance=spread[0],
        mean_composition_distance=spread[1],
    )


def with_nearest(
    table: pd.DataFrame, own: Fingerprints, others: Fingerprints, names: Sequence[str], prefix: str
) -> pd.DataFrame:
    """Adds `{prefix}_structure_distance` and `{prefix}_composition_distance`, each to its own nearest of `others`.

    And `{prefix}_nearest`, the name (of `names`) of the one crystal that is most like it in both: the nearest of all
    features together, those of structures in units of SAME_LIKENESS's structure, those of compositions of its
    composition. None without fingerprints. It is there to be shown; no number depends on it.
    """
    own, others = _whole(own), _whole(others)
    names, index = list(names), nearest(_both(own), _both(others))[1]
    return table.assign(
        **{
            f"{prefix}_structure_distance": nearest(own.structure, others.structure)[0],
            f"{prefix}_composition_distance": nearest(own.composition, others.composition)[0],
            f"{prefix}_nearest": [None if i < 0 else names[i] for i in index],
        }
    )


def _both(fingerprints: Fingerprints) -> Float[np.ndarray, "n 193"]:
    parts = (fingerprints.structure / SAME_LIKENESS.structure, fingerprints.composition / SAME_LIKENESS.composition)
    return np.concatenate(parts, axis=1)


def _whole(fingerprints: Fingerprints) -> Fingerprints:
    """A crystal without a structure's fingerprint has none of its composition either."""
    composition = np.where(fingerprints.known[:, None], fingerprints.composition, np.nan)
    return Fingerprints(fingerprints.structure, composition, fingerprints.reasons)


Numbers = dict[str, float]
Intervals = dict[str, tuple[float, float]]


def coverage(
    table: pd.DataFrame, reference: pd.DataFrame, protocol: Protocol, cutoffs: Cutoffs
) -> tuple[Numbers, Intervals]:
    """`coverage.*` of the attempts against reference crystals, of which each has its nearest distances to the other."""
    numbers: Numbers = {}
    intervals: Intervals = {}
    sides = (
        ("recall", reference, "generated"),
        ("precision", table, "reference"),
    )
    for side, rows, prefix in sides:
        structure, composition = (rows[f"{prefix}_{kind}_distance"] for kind in ("structure", "composition"))
        near = (structure <= cutoffs.structure) & (composition <= cutoffs.composition)
        _rates(f"coverage.{side}", near, structure.notna(), protocol, numbers, intervals)
        for name, distances in (("amsd", structure), ("amcd", composition)):
            values = distances.dropna().to_numpy()
            if len(values):
                numbers[f"coverage.{name}_{side}"] = float(values.mean())
                intervals[f"coverage.{name}_{side}"] = bootstrap_mean(values)
    return numbers, intervals


def distribution(table: pd.DataFrame, reference: pd.DataFrame) -> tuple[Numbers, Intervals]:
    """Wasserstein distances from the reference, of the drawn crystals, and of all that are crystals (`_of_all`).

    Of the density in g/cm³, and of the number of elements.
    """
    numbers, intervals = {}, {}
    for suffix, rows in (("", table[table["drawn"]]), ("_of_all", table)):
        for column in ("density", "num_elements"):
            values, others = (t[column].dropna().to_numpy(np.float64) for t in (rows, reference))
            if len(values) and len(others):
                name = f"distribution.{column}_wasserstein{suffix}"
                numbers[name] = float(wasserstein_distance(values, others))
                intervals[name] = bootstrap_wasserstein(values, others)
    return numbers, intervals


def diversity(table: pd.DataFrame) -> tuple[Numbers, Intervals]:
    """The mean distance of two drawn crystals.

    A mean over pairs varies twice as much as the mean over crystals of their mean distances, to first order in 1/n
    (Hoeffding, Ann. Math. Stat. 19, 293, 1948), so the interval is twice as wide as that mean's.
    """
    numbers, intervals = {}, {}
    for name, column in (("structural", "mean_structure_distance"), ("compositional", "mean_composition_distance")):
        values = table[column].dropna().to_numpy()
        if len(values):
            mean = numbers[f"diversity.{name}"] = float(values.mean())
            low, high = bootstrap_mean(values)
            intervals[f"diversity.{name}"] = (mean - 2 * (mean - low), mean + 2 * (high - mean))
    return numbers, intervals


def novelty(table: pd.DataFrame, protocol: Protocol, cutoffs: Cutoffs) -> tuple[Numbers, Intervals]:
    """The share of crystals whose nearest training structure, composition, or either, is far."""
    numbers: Numbers = {}
    intervals: Intervals = {}
    structure, composition = table["train_structure_distance"], table["train_composition_distance"]
    far = {"structural": structure > cutoffs.structure, "compositional": composition > cutoffs.composition}
    for name, mask in (far | {"either": far["structural"] | far["compositional"]}).items():
        _rates(f"novelty.{name}", mask, structure.notna(), protocol, numbers, intervals)
    return numbers, intervals


def _rates(
    name: str, mask: pd.Series, known: pd.Series, protocol: Protocol, numbers: Numbers, intervals: Intervals
) -> None:
    """The rate of `mask` among all rows; if the protocol leaves out failures, among known ones, and as `_of_all`."""
    left_out = {name: int(known.sum()), f"{name}_of_all": len(mask)}
    for key, trials in (left_out if protocol.leaves_out_failures else {name: len(mask)}).items():
        if trials:
            numbers[key] = int(mask.sum()) / trials
            intervals[key] = wilson(int(mask.sum()), trials)
