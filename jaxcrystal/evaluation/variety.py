"""What LeMat-GenBench counts of a set (arXiv 2512.04562, and its code): over valid crystals, which it keeps alone.

Variety is the effective number of kinds, the exponential of their Shannon entropy (a Vendi score without likenesses):
of elements, atom by atom; of space groups; of numbers of atoms. Of sizes it is the entropy of density (bins of
0.5 g/cm³), of a, b and c (0.5 Å) and of packing (0.05), their mean over log₂ of the number of crystals. Supply is the
mean of the crystals' Herfindahl-Hirschman indices; together a quarter production's and three quarters reserves'.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.evaluation.coverage import Intervals, Numbers, valid_rows
from jaxcrystal.evaluation.intervals import bootstrap_mean, bootstrap_totals, wilson
from jaxcrystal.hull.phases import parsed

SPACE_GROUPS = 230
BINS = {"density": 0.5, "a": 0.5, "b": 0.5, "c": 0.5, "packing": 0.05}  #: width of a bin, by column
PRODUCTION, RESERVE = 0.25, 0.75  #: weights of the two indices together


def lemat(table: pd.DataFrame) -> tuple[Numbers, Intervals]:
    """The numbers of a table of attempts that `lemat.py` judged; none of a set without a valid crystal."""
    valid = table[valid_rows(table)]
    if valid.empty:
        return {}, {}
    numbers, intervals = _alone(valid)
    elements, groups = _atoms(valid), _kinds(valid["spacegroup_lemat"])
    numbers["diversity.element_coverage"] = int(elements.any(axis=0).sum()) / (len(ELEMENTS) - 1)
    numbers["diversity.space_group_coverage"] = groups.shape[1] / SPACE_GROUPS
    for name, counts in (("element", elements), ("space_group", groups), ("num_atoms", _kinds(valid["num_atoms"]))):
        numbers[f"diversity.{name}_vendi"] = effective_number(counts.sum(axis=0))
        intervals[f"diversity.{name}_vendi"] = bootstrap_totals(counts, effective_number)
    if len(valid) > 1:
        sizes = [_kinds(valid[name] // width) for name, width in BINS.items()]
        ends, scale = np.cumsum([counts.shape[1] for counts in sizes])[:-1], len(sizes) * np.log2(len(valid))

        def mean_entropy(totals: Float[np.ndarray, "kinds"]) -> float:
            return sum(map(entropy, np.split(totals, ends))) / scale

        together = np.hstack(sizes)
        numbers["diversity.size_entropy"] = mean_entropy(together.sum(axis=0))
        intervals["diversity.size_entropy"] = bootstrap_totals(together, mean_entropy)
    production, reserve = (valid[f"hhi_{name}"].to_numpy(np.float64) for name in ("production", "reserve"))
    both = PRODUCTION * production + RESERVE * reserve
    for name, values in (("production", production), ("reserve", reserve), ("combined", both)):
        numbers[f"hhi.{name}"], intervals[f"hhi.{name}"] = float(values.mean()), bootstrap_mean(values)
    return numbers, intervals


def _alone(valid: pd.DataFrame) -> tuple[Numbers, Intervals]:
    """Uniqueness and novelty among valid crystals; of the relaxed ones where there are any."""
    relaxed = "_relaxed" if "group_relaxed" in valid else ""
    group = valid[f"group{relaxed}"]
    masks = {"uniqueness.rate_of_valid": group.notna() & ~group.duplicated()}
    if "novel" in valid:
        masks["novelty.by_matching_of_valid"] = valid[f"novel{relaxed}"]
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    return (
        {name: count / len(valid) for name, count in counts.items()},
        {name: wilson(count, len(valid)) for name, count in counts.items()},
    )


def entropy(totals: Float[np.ndarray, "kinds"]) -> float:
    """Shannon's, -Σ p ln p, of how often each kind occurs; 0 of nothing."""
    shares = totals[totals > 0] / max(totals.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def effective_number(totals: Float[np.ndarray, "kinds"]) -> float:
    """Of kinds: so many that occur equally often have the same entropy."""
    return float(np.exp(entropy(totals)))


def _kinds(column: pd.Series) -> Float[np.ndarray, "n kinds"]:
    """A 1 a row, in the column of its value; none where it is not known."""
    return pd.get_dummies(column).to_numpy(np.float64)


def _atoms(valid: pd.DataFrame) -> Float[np.ndarray, "n elements"]:
    """How many atoms of each element a crystal's cell has."""
    counts = np.zeros((len(valid), len(ELEMENTS)))
    for row, (formula, atoms) in enumerate(zip(valid["formula"], valid["num_atoms"], strict=True)):
        for symbol, share in parsed(formula, "a row of the table").items():
            counts[row, ATOMIC_NUMBER[symbol]] = round(share * atoms)
    return counts
