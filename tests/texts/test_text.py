"""Text and back: equal up to the stated decimals; whatever is no crystal is refused at the line where it goes wrong."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure
from some_crystals import SALT, crystals, p1_crystal

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.texts.p1.text import parse, write
from jaxcrystal.texts.parsing import ParseError, ParseErrorKind

TEXT = "5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50"
FORMATS = st.builds(TextFormat, st.integers(1, 6), st.integers(1, 4), st.integers(0, 2), st.booleans())


def assert_round_trip(crystal: Crystal, fmt: TextFormat) -> None:
    back = parse(write(crystal, fmt))
    half = 0.5 + 1e-6
    np.testing.assert_allclose(back.lengths, crystal.lengths, atol=half * 10.0**-fmt.length_decimals)
    angle = (1 if fmt.paper_compat else half) * 10.0**-fmt.angle_decimals
    np.testing.assert_allclose(back.angles, crystal.angles, atol=angle + 1e-6)
    assert (back.species == crystal.species).all()
    away = np.abs(back.frac_coords - crystal.frac_coords)
    assert np.minimum(away, 1 - away).max() <= half * 10.0**-fmt.coord_decimals


def test_the_papers_format():
    assert write(SALT) == TEXT
    assert write(SALT, mask_element=17) == TEXT.replace("Cl", "[MASK]")
    assert parse(TEXT).symbols == ["Na", "Cl"]


@given(crystals(), FORMATS)
@settings(max_examples=300, deadline=None)
def test_round_trip(crystal, fmt):
    try:
        assert_round_trip(crystal, fmt)
    except ParseError as error:  # rounded angles may close no cell where the exact ones barely do
        assert error.kind is ParseErrorKind.CELL


@given(crystals(), FORMATS)
@settings(max_examples=100, deadline=None)
def test_a_text_writes_itself(crystal, fmt):
    """Once rounded, always the same: text -> crystal -> text."""
    text = write(crystal, TextFormat(fmt.coord_decimals, fmt.length_decimals, fmt.angle_decimals))
    try:
        back = parse(text)
    except ParseError as error:
        assert error.kind is ParseErrorKind.CELL
    else:
        assert write(back, TextFormat(fmt.coord_decimals, fmt.length_decimals, fmt.angle_decimals)) == text


@pytest.mark.slow
def test_round_trip_of_mp20(shared):
    for part in ("train", "val", "test"):
        for cif in pd.read_parquet(shared / f"data/mp20/{part}.parquet", columns=["cif"])["cif"][::3]:
            assert_round_trip(p1_crystal(cif), TextFormat())


def test_p1_reading_is_pymatgens(shared):
    for cif in pd.read_parquet(shared / "data/mp20/val.parquet", columns=["cif"])["cif"][:50]:
        theirs, ours = Crystal.from_structure(Structure.from_str(cif, fmt="cif")), p1_crystal(cif)
        assert (theirs.species == ours.species).all()
        # pymatgen takes 0.333333 for 1/3.
        np.testing.assert_allclose(theirs.frac_coords, ours.frac_coords, atol=1e-6)
        np.testing.assert_allclose(theirs.angles, ours.angles, atol=1e-6)


def test_ties_go_to_even_and_one_wraps():
    crystal = Crystal([5.25, 5.75, 9.96], [90.5, 91.5, 89.5], [6], [[0.125, 0.375, 0.996]])
    assert write(crystal) == "5.2 5.8 10.0\n90 92 90\nC\n0.12 0.38 0.00"


def test_paper_compat_truncates_angles_and_may_write_one():
    crystal = Crystal([3, 3, 5], [90, 90, 119.99999999999], [6], [[0.999, 0, 0]])
    assert write(crystal, TextFormat(paper_compat=True)) == "3.0 3.0 5.0\n90 90 119\nC\n1.00 0.00 0.00"
    assert write(crystal) == "3.0 3.0 5.0\n90 90 120\nC\n0.00 0.00 0.00"


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("", ParseErrorKind.EMPTY, 1),
        (TEXT.replace("5.6 5.6 5.6", "5.6 5.6"), ParseErrorKind.LENGTHS, 1),
        (TEXT.replace("5.6 5.6 5.6", "5.6 5.6 nan"), ParseErrorKind.LENGTHS, 1),
        (TEXT.replace("5.6 5.6 5.6", "5.6 5.6 -5.6"), ParseErrorKind.LENGTHS, 1),
        (TEXT.replace("90 90 90", "90  90 90"), ParseErrorKind.ANGLES, 2),
        ("5.6 5.6 5.6", ParseErrorKind.MISSING, 2),
        ("5.6 5.6 5.6\n90 90 90", ParseErrorKind.MISSING, 3),
        (TEXT.replace("Cl", "Xx"), ParseErrorKind.ELEMENT, 5),
        (TEXT.replace("Cl", "[MASK]"), ParseErrorKind.ELEMENT, 5),
        (TEXT.replace("0.50 0.50 0.50", "0.50 0.50"), ParseErrorKind.COORDINATES, 6),
        (TEXT.replace("0.50 0.50 0.50", "0.50 0.50 1.50"), ParseErrorKind.COORDINATES, 6),
        (TEXT.replace("\n0.50 0.50 0.50", ""), ParseErrorKind.MISSING, 6),
        (TEXT.replace("90 90 90", "30 30 120"), ParseErrorKind.CELL, 2),
        (TEXT.replace("90 90 90", "90 90 0"), ParseErrorKind.CELL, 2),
        (TEXT.replace("5.6 5.6 5.6", "0.0 5.6 5.6"), ParseErrorKind.CELL, 1),
        (TEXT.replace("5.6 5.6 5.6", "500.0 5.6 5.6"), ParseErrorKind.CELL, 1),
    ],
)
def test_parse_errors_name_kind_and_line(text, kind, line):
    with pytest.raises(ParseError) as caught:
        parse(text)
    assert (caught.value.kind, caught.value.line) == (kind, line)
    assert caught.value.expected and f"line {line}" in str(caught.value)


@given(st.text(alphabet="0123456789. \nNaClO[]", max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_refused(text):
    try:
        crystal = parse(text)
    except ParseError:
        return
    assert len(crystal) >= 1


@pytest.mark.parametrize("field", [{"coord_decimals": 7}, {"length_decimals": 0}, {"angle_decimals": 3}])
def test_decimals_have_bounds(field):
    with pytest.raises(UserError, match="must lie between"):
        TextFormat(**field)
