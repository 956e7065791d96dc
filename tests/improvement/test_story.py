"""What is told of a round: which judged attempts are what, counted row by row."""

import pandas as pd

from jaxcrystal.improvement.story import rates

COLUMNS = ["e_above_hull", "unique", "novel", "known_as", "num_elements", "structural_valid"]
ROWS = [
    [0.05, True, True, None, 2, True],  # new to all
    [0.05, True, False, "round1-3", 2, True],  # learnt in a round: new to the original set alone
    [0.05, True, False, "mp-1", 1, True],  # learnt from the original set
    [0.30, True, True, None, 2, True],  # too high
    [0.05, False, True, None, 2, True],  # a second time
    [None, False, False, None, None, False],  # no crystal
]


def table(suffix: str) -> pd.DataFrame:
    found = pd.DataFrame(ROWS, columns=COLUMNS).assign(compositional_valid=True).astype({"num_elements": "Int64"})
    return found.rename(columns={name: f"{name}{suffix}" for name in ("unique", "novel", "known_as")})


def test_each_rate_counts_its_own():
    counted = {name: mask.astype(int).tolist() for name, mask in rates(table("_relaxed"), {"round1-3"}).items()}
    assert counted == {
        "valid": [1, 1, 1, 1, 1, 0],
        "unique": [1, 1, 1, 1, 0, 0],
        "novel": [1, 0, 0, 1, 1, 0],
        "novel_original": [1, 1, 0, 1, 1, 0],
        "replay": [0, 1, 1, 0, 0, 0],
        "one_element": [0, 0, 1, 0, 0, 0],
        "metastable": [1, 1, 1, 0, 1, 0],
        "metastable_sun": [1, 0, 0, 0, 0, 0],
        "metastable_sun_original": [1, 1, 0, 0, 0, 0],
    }


def test_without_a_judge_nothing_is_said_of_energies():
    plain = table("").drop(columns="e_above_hull")
    assert not [name for name in rates(plain, set()) if name.startswith("metastable")]
    assert rates(plain, set())["novel_original"].tolist() == rates(plain, set())["novel"].tolist()
