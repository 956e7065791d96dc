"""The prompts' wording is the paper's, to the letter."""

import pytest
from test_crystal import SALT

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals import prompts
from jaxcrystal.errors import UserError


def test_generation_prompt():
    attributes = {"band_gap": 1.5, "pretty_formula": "NaCl", "elements": ["Cl", "Na"], "spacegroup.number": 225}
    assert prompts.generation_prompt(attributes) == (
        "Below is a description of a bulk material. The band gap is 1.5000. The chemical formula is NaCl. The elements "
        "are Cl, Na. The spacegroup number is 225. Generate a description of the lengths and angles of the lattice "
        "vectors and then the element type and coordinates for each atom within the lattice:\n"
    )


def test_energies_have_four_decimals_and_compat_has_the_originals():
    assert prompts.sentence("formation_energy_per_atom", -0.31) == " The formation energy per atom is -0.3100."
    assert prompts.sentence("e_above_hull", 0.0) == " The energy above the convex hull is 0.0000."
    assert prompts.sentence("e_above_hull", 0.0, paper_compat=True) == " The energy above the convex hull is 0.0."
    assert prompts.sentence("band_gap", 1.23456, paper_compat=True) == " The band gap is 1.2346."


def test_infilling():
    assert prompts.infilling(SALT, 17, TextFormat()) == (
        "Below is a partial description of a bulk material where one element has been replaced with the string "
        '"[MASK]":\n5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\n[MASK]\n0.50 0.50 0.50\n'
        "Generate an element that could replace [MASK] in the bulk material:\nCl"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("colour", "red", "unknown condition 'colour'"),
        ("spacegroup.number", 231, "1 to 230"),
        ("elements", ["Xx"], "no chemical element"),
        ("band_gap", "wide", "no value of band_gap"),
    ],
)
def test_conditions_that_do_not_exist(name, value, message):
    with pytest.raises(UserError, match=message):
        prompts.sentence(name, value)
