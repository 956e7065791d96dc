"""Which crystals of a round go into the next training set, and of each other one why not.

The rule is what others learnt by a collapse: a crystal is kept if its relaxed form is sound, neither known nor there
already, and lies near the hull, where the hull knows its chemistry. What lies far below the hull is more often an error
of the potential than a discovery; of a system whose only compound is the candidate the hull says nothing; an element
alone is no compound; and one composition, however stable, must not fill the training set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

import pandas as pd

from jaxcrystal.improvement.recipe import Selection


class Verdict(StrEnum):
    """What became of an attempt; the first that applies, in this order."""

    NO_CRYSTAL = "no_crystal"
    INVALID = "invalid"  # in structure or composition, before it was relaxed
    NOT_RELAXED = "not_relaxed"
    NO_GROUP = "no_group"  # relaxed, and no space group is found
    UNPLACED = "unplaced"  # the hull does not know an element, or it lies too far below to be an energy
    ELEMENT = "element"
    FEW_PHASES = "few_phases"  # known of its system
    TOO_LOW = "too_low"
    TOO_HIGH = "too_high"
    KNOWN = "known"  # to what the model was trained on, earlier rounds included
    DUPLICATE = "duplicate"  # of a kept one of this round
    CROWDED = "crowded"  # its composition has as many as it may
    KEPT = "kept"


def select(table: pd.DataFrame, rule: Selection, there: Mapping[str, int]) -> pd.Series:
    """A Verdict for each row of an evaluation's table, which has a training set, a potential and a hull.

    Of duplicates, and of one composition, those of the lowest energy are kept. `there` counts the crystals of earlier
    rounds by reduced formula.
    """
    energy, phases = table["e_above_hull"], table["phases_of_system"]
    sound = table["structural_valid"] & table["compositional_valid"]
    reasons = {
        Verdict.NO_CRYSTAL: table["outcome"] != "ok",
        Verdict.INVALID: ~sound,
        Verdict.NOT_RELAXED: ~table["converged"].fillna(False).astype(bool),
        Verdict.NO_GROUP: table["spacegroup_relaxed"].isna(),
        Verdict.ELEMENT: (table["num_elements"] == 1).fillna(False),
    }
    if rule.by_energy:
        reasons |= {
            Verdict.UNPLACED: energy.isna(),
            Verdict.FEW_PHASES: (phases < rule.phases_of_system).fillna(True),
            Verdict.TOO_LOW: energy < rule.low,
            Verdict.TOO_HIGH: energy > rule.high,
        }
    reasons[Verdict.KNOWN] = ~table["novel_relaxed"].astype(bool)
    verdicts = pd.Series(Verdict.KEPT, index=table.index, dtype=object)
    for verdict, applies in reversed(reasons.items()):
        verdicts[applies.astype(bool)] = verdict
    counts, groups = Counter(there), set()
    for row in energy[verdicts == Verdict.KEPT].sort_values(kind="stable").index:  # without an energy last
        formula, group = table["formula"][row], table["group_relaxed"][row]
        if group in groups:
            verdicts[row] = Verdict.DUPLICATE
        elif counts[formula] >= rule.per_composition:
            verdicts[row] = Verdict.CROWDED
        else:
            groups.add(group)
            counts[formula] += 1
    return verdicts
