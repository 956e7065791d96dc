"""Structure prediction: of crystals predicted for given compositions, how many are the true one, and how closely?

CDVAE's code (arXiv 2110.06197), and all that follow it, let a pair match only if both its crystals are valid, also in
composition. As that leaves out a tenth of MP-20 whatever is predicted, both figures are given: `_if_valid` is theirs.

Which true crystal a prediction is of is said by the ids of both files. Where neither has ids it is the row. A file with
ids beside one without has no safe pairing: the order of one of them may have been changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.crystals.crystal import Crystal, formula_of, reduced_composition
from jaxcrystal.crystals.formulas import read_formula, spelled
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import bootstrap_mean, wilson
from jaxcrystal.reader.rows import Row, Rows
from jaxcrystal.workers import Workers, each

#: CDVAE's tolerances: of lengths (fraction), of sites (units of (V/N)^⅓), of angles (degrees).
LENGTH_TOLERANCE, SITE_TOLERANCE, ANGLE_TOLERANCE = 0.3, 0.5, 10.0


def paired(predicted: Rows, true: Rows, limit: int | None = None) -> list[int]:
    """For each prediction the position of its true crystal in `true`; several predictions may have the same.

    `limit` is the number of rows to which `predicted` was cut, if it was.

    Raises UserError if a prediction's id has no true crystal or several, if one file has ids and the other has not, if
    neither has and their numbers of rows differ, if a true crystal that is needed cannot be read, or if another formula
    than its own was asked of its prediction.
    """
    if predicted.has_ids != true.has_ids:
        named, numbered = (predicted, true) if predicted.has_ids else (true, predicted)
        raise UserError(
            f"{named.path} has ids and {numbered.path} has none, so it is not certain which true crystal a prediction "
            f"is of. Add the ids to {numbered.path.name} as a column `material_id`; or, if the rows of both are in the "
            f"same order, remove them from {named.path.name}"
        )
    positions = _by_id(predicted, true) if true.has_ids else _by_row(predicted, true, limit)
    for position in sorted(set(positions)):
        if (broken := true.rows[position]).crystal is None:
            raise UserError(f"{true.path}, row {broken.row}: a true crystal cannot be read: {broken.reason}")
    for sample, position in zip(predicted.rows, positions, strict=True):
        wanted, its = _asked(sample), true.rows[position]
        if wanted is not None and formula_of(read_formula(wanted)) != its.crystal.formula:
            raise UserError(
                f"{predicted.path}, row {sample.row}: {wanted} was asked for {sample.id!r}, whose true crystal in "
                f"{true.path} (row {its.row}) is {spelled(its.crystal.formula)}; give the truth of what was asked"
            )
    return positions


def _asked(sample: Row) -> str | None:
    """The formula that a sampler was asked for, as its ledger says; None where it does not."""
    text = sample.labels.get("asked")
    return json.loads(text).get("pretty_formula") if text else None


def _by_id(predicted: Rows, true: Rows) -> list[int]:
    position: dict[str, int] = {}
    for i, sample in enumerate(true.rows):
        if (first := position.setdefault(sample.id, i)) != i:
            raise UserError(
                f"{true.path}: the id {sample.id!r} is in rows {true.rows[first].row} and {sample.row}; each true "
                "crystal needs an id of its own"
            )
    for sample in predicted.rows:
        if sample.id not in position:
            raise UserError(
                f"{predicted.path}, row {sample.row}: {true.path} has no true crystal with the id {sample.id!r}; its "
                f"ids are such as {true.rows[0].id!r}"
            )
    return [position[sample.id] for sample in predicted.rows]


def _by_row(predicted: Rows, true: Rows, limit: int | None) -> list[int]:
    positions = list(range(len(true.rows)))[:limit]
    if len(positions) != len(predicted.rows):
        raise UserError(
            f"{true.path} holds {len(true.rows)} crystals for {len(predicted.rows)} predictions; as neither file "
            "has ids, it must hold the true one of each, in the same order"
        )
    return positions


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
    if reduced_composition(predicted.symbols) != reduced_composition(true.symbols):
        return "it has another composition"
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
