"""Attempts made of known crystals: each is decided by seed and number alone, and none is lost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_crystals import SALT

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.substitution import alike, swapped
from jaxcrystal.errors import UserError
from jaxcrystal.sampling.templates import check_request, substitutions

CUBE = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
MAGNESIA = Crystal([4.2] * 3, [90] * 3, [12, 8], CUBE)
HELIUM = Crystal([4.0] * 3, [90] * 3, [2, 8], CUBE)
NITRIDE = Crystal([4.3] * 3, [90] * 3, [22, 7], CUBE)
LONG = Crystal([255.9, 5, 5], [90] * 3, [11, 35], CUBE)
TEMPLATES = [("salt", SALT), ("magnesia", MAGNESIA), ("helium", HELIUM), ("nitride", NITRIDE), ("long", LONG)]
POOL = alike(0.1)

SEEDS = st.integers(0, 2**40)


@given(SEEDS, st.integers(1, 6), st.none() | st.just(1), st.booleans())
def test_a_longer_run_begins_with_a_shorter_one(seed, num, swaps, new):
    known = {"ClNa", "MgO", "FeN"} if new else None
    options = {"swaps": swaps, "known": known, "seed": seed}
    longer = substitutions(TEMPLATES, 8, POOL, **options)
    assert substitutions(TEMPLATES, num, POOL, **options) == longer[:num]
    assert [row.index for row in longer] == list(range(8)) and {row.seed for row in longer} == {seed}


def test_seeds_differ_and_templates_are_as_likely():
    rows = substitutions(TEMPLATES, 1000, POOL)
    counts = Counter(row.template for row in rows)
    assert counts.keys() == dict(TEMPLATES).keys() and all(abs(count - 200) < 65 for count in counts.values())
    other = substitutions(TEMPLATES, 1000, POOL, seed=1)
    assert sum(a.template == b.template for a, b in zip(rows, other, strict=True)) < 300


def test_every_attempt_is_a_row_that_says_what_came_of_it():
    wide = {**POOL, "Na": ["K"], "Br": ["I"]}
    rows = substitutions(TEMPLATES, 300, wide)
    outcomes = {(row.template, row.outcome) for row in rows}
    assert outcomes == {
        ("salt", "ok"),
        ("magnesia", "ok"),
        ("helium", "no_swap"),
        ("nitride", "ok"),
        ("long", "cell_error"),
    }
    for row in rows:
        assert (row.crystal is None) == (row.status != "ok") and (row.swaps is None) == (row.status == "no_swap")
        if row.crystal is not None:
            assert row.crystal == swapped(dict(TEMPLATES)[row.template], row.swaps)
        assert row.redraws is None and row.id == str(row.index)


def test_a_known_formula_is_drawn_again():
    pool = {"Na": ["K", "Rb"], "Cl": ["Br", "I"]}
    known = {"BrK", "BrRb"}
    plain = substitutions([("salt", SALT)], 200, pool)
    new = substitutions([("salt", SALT)], 200, pool, known=known)
    assert {row.crystal.formula for row in plain} == {"BrK", "BrRb", "IK", "IRb"}
    assert {row.crystal.formula for row in new} == {"IK", "IRb"}
    for one, other in zip(plain, new, strict=True):
        assert (other.redraws > 0) == (one.crystal.formula in known)
        assert other.redraws or (other.crystal, other.swaps) == (one.crystal, one.swaps)
    assert 150 < sum(row.redraws for row in new) < 250  # one in two draws is known


def test_where_every_formula_is_known_the_attempt_ends():
    (row,) = substitutions([("salt", SALT)], 1, {"Na": ["K"], "Cl": ["Br"]}, known={"BrK"})
    assert (row.status, row.crystal, row.redraws) == ("known_formula", None, 1000)
    assert row.swaps == {"Cl": "Br", "Na": "K"}


@pytest.mark.parametrize(
    ("num", "swaps", "seed", "message"),
    [
        (0, None, 0, "num is 0; it must be at least 1"),
        (1, 0, 0, "swaps is 0; it must be at least 1"),
        (1, None, -1, "seed is -1; it must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense(num, swaps, seed, message):
    with pytest.raises(UserError) as caught:
        check_request(num, swaps, seed)
    assert str(caught.value) == message
