"""What a text turns out to be, and the CIF of a crystal."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, Structure

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.sampling.attempt import Attempt, judge
from jaxcrystal.sampling.attempts_table import SCHEMA
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.p1.text import parse

ROCK_SALT = "5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (ROCK_SALT, "ok"),
        (ROCK_SALT.replace("90 90 90", "30 30 90"), "cell_error"),
        (ROCK_SALT.replace("Na", "Nq"), "parse_error:element"),
        (ROCK_SALT.replace("0.50 0.50 0.50", "0.50 0.50"), "parse_error:coordinates"),
        ("", "parse_error:empty"),
    ],
)
def test_statuses(text, status):
    found, crystal = judge(text, form_of(TextFormat()))
    assert found == status
    assert (crystal is not None) == (status == "ok")


def test_an_attempt_keeps_its_form_and_no_column_of_it():
    other = form_of(TextFormat(coord_decimals=5))
    fields = dict.fromkeys(SCHEMA.names) | {"text": ROCK_SALT, "status": "ok"}
    attempt = Attempt(**fields, form=other)
    assert replace(attempt, index=1).form is other and attempt.crystal == parse(ROCK_SALT)
    assert asdict(attempt) == fields and attempt == Attempt(**fields)


def test_a_row_of_a_ledger_is_read_as_it_was_written():
    text = "Na 1 Cl 1\n225\nNa a\nCl b\n5.60"
    fields = dict.fromkeys(SCHEMA.names) | {"text": text, "status": "ok", "written_group": 225}
    assert Attempt(**fields).crystal == form_of(TextFormat(form="symmetry")).parse(text)
    assert Attempt(**fields).crystal.formula == "ClNa"


@pytest.mark.parametrize(
    ("symbols", "formula"), [("Li Fe P O O O O", "FeLiO4P"), ("Na Cl Na Cl", "ClNa"), ("Si Si", "Si"), ("O O H", "HO2")]
)
def test_formula_is_optimades(symbols, formula):
    structure = Structure(np.eye(3) * 9, symbols.split(), np.random.default_rng(0).random((len(symbols.split()), 3)))
    assert Crystal.from_structure(structure).formula == formula
    assert Composition(formula).reduced_composition == structure.composition.reduced_composition


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(20, 990), min_size=3, max_size=3),
    angles=st.lists(st.integers(60, 119), min_size=3, max_size=3).filter(lambda a: sum(a) < 350),
    atoms=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    exact=st.booleans(),
)
def test_pymatgen_reads_the_same_crystal_from_the_cif(lengths, angles, atoms, seed, exact):
    """`exact` crystals have two decimals, as a text has; the others any coordinates of the grid."""
    rng = np.random.default_rng(seed)
    # One atom on each diagonal step: pymatgen would merge atoms that lie on top of each other.
    coords = (np.arange(atoms)[:, None] + 0.2 * rng.random((atoms, 3))) / (atoms + 1) + 0.01
    coords = coords.round(2) if exact else coords
    crystal = Crystal(np.array(lengths) / 10, np.array(angles, float), rng.integers(1, 90, atoms), coords)
    structure = Structure.from_str(crystal.to_cif(), fmt="cif")
    structure.sort(key=lambda site: site.frac_coords[0])  # the reader sorts by electronegativity; x rises in ours
    np.testing.assert_array_equal([site.specie.Z for site in structure], crystal.species)
    np.testing.assert_allclose(structure.lattice.abc, crystal.lengths, rtol=0, atol=2**-24)
    np.testing.assert_allclose(structure.lattice.angles, crystal.angles, rtol=0, atol=2**-23)
    back = Crystal.from_structure(structure)
    # pymatgen moves a coordinate within 1e-4 of a simple fraction such as 1/3 onto it.
    snapped = np.abs(crystal.frac_coords[..., None] - np.array([1, 2, 4, 5]) / 6).min(-1) < 1.01e-4
    assert ((back.frac_coords == crystal.frac_coords) | snapped).all()


def test_the_cif_says_what_the_text_said():
    cif = parse("5.1 12.0 7.3\n90 89 120\nNa\n0.33 0.07 0.50").to_cif()
    for line in ("_cell_length_a 5.1", "_cell_length_b 12", "_cell_angle_gamma 120", "Na Na0 0.33 0.07 0.5 1"):
        assert line in cif.split("\n")
