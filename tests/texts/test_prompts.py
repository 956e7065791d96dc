"""The prompts' wording is the paper's, to the letter."""

import pytest
from some_crystals import SALT

from jaxcrystal.config import ATTRIBUTES, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.texts import prompts
from jaxcrystal.texts.conditions import CONDITIONS
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of

P1 = form_of(TextFormat())


def test_generation_prompt():
    attributes = {"band_gap": 1.5, "pretty_formula": "NaCl", "elements": ["Cl", "Na"], "spacegroup.number": 225}
    assert prompts.generation_prompt(P1, attributes) == (
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
    assert prompts.infilling(P1, SALT, 17) == (
        "Below is a partial description of a bulk material where one element has been replaced with the string "
        '"[MASK]":\n5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\n[MASK]\n0.50 0.50 0.50\n'
        "Generate an element that could replace [MASK] in the bulk material:\nCl"
    )


def test_the_table_of_conditions_is_whole():
    assert tuple(each.attribute for each in CONDITIONS) == ATTRIBUTES
    names = [name for each in CONDITIONS for name in {each.attribute, each.name}]
    assert len(names) == len(set(names))
    typed = {"formula": "NaCl", "elements": "Li,O", "spacegroup": "225"}
    values = {each.attribute: each.read(typed.get(each.name, "-1.5")) for each in CONDITIONS}
    prompt = prompts.generation_prompt(P1, values)
    assert all(f" {each.subject} " in prompt for each in CONDITIONS) and prompt.count("-1.5000.") == 3
    kept = {name: P1.implied(name, value) for name, value in values.items()}
    assert {name: Constraints(**fields) for name, fields in kept.items() if fields} == {
        "pretty_formula": Constraints(formula="NaCl"),
        "elements": Constraints(required=("Li", "O"), allowed=("Li", "O")),
    }


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
