"""Hiding an element touches its atoms alone, and nothing that is left depends on what it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Structure
from some_crystals import SALT, crystals
from symmetric_crystals import random_symmetric

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.crystals.masking import hide
from jaxcrystal.crystals.symmetry import orbit_of, symmetrize
from jaxcrystal.crystals.wyckoff import GROUPS


@given(crystals(), st.data())
def test_the_hidden_atoms_alone_are_others(crystal, data):
    element = data.draw(st.sampled_from(sorted(set(crystal.species.tolist()))))
    own = np.flatnonzero(crystal.species == element)
    chosen = data.draw(st.sets(st.sampled_from(own.tolist()), min_size=1))
    atoms = np.isin(np.arange(len(crystal)), list(chosen))
    masked = hide(crystal, atoms)
    assert (masked.element, masked.atoms) == (ELEMENTS[element], len(chosen))
    assert masked.elsewhere == (len(chosen) < len(own))
    np.testing.assert_array_equal(masked.crystal.species == masked.stand_in, atoms)
    np.testing.assert_array_equal(masked.crystal.species[~atoms], crystal.species[~atoms])
    for name in ("lengths", "angles", "frac_coords"):
        np.testing.assert_array_equal(getattr(masked.crystal, name), getattr(crystal, name))


@given(crystals(), st.data())
def test_what_is_left_does_not_depend_on_what_was_hidden(crystal, data):
    atoms = crystal.species == crystal.species[0]
    other = data.draw(st.sampled_from(sorted({*range(1, 119)} - set(crystal.species.tolist()))))
    changed = Crystal(crystal.lengths, crystal.angles, np.where(atoms, other, crystal.species), crystal.frac_coords)
    one, another = hide(crystal, atoms), hide(changed, atoms)
    assert one.crystal == another.crystal and one.stand_in == another.stand_in
    assert (one.element, another.element) == (crystal.symbols[0], ELEMENTS[other])


@pytest.mark.parametrize("atoms", [[False, False], [True, True]])
def test_one_element_is_hidden_at_a_time(atoms):
    with pytest.raises(ValueError, match="unpack"):
        hide(SALT, np.array(atoms))


def test_an_orbit_is_what_the_group_makes_of_an_atom():
    """Of crystals that were made of orbits, in any order of their atoms and in cells that are not primitive."""
    random, found = np.random.default_rng(0), 0
    for number in list(GROUPS)[::4]:
        made = random_symmetric(number, 0)
        crystal = made.to_crystal()
        if (symmetrized := symmetrize(crystal)) is None or symmetrized.crystal.space_group != number:
            continue  # by chance it is more symmetric than it was made
        found += 1
        orbits = np.repeat(np.arange(len(made.orbits)), [made.group.atoms(orbit.letter) for orbit in made.orbits])
        twice = crystal.to_structure().make_supercell((1, 2, 1), in_place=False)
        order = random.permutation(len(twice))
        orbits = np.repeat(orbits, 2)[order]
        larger = Crystal.from_structure(Structure.from_sites([twice[i] for i in order]))
        for atom in (0, len(order) // 2):
            np.testing.assert_array_equal(orbit_of(larger, atom), orbits == orbits[atom])
    assert found > 40


def test_atoms_on_each_other_have_no_orbits():
    assert orbit_of(Crystal([3.0] * 3, [90] * 3, [11, 11], [[0, 0, 0], [0, 0, 0]]), 0) is None
