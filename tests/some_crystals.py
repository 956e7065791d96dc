"""Crystals that tests of several rooms take."""

import re

import numpy as np
from hypothesis import strategies as st

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal, cell_volume

SALT = Crystal([5.64] * 3, [90] * 3, [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])


@st.composite
def crystals(draw, max_atoms: int = 20) -> Crystal:
    """Any crystal that the text format can hold."""
    n = draw(st.integers(1, max_atoms))
    number = st.floats(0, 1, exclude_max=True)
    cell = st.floats(1, 99.9)
    angles = draw(st.tuples(*[st.floats(40, 110)] * 3).filter(lambda a: cell_volume(np.ones(3), np.array(a)) > 1e-2))
    species = draw(st.lists(st.integers(1, 118), min_size=n, max_size=n))
    coords = draw(st.lists(st.tuples(number, number, number), min_size=n, max_size=n))
    return Crystal([draw(cell) for _ in range(3)], angles, species, coords)


def p1_crystal(cif: str) -> Crystal:
    """A P1 CIF of MP-20, which has its numbers in fixed places; a hundred times faster than a parser of all CIFs."""
    lengths = [float(re.search(rf"_cell_length_{x}\s+(\S+)", cif)[1]) for x in "abc"]
    angles = [float(re.search(rf"_cell_angle_{x}\s+(\S+)", cif)[1]) for x in ("alpha", "beta", "gamma")]
    atoms = re.findall(r"^\s+([A-Z][a-z]?)\s+\S+\s+1\s+(\S+)\s+(\S+)\s+(\S+)\s+1\s*$", cif, re.M)
    return Crystal(lengths, angles, [ELEMENTS.index(a[0]) for a in atoms], [a[1:] for a in atoms])
