"""Groups against pymatgen's matcher, pair by pair."""

import itertools

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.evaluation.likeness.uniqueness import group_ids, matcher, matches
from jaxcrystal.reader.reading import read


def salt(edge=5.69, symbols=("Na", "Cl")):
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), symbols, [[0, 0, 0], [0.5, 0.5, 0.5]])


def variants():
    """Rock salt in five guises, then what is not rock salt."""
    moved = salt()
    moved.translate_sites(range(len(moved)), [0.13, 0.27, 0.41])
    shaken = salt()
    shaken.perturb(0.03)
    caesium = Structure(Lattice.cubic(4.12), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    same = [salt(), salt().get_primitive_structure(), salt().make_supercell([2, 1, 1]), moved, shaken]
    return [Crystal.from_structure(s) for s in [*same, caesium, salt(symbols=("K", "Cl")), caesium]]


def test_the_same_crystal_in_any_guise_is_one_group():
    crystals = variants()
    assert group_ids(crystals) == [0, 0, 0, 0, 0, 1, 2, 1]
    assert group_ids([None, *crystals[:2], None]) == [None, 0, 0, None]
    assert group_ids([]) == []


def test_groups_equal_the_matcher_pair_by_pair(shared):
    samples = read(shared / "data/generated/diffcsp_mp20.parquet", limit=390).rows
    crystals = [sample.crystal for sample in samples] + variants()
    crystals += crystals[:20]
    groups, same = group_ids(crystals), matcher()
    structures = [crystal.to_structure() for crystal in crystals]
    together = 0
    for i, j in itertools.combinations(range(len(crystals)), 2):
        if structures[i].composition.reduced_formula == structures[j].composition.reduced_formula:
            assert (groups[i] == groups[j]) == same.fit(structures[i], structures[j])
            together += 1
        else:
            assert groups[i] != groups[j]
    assert together > 30


def test_how_much_longer_is_the_same():
    """A cube stretched by x along one axis and scaled to its volume is longer by (1 + x)^⅔: by 0.185, and by 0.22."""
    cube, longer, too_long = (
        Crystal([4, 4, c], [90] * 3, [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]]) for c in (4, 5.16, 5.39)
    )
    assert group_ids([cube, longer]) == [0, 0] and group_ids([cube, too_long]) == [0, 1]
    assert matches([too_long, longer], [cube]) == [None, 0]


def test_what_is_known_is_named():
    crystals = variants()
    training = [crystals[6], None, crystals[5], crystals[1]]
    assert matches([crystals[0], None, crystals[5], crystals[6]], training) == [3, None, 2, 0]
    assert matches([crystals[0]], [crystals[5], None]) == [None]


def test_order_does_not_change_which_are_together():
    crystals = variants()
    order = np.random.default_rng(0).permutation(len(crystals))
    groups, shuffled = group_ids(crystals), group_ids([crystals[i] for i in order])
    for (i, a), (j, b) in itertools.combinations(enumerate(order), 2):
        assert (shuffled[i] == shuffled[j]) == (groups[a] == groups[b])


def test_decisions_equal_pymatgens_on_500_distorted_pairs():
    """Real structure types, each with copies strained and shaken up to and beyond what is taken for the same."""
    generator = np.random.default_rng(5)
    types = [entry.crystal.to_structure() for entry in embedded() if 2 <= len(entry.crystal) <= 4]
    theirs = StructureMatcher(ltol=0.2, stol=0.3, angle_tol=5)
    decisions = []
    for structure in types[:: len(types) // 50][:50]:
        for _ in range(10):
            strain = generator.normal(0, 0.12, (3, 3)) * generator.random()
            shaken = generator.normal(0, 0.25, (len(structure), 3)) * generator.random()
            size = (structure.volume / len(structure)) ** (1 / 3)
            lattice = Lattice(structure.lattice.matrix @ (np.eye(3) + strain))
            coords = structure.frac_coords + lattice.get_fractional_coords(shaken * size)
            order = generator.permutation(len(structure))
            other = Structure(lattice, [structure.species[i] for i in order], coords[order])
            a, b = Crystal.from_structure(structure), Crystal.from_structure(other)
            ours = group_ids([a, b]) == [0, 0] if len(decisions) % 2 else matches([a], [b]) == [0]
            assert ours == theirs.fit(a.to_structure(), b.to_structure()), structure.formula
            decisions.append(ours)
    assert len(decisions) == 500 and 100 < sum(decisions) < 400
