"""Radii of ions are pymatgen's, and who is like whom is mutual."""

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Element

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.crystals.radii import radius, similar
from jaxcrystal.errors import UserError

SYMBOLS = ELEMENTS[1:]


def ions(symbol):
    """Of pymatgen's table, those that count: anions where there are any, and of noble gases none."""
    known = {} if Element(symbol).is_noble_gas else Element(symbol).ionic_radii
    return {charge: float(size) for charge, size in known.items() if charge < 0 or min(known) > 0}


def test_a_radius_is_the_mean_over_pymatgens_ions():
    for symbol in SYMBOLS:
        expected = ions(symbol)
        assert radius(symbol) == (pytest.approx(mean(expected.values()), abs=1e-12) if expected else None), symbol


def test_who_has_none():
    without = [symbol for symbol in SYMBOLS if radius(symbol) is None]
    assert without == ["H", "He", "Ne", "Ar", "Kr", "Xe", "Rn", *SYMBOLS[ATOMIC_NUMBER["Cf"] :]]
    assert not any(similar(symbol, 9.0) for symbol in without)


@given(st.sampled_from(SYMBOLS), st.floats(0, 3))
def test_similar_are_all_of_that_size_and_sign_the_nearest_first(symbol, tolerance):
    found = similar(symbol, tolerance)
    away = {other: abs(radius(other) - radius(symbol)) for other in found}
    assert all(distance <= tolerance + 1e-6 for distance in away.values())
    keys = [(round(away[other], 6), ATOMIC_NUMBER[other]) for other in found]
    assert keys == sorted(keys) and symbol not in found and len(set(found)) == len(found)
    for other in {*SYMBOLS, symbol} - {symbol, *found}:
        sizes = radius(symbol), radius(other)
        charges = [min(ions(element), default=0) for element in (symbol, other)]
        assert None in sizes or charges[0] * charges[1] < 0 or abs(sizes[0] - sizes[1]) > tolerance - 1e-6


@given(st.sampled_from(SYMBOLS), st.sampled_from(SYMBOLS), st.floats(0, 1))
def test_likeness_is_mutual(one, other, tolerance):
    assert (one in similar(other, tolerance)) == (other in similar(one, tolerance))


def test_the_tolerance_is_reached():
    assert similar("O") == ["N", "F"]
    assert similar("Cl") == ["S"] and similar("S") == ["Cl"] and similar("Cl", 0.029) == []
    assert radius("Na") - radius("Ac") == pytest.approx(-0.1) and radius("Na") - radius("Ac") != -0.1
    assert "Ac" in similar("Na", 0.1) and "Ac" not in similar("Na", 0.0999)


@pytest.mark.parametrize(
    ("symbol", "tolerance", "message"),
    [
        ("D", 0.1, "'D' is no chemical element"),
        ("-", 0.1, "'-' is no chemical element"),
        ("Fe", -0.1, "the tolerance is -0.1 Å; it must be at least 0"),
        ("Fe", float("nan"), "the tolerance is nan Å; it must be at least 0"),
    ],
)
def test_bad_input(symbol, tolerance, message):
    with pytest.raises(UserError) as caught:
        similar(symbol, tolerance)
    assert str(caught.value) == message
