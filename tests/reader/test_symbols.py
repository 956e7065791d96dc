"""Chemical symbols: one element, however it is written, and nothing that names two or a group of atoms."""

import pytest

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.reader.rows import Refused
from jaxcrystal.reader.symbols import element, element_of_label


@pytest.mark.parametrize("symbol", ATOMIC_NUMBER)
@pytest.mark.parametrize("form", ["{}", "{}3+", "{}+2", "{}-", "{}0+", "{}2.5+", " {} ", "{}7"])
def test_every_element_in_every_form(symbol, form):
    assert element(form.format(symbol))[0] == symbol


@pytest.mark.parametrize(
    ("text", "symbol", "notes"),
    [
        ("FE", "Fe", ("symbol FE read as Fe",)),
        ("cl", "Cl", ("symbol cl read as Cl",)),
        ("D", "H", ("deuterium (D) read as hydrogen",)),
        ("13C", "C", ("mass numbers of isotopes are not kept",)),
        ("O2-", "O", ("oxidation states are not kept",)),
        ("Fe0+", "Fe", ()),
    ],
)
def test_what_of_a_species_is_not_kept(text, symbol, notes):
    assert element(text) == (symbol, notes)


@pytest.mark.parametrize(
    "text",
    "Al/Si Al,Si Al;Si Al0.5Si0.5 Al1Si1 Si+Al Fe0.9Mg0.1 Fe|Mg Fe(Mg) Fe.5 Mn3+Fe3+ Na:K Ca_Sr H2O H3O+ O-H O2H NH4 "
    "CO3 Wat OW X Vac Qq 3 + NaCl Nq".split(),
)
def test_what_is_not_one_element_is_none(text):
    with pytest.raises(Refused, match="is no chemical element"):
        element(text)


@pytest.mark.parametrize(
    ("label", "symbol"),
    [
        ("Fe1", "Fe"),
        ("FE3", "Fe"),
        ("CA1", "Ca"),
        ("Fe1A", "Fe"),
        ("C12", "C"),
        ("Na(1)", "Na"),
        ("O1'", "O"),
        ("Cl", "Cl"),
    ],
)
def test_labels(label, symbol):
    assert element_of_label(label)[0] == symbol


@pytest.mark.parametrize("label", ["HO1", "CN1", "NO3", "NE1", "T1", "OW1", "O1W", "C1H", "Al/Si", "M1", "Wat1"])
def test_a_label_that_does_not_say_one_element_is_refused(label):
    with pytest.raises(Refused):
        element_of_label(label)
