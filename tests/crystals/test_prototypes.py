"""The embedded set: distinct, sound, with the symmetry that it states and the sizes that nature has."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import spglib
from pymatgen.core import Composition

from jaxcrystal.crystals.prototypes import decorations, embedded, structure_types

#: Lattice constants from experiment in Å (a, or a and c); none is an example that a table starts from.
MEASURED = {
    ("rock salt", "MgO"): 4.212,
    ("rock salt", "KCl"): 6.293,
    ("rock salt", "PbS"): 5.936,
    ("caesium chloride", "CsBr"): 4.286,
    ("zinc blende", "GaAs"): 5.653,
    ("zinc blende", "CdTe"): 6.482,
    ("fluorite", "BaF2"): 6.200,
    ("fluorite", "CeO2"): 5.411,
    ("antifluorite", "Na2O"): 5.55,
    ("rutile", "SnO2"): (4.737, 3.186),
    ("rutile", "MgF2"): (4.621, 3.052),
    ("corundum", "Cr2O3"): (4.961, 13.599),
    ("perovskite", "BaTiO3"): 4.00,
    ("perovskite", "KMgF3"): 3.989,
    ("spinel", "ZnGa2O4"): 8.335,
    ("spinel", "MgCr2O4"): 8.333,
    ("double perovskite", "Cs2NaYF6"): 9.06,
    ("wurtzite", "GaN"): (3.189, 5.185),
    ("full Heusler", "MnGaNi2"): 5.825,
    ("Laves, cubic", "YFe2"): 7.363,
    ("copper three gold", "AlNi3"): 3.572,
    ("A15", "Nb3Sn"): 5.290,
    ("titanium diboride", "ZrB2"): (3.169, 3.530),
    ("face-centred cubic", "Al"): 4.050,
    ("body-centred cubic", "W"): 3.165,
}


@pytest.fixture(scope="module")
def by_type() -> dict:
    found = defaultdict(list)
    for crystal in embedded():
        found[crystal.prototype].append(crystal)
    return found


def symmetry(each):
    structure = each.crystal.to_structure()
    return spglib.get_symmetry_dataset((structure.lattice.matrix, structure.frac_coords, each.crystal.species), 0.01)


def test_at_least_25_types_and_5000_distinct_crystals(by_type):
    assert len(by_type) == len(structure_types()) >= 25
    names = Counter((c.prototype, c.formula) for c in embedded())
    assert len(names) >= 5000 and set(names.values()) == {1}
    assert max(len(c.crystal) for c in embedded()) <= 20


def test_twice_the_same():
    again = [c for t in structure_types() for c in decorations(t)]
    assert [c.formula for c in again] == [c.formula for c in embedded()]
    assert all(a.crystal == b.crystal for a, b in zip(again, embedded(), strict=True))


def test_every_crystal_is_sound():
    """No atoms closer than a nitrogen molecule's two, the nearest images of an atom included."""
    for each in embedded():
        structure = each.crystal.to_structure()
        apart = structure.distance_matrix + 99 * np.eye(len(structure))
        assert min(apart.min(), *structure.lattice.abc) > 1.09, each.formula
        assert Composition(dict(Counter(each.crystal.symbols))).reduced_formula == each.formula


@pytest.mark.parametrize("structure_type", structure_types(), ids=lambda t: t.name)
def test_spglib_finds_the_stated_space_group(structure_type, by_type):
    crystals = by_type[structure_type.name]
    for each in crystals[:: max(1, len(crystals) // 8)]:
        assert symmetry(each).number == structure_type.spacegroup == each.spacegroup, each.formula
    assert Composition(structure_type.example).reduced_formula in {c.formula for c in crystals}


@pytest.mark.parametrize(("compound", "constants"), MEASURED.items(), ids=str)
def test_sizes_are_natures(compound, constants, by_type):
    """Conventional lattice constants within 6 % of experiment."""
    prototype, formula = compound
    wanted = Composition(formula)
    (each,) = [c for c in by_type[prototype] if Composition(c.formula).almost_equals(wanted.reduced_composition)]
    dataset = symmetry(each)
    a, _, c = np.linalg.norm(dataset.std_lattice, axis=1)
    expected = constants if isinstance(constants, tuple) else (constants, constants)
    np.testing.assert_allclose((a, c), expected, rtol=0.06)


def test_every_element_of_a_compound_is_there_alone():
    """The hull of the set has all its corners."""
    elements = {symbol for each in embedded() for symbol in each.crystal.symbols}
    alone = {each.crystal.symbols[0] for each in embedded() if len(set(each.crystal.symbols)) == 1}
    assert elements == alone and len(elements) > 70


def test_many_of_them_exist(shared):
    """Formula and space group of over a thousand are in MP-20 train, with the volume that they have there."""
    import pandas as pd
    from some_crystals import p1_crystal

    table = pd.read_parquet(shared / "data/mp20/train.parquet")
    wanted = {(each.formula, each.spacegroup): each for each in embedded()}
    errors = []
    for row in table.to_dict("records"):
        if each := wanted.get((row["pretty_formula"], row["spacegroup.number"])):
            real = p1_crystal(row["cif"])
            errors.append(each.crystal.volume / len(each.crystal) / (real.volume / len(real)) - 1)
    assert len(errors) > 1000
    assert abs(np.median(errors)) < 0.04 and np.median(np.abs(errors)) < 0.06
