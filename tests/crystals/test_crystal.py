"""A crystal keeps what it is given, to the last bit of its grid, and refuses what is none."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.core.periodic_table import Element
from some_crystals import SALT, crystals

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal, CrystalBatch, closes
from jaxcrystal.errors import UserError
from jaxcrystal.texts.p1.text import parse
from jaxcrystal.texts.parsing import ParseError


def test_elements_are_the_periodic_table():
    assert len(ELEMENTS) == 119
    assert all(Element.from_Z(z).symbol == ELEMENTS[z] for z in range(1, 119))


@given(crystals())
@settings(max_examples=200, deadline=None)
def test_the_device_holds_the_same_crystal(crystal):
    batch = jax.device_put(CrystalBatch.from_crystals([SALT, crystal], max_atoms=24))
    assert batch.crystal(1) == crystal and batch.crystal(0) == SALT
    assert not np.asarray(batch.species[1, len(crystal) :]).any()


@given(crystals())
@settings(max_examples=100, deadline=None)
def test_construction_is_idempotent_and_wraps(crystal):
    again = Crystal(crystal.lengths, crystal.angles, crystal.species, crystal.frac_coords + np.array([1, -2, 3]))
    assert again == crystal
    assert ((crystal.frac_coords >= 0) & (crystal.frac_coords < 1)).all()


@given(crystals(max_atoms=4))
@settings(max_examples=50, deadline=None)
def test_pymatgen_and_back(crystal):
    structure = crystal.to_structure()
    assert structure.volume == pytest.approx(crystal.volume, rel=1e-9)
    back = Crystal.from_structure(structure)
    np.testing.assert_allclose(back.lengths, crystal.lengths, atol=1e-6)
    np.testing.assert_allclose(back.angles, crystal.angles, atol=1e-6)
    assert (back.species == crystal.species).all() and (back.frac_coords == crystal.frac_coords).all()


def test_cif_is_read_back_by_pymatgen():
    structure = Structure.from_str(SALT.to_cif(), fmt="cif")
    assert Crystal.from_structure(structure) == SALT


def test_nearly_one_wraps_to_zero_and_120_is_not_rounded_up():
    crystal = Crystal([3, 3, 5], [90, 90, 119.99999999999], [6], [[1 - 1e-12, -1e-17, 1.25]])
    assert crystal.frac_coords.tolist() == [[0, 0, 0.25]]
    assert crystal.angles[2] < 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [5, np.nan, 5]}, "not a finite number"),
        ({"lengths": [5, 0, 5]}, "between 0 and 256"),
        ({"lengths": [5, 300, 5]}, "between 0 and 256"),
        ({"angles": [90, 90, 180]}, "between 0 and 180"),
        ({"angles": [30, 30, 120]}, "no cell closes"),
        ({"species": [11, 119]}, "1 to 118"),
        ({"frac_coords": [[0, 0, np.inf], [0, 0, 0]]}, "not a finite number"),
        ({"frac_coords": [[0, 0, 0]]}, r"\(2, 3\)"),
        ({"lengths": [5, 5]}, "3 lengths"),
    ],
)
def test_what_is_no_crystal_is_refused(changes, message):
    good = {"lengths": [5.64] * 3, "angles": [90] * 3, "species": [11, 17], "frac_coords": [[0, 0, 0], [0.5] * 3]}
    with pytest.raises(UserError, match=message):
        Crystal(**(good | changes))


def test_structures_that_are_not_ordered_are_refused():
    mixed = Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    with pytest.raises(UserError, match="partially occupied"):
        Crystal.from_structure(mixed)
    with pytest.raises(UserError, match="more than the 1"):
        CrystalBatch.from_crystals([SALT], max_atoms=1)


def test_a_notebook_shows_formula_cell_and_atoms():
    salt = Crystal([5.69, 5.69, 5.7], [90, 90, 120], [11, 17, 17], [[0, 0, 0], [0.5, 0.25, 0.125], [0.1, 0.2, 0.3]])
    shown = salt._repr_html_()
    assert "<b>Cl<sub>2</sub>Na</b>, 3 atoms in " in shown and "5.690 5.690 5.700 Å, 90.00 90.00 120.00°" in shown
    assert "<tr><td>Cl</td><td>0.5000</td><td>0.2500</td><td>0.1250</td></tr>" in shown and "more" not in shown
    chain = Crystal([9, 9, 200], [90, 90, 90], [6] * 30, [[0, 0, i / 30] for i in range(30)])
    assert chain._repr_html_().count("<td>C</td>") == 20 and "… and 10 more atoms" in chain._repr_html_()


def test_as_ases_atoms():
    crystal = Crystal([3.1, 4.7, 5.9], [71.3, 88.8, 119.5], [3, 8], [[0.1, 0.2, 0.3], [0.5, 0.5, 0.75]])
    atoms = crystal.to_atoms()
    np.testing.assert_allclose(atoms.cell.cellpar(), [*crystal.lengths, *crystal.angles], atol=1e-9)
    np.testing.assert_allclose(atoms.get_scaled_positions(), crystal.frac_coords, atol=1e-12)
    assert atoms.get_chemical_symbols() == ["Li", "O"] and atoms.pbc.all()


@given(st.integers(1, 178), st.integers(1, 178), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_flat_cell_is_none_and_the_flattest_that_is_written_is_one(alpha, beta, around):
    """Angles that add up to 360° or one to the two others: float64 finds a volume of some 1e-7 Å³ for many."""
    gamma = 360 - alpha - beta if around else alpha + beta
    assume(0 < gamma < 180)
    flat = np.array([alpha, beta, gamma], float)
    assert not closes(np.full(3, 4.0), flat)
    with pytest.raises(UserError, match="no cell closes with"):
        Crystal([4] * 3, flat, [11], [[0, 0, 0]])
    with pytest.raises(ParseError, match="angles that close a cell"):
        parse(f"4.0 4.0 4.0\n{alpha} {beta} {gamma}\nNa\n0.0 0.0 0.0")
    cell = Crystal([4] * 3, flat - [0, 0, 1e-6], [11], [[0, 0, 0]])
    assert 0 < cell.volume < 0.1 and cell.to_structure().volume > 0


@pytest.mark.parametrize("cell", [([4] * 3, [60, 60.00000001, 120]), ([1e-9, 4, 4], [90] * 3)])
def test_a_cell_that_is_flat_on_the_grid_is_none(cell):
    with pytest.raises(UserError, match="no cell closes with"):
        Crystal(*cell, [11], [[0, 0, 0]])
