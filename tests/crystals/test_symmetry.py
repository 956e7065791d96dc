"""Proof that the symmetrised CIF is the crystal: other readers find in it the same atoms and the same space group."""

import warnings
from collections import Counter
from functools import cache

import ase.io
import moyopy
import numpy as np
import pandas as pd
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from pymatgen.io.cif import CifParser
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from some_crystals import p1_crystal

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.descriptions import _maps
from jaxcrystal.crystals.prototypes import StructureType, decorations, structure_types
from jaxcrystal.crystals.symmetric import Orbit
from jaxcrystal.crystals.symmetry import Symmetrized, space_group, symmetrize
from jaxcrystal.crystals.wyckoff import cosets
from jaxcrystal.errors import UserError

SYMPREC = 0.1

CENTROSYMMETRIC = """\
# refined by moyo {version} with symprec 0.1 Angstrom
data_CaO2
_space_group_name_H-M_alt 'P -1'
_space_group_name_Hall '-P 1'
_space_group_IT_number 2
_cell_length_a 4
_cell_length_b 5
_cell_length_c 6
_cell_angle_alpha 95
_cell_angle_beta 100
_cell_angle_gamma 105
loop_
_space_group_symop_id
_space_group_symop_operation_xyz
1 'x, y, z'
2 '-x, -y, -z'
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_symmetry_multiplicity
_atom_site_Wyckoff_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Ca Ca0 1 a 0 0 0 1
O O1 2 i 0.31 0.22 0.1275 1
"""


def read(cif: str) -> Structure:
    """By pymatgen, which shall move no coordinate to a special position near by."""
    parser = CifParser.from_str(cif, frac_tolerance=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (structure,) = parser.parse_structures(primitive=False)
    assert structure.is_ordered
    return structure


def distinct(points: np.ndarray) -> np.ndarray:
    """Without those that lie on an earlier one, in fractional coordinates."""
    away = points[:, None] - points[None]
    same = (np.abs(away - np.round(away)) < 1e-6).all(-1)
    return points[same.argmax(-1) == np.arange(len(points))]


def matched(points: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """The nearest target of every point in fractional coordinates, and the largest distance."""
    away = points[:, None] - targets[None]
    away = np.abs(away - np.round(away)).max(-1)
    return away.argmin(-1), float(away.min(-1).max())


def orbit(found: Symmetrized, site: Orbit) -> np.ndarray:
    """Images of an atom under the operations, each once."""
    return distinct(found.crystal.group.operations.images(np.array(site.frac_coords)))


def crystal_of_lattice(lattice: np.ndarray, species, coords) -> Crystal:
    lengths = np.linalg.norm(lattice, axis=1)
    cosines = lattice @ lattice.T / np.outer(lengths, lengths)
    return Crystal(lengths, np.degrees(np.arccos(cosines[[1, 0, 0], [2, 2, 1]])), species, coords)


@cache
def examples() -> dict[str, tuple[StructureType, Crystal]]:
    """The first decoration of every structure type, by its name."""
    return {t.name: (t, next(decorations(t)).crystal) for t in structure_types()}


def crystal_with_group(hall: int) -> tuple[Crystal, list[int]]:
    """A random crystal in one of spglib's 530 settings of the space groups; a few orbits, each of its own element."""
    rng = np.random.default_rng(hall)
    operations = spglib.get_symmetry_from_database(hall)
    rotations, translations = operations["rotations"], operations["translations"]
    vectors = np.diag(rng.uniform(6, 12, 3)) + rng.uniform(-2, 2, (3, 3))
    metric = np.mean([r.T @ vectors @ vectors.T @ r for r in rotations], axis=0)
    general = 3 if len(rotations) <= 8 else 2 if len(rotations) <= 48 else 1
    points = [np.zeros(3), *rng.random((general, 3))]
    orbits = [distinct(rotations @ point + translations) for point in points]
    species = np.repeat(20 + np.arange(len(orbits)), [len(images) for images in orbits])
    crystal = crystal_of_lattice(np.linalg.cholesky(metric), species, np.concatenate(orbits))
    return crystal, [len(images) / len(rotations) for images in orbits]


def multiplicity(found: Symmetrized, site: Orbit) -> int:
    return found.crystal.position(site).multiplicity


def test_every_space_group_in_every_setting():
    """The group is found, with orbits of the right size; pymatgen reads all the atoms."""
    seen = set()
    for hall in range(1, 531):
        crystal, fractions = crystal_with_group(hall)
        found = symmetrize(crystal, 1e-4)
        here = found.crystal.group
        assert here.number == spglib.get_spacegroup_type(hall).number, hall
        sites = found.crystal.orbits
        assert sorted(multiplicity(found, s) / len(here.operations) for s in sites) == sorted(fractions), hall
        assert [len(orbit(found, site)) for site in sites] == [multiplicity(found, site) for site in sites], hall
        if here.number not in seen:
            seen.add(here.number)
            read_back = read(found.to_cif())
            assert len(read_back) == sum(multiplicity(found, site) for site in sites)
            assert SpacegroupAnalyzer(read_back, 1e-4, angle_tolerance=-1).get_space_group_number() == here.number
    assert len(seen) == 230


@cache
def real_crystals(shared) -> list[tuple[str, Crystal, int]]:
    """Crystals of MP-20, at most two of a space group: id, crystal, space group as Materials Project has it."""
    table = pd.read_parquet(shared / "data/mp20/test.parquet").groupby("spacegroup.number").head(2)[:220]
    return [(row["material_id"], p1_crystal(row["cif"]), row["spacegroup.number"]) for row in table.to_dict("records")]


def rounded(crystal: Crystal) -> Crystal:
    """As a model writes it."""
    return Crystal(crystal.lengths.round(1), crystal.angles.round(0), crystal.species, np.round(crystal.frac_coords, 2))


def test_real_crystals_have_the_group_that_materials_project_states(shared):
    """All but four of 220; and of those that are rounded as a model writes them as many as spglib finds, or more."""
    crystals = real_crystals(shared)
    assert len(crystals) == 220 and len({number for *_, number in crystals}) > 100
    found = [space_group(crystal) for _, crystal, _ in crystals]
    assert found == [symmetrize(crystal, SYMPREC).crystal.space_group for _, crystal, _ in crystals]
    assert sum(number != stated for number, (*_, stated) in zip(found, crystals, strict=True)) <= 4
    right = {"ours": 0, "spglib's": 0}
    for _, crystal, stated in crystals:
        ours = symmetrize(rounded(crystal), SYMPREC).crystal.space_group
        analyzer = SpacegroupAnalyzer(rounded(crystal).to_structure(), SYMPREC, angle_tolerance=-1)
        right["ours"] += ours == stated
        right["spglib's"] += analyzer.get_space_group_number() == stated
    assert right["ours"] >= right["spglib's"]


@pytest.mark.parametrize("written", [lambda crystal: crystal, rounded], ids=["exact", "rounded"])
def test_real_crystals_against_pymatgen(shared, written):
    """Composition, density, group and positions of what pymatgen reads in our CIF, beside what it refines by itself."""
    systems, furthest, others = set(), 0.0, 0
    for name, crystal, _ in real_crystals(shared):
        structure = written(crystal).to_structure()
        found = symmetrize(written(crystal), SYMPREC)
        read_back, refined = read(found.to_cif()), SpacegroupAnalyzer(structure, SYMPREC, angle_tolerance=-1)
        systems.add(refined.get_crystal_system())
        assert read_back.composition.reduced_formula == structure.composition.reduced_formula, name
        assert len(read_back) == sum(multiplicity(found, site) for site in found.crystal.orbits)
        assert SpacegroupAnalyzer(read_back, 1e-3, angle_tolerance=-1).get_space_group_number() == (
            found.crystal.space_group
        ), name
        if found.crystal.space_group != refined.get_space_group_number():
            others += 1
            continue
        conventional = refined.get_refined_structure()
        assert found.crystal.group.symbol.replace(" ", "") == refined.get_space_group_symbol(), name
        assert read_back.composition == conventional.composition, name
        assert read_back.volume == pytest.approx(conventional.volume, rel=0.02), name
        _, far = StructureMatcher().get_rms_dist(structure, read_back)
        furthest = max(furthest, far * (structure.volume / len(structure)) ** (1 / 3))
    assert len(systems) == 7
    assert furthest < SYMPREC
    assert others <= 22


def test_letters_are_those_of_the_written_setting(shared):
    """spglib, given the crystal in the setting in which we write it, names its orbits as we do."""
    same = 0
    for name, crystal, _ in real_crystals(shared)[::4]:
        found = symmetrize(crystal, SYMPREC)
        read_back = read(found.to_cif())
        cell = read_back.lattice.matrix, read_back.frac_coords, read_back.atomic_numbers
        hall = next(
            h
            for h in range(1, 531)
            if spglib.get_spacegroup_type(h).number == found.crystal.space_group
            and spglib.get_spacegroup_type(h).hall_symbol == found.crystal.group.hall_symbol
        )
        again = spglib.get_symmetry_dataset(cell, 1e-3, hall_number=hall)
        shift = again.origin_shift - np.round(again.origin_shift)
        if np.allclose(again.transformation_matrix, np.eye(3), atol=1e-5) and np.allclose(shift, 0, atol=1e-5):
            same += 1
            (atoms, _) = matched(np.array([site.frac_coords for site in found.crystal.orbits]), read_back.frac_coords)
            assert [again.wyckoffs[i] for i in atoms] == [site.letter for site in found.crystal.orbits], name
    assert same > 15


@pytest.mark.parametrize("name", examples())
def test_wyckoff_positions_of_the_structure_types(name):
    """As the literature has them (prototypes.py), up to a choice of origin that nothing in the crystal decides."""
    structure_type, crystal = examples()[name]
    found = symmetrize(crystal, 0.01)

    number = found.crystal.space_group

    def through(coset: int, letter: str) -> str:
        linear, shift = cosets(number)[coset]
        return _maps(number, letter, linear.tobytes(), shift.tobytes())[0]

    stated = [site.wyckoff[-1] for site in structure_type.sites]
    ours = sorted([site.letter for site in found.crystal.orbits])
    assert any(sorted([through(i, letter) for letter in stated]) == ours for i in range(len(cosets(number))))
    multiplicities = sorted(int(site.wyckoff[:-1]) for site in structure_type.sites)
    assert sorted(multiplicity(found, site) for site in found.crystal.orbits) == multiplicities


@pytest.mark.parametrize("name", ["rock salt", "rutile", "calcite", "wurtzite", "spinel", "selenium", "scheelite"])
def test_ase_reads_the_same_atoms(name, tmp_path):
    found = symmetrize(examples()[name][1], 0.01)
    (tmp_path / "x.cif").write_text(found.to_cif())
    by_ase, by_pymatgen = ase.io.read(tmp_path / "x.cif"), read(found.to_cif())
    assert by_ase.info["spacegroup"].no == found.crystal.space_group
    atoms, distance = matched(by_ase.get_scaled_positions(), by_pymatgen.frac_coords)
    assert distance < 3e-8 and sorted(atoms) == list(range(len(by_pymatgen)))
    assert [by_pymatgen[i].specie.Z for i in atoms] == by_ase.numbers.tolist()


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(examples())), seed=st.integers(0, 2**32 - 1))
def test_the_group_outlives_what_symprec_forgives(name, seed):
    """Another cell, origin and order of atoms, and every atom moved by 0.02 Å: the same group, the same orbits; or,
    rarely, a subgroup."""
    rng = np.random.default_rng(seed)
    crystal = examples()[name][1]
    exact = symmetrize(crystal, 0.01)
    basis = np.eye(3, dtype=int)
    for _ in range(3):
        i, j = rng.choice(3, 2, replace=False)
        basis[i] += rng.choice([-1, 1]) * basis[j]
    lattice = crystal.to_structure().lattice.matrix
    moves = rng.normal(size=(len(crystal), 3))
    moves *= 0.02 * rng.random((len(crystal), 1)) / np.linalg.norm(moves, axis=1, keepdims=True)
    coords = crystal.frac_coords + moves @ np.linalg.inv(lattice) + rng.random(3)
    order = rng.permutation(len(crystal))
    moved = crystal_of_lattice(basis @ lattice, crystal.species[order], (coords @ np.linalg.inv(basis))[order])

    found = symmetrize(moved, SYMPREC)
    if found.crystal.space_group != exact.crystal.space_group:
        assert len(found.crystal.group.operations) / found.crystal.group.centring < (
            len(exact.crystal.group.operations) / exact.crystal.group.centring
        )
        return
    assert [(s.symbol, s.letter) for s in found.crystal.orbits] == [(s.symbol, s.letter) for s in exact.crystal.orbits]
    np.testing.assert_allclose(found.crystal.lengths, exact.crystal.lengths, atol=0.05)
    read_back = read(found.to_cif())
    assert read_back.volume / len(read_back) == pytest.approx(crystal.volume / len(crystal), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_a_crystal_without_symmetry_keeps_all_its_atoms(seed, atoms):
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(5, 9, 3)) + rng.uniform(-1, 1, (3, 3))
    crystal = crystal_of_lattice(lattice, rng.permutation(np.arange(3, 3 + atoms)), rng.random((atoms, 3)))
    found = symmetrize(crystal, 0.001)
    assert (found.crystal.space_group, found.crystal.group.symbol) == (1, "P 1")
    assert sorted(site.symbol for site in found.crystal.orbits) == sorted(crystal.symbols)
    assert {site.letter for site in found.crystal.orbits} == {"a"}
    read_back = read(found.to_cif())
    assert read_back.volume == pytest.approx(crystal.volume, rel=1e-6)
    distances, expected = (np.sort(s.distance_matrix, axis=None) for s in (read_back, crystal.to_structure()))
    np.testing.assert_allclose(distances, expected, atol=1e-5)


@st.composite
def crystals_of_few_decimals(draw) -> Crystal:
    """Like a model's: repeated lengths, special angles, coordinates on a coarse grid; atoms may lie on each other."""
    lengths = draw(st.lists(st.sampled_from([3.0, 4.2, 5.1]), min_size=3, max_size=3))
    angles = draw(st.sampled_from([(90, 90, 90), (90, 90, 120), (60, 60, 60), (90, 105, 90), (80, 95, 101)]))
    atoms = draw(st.integers(1, 8))
    grid = st.integers(0, 11).map(lambda k: round(k / 12, 2))
    coords = draw(st.lists(st.tuples(grid, grid, grid), min_size=atoms, max_size=atoms))
    return Crystal(lengths, angles, draw(st.lists(st.sampled_from([8, 22]), min_size=atoms, max_size=atoms)), coords)


@settings(max_examples=120, deadline=None)
@given(crystals_of_few_decimals())
def test_a_refined_crystal_has_its_atoms_on_its_orbits(crystal):
    """What a model may write: no group, or orbits of the stated sizes, with the crystal's composition and density."""
    found = symmetrize(crystal, SYMPREC)
    if found is None:  # atoms of one element lie on each other, nearly always
        return
    sites = found.crystal.orbits
    assert [len(orbit(found, site)) for site in sites] == [multiplicity(found, site) for site in sites]
    assert all(0 <= x < 1 for site in sites for x in site.frac_coords)
    count = Counter()
    for site in sites:
        count[site.symbol] += multiplicity(found, site)
    cells = count.total() / len(crystal)
    assert count == {symbol: n * cells for symbol, n in Counter(crystal.symbols).items()}
    refined = Crystal(found.crystal.lengths, found.crystal.angles, [1], [[0, 0, 0]])
    assert refined.volume / cells == pytest.approx(crystal.volume, rel=0.15)


def test_the_text():
    """An inversion centre, found with one atom 0.03 Å off it; sites in the order of texts."""
    coords = [[0.31, 0.22, 0.13], [0.69, 0.78, 0.875], [0, 0, 0]]
    crystal = Crystal([4, 5, 6], [95, 100, 105], [8, 8, 20], coords)
    found = symmetrize(crystal)
    assert found.to_cif() == CENTROSYMMETRIC.format(version=moyopy.__version__)
    assert 0.005 < found.moved < 0.03


def test_atoms_that_lie_on_each_other_are_told_apart_or_have_no_group(capfd):
    coincident = Crystal([4] * 3, [90] * 3, [3, 3], [[0, 0, 0], [0, 0, 0.01]])
    found = symmetrize(coincident, SYMPREC)
    assert found.crystal.space_group == 123 and found.symprec < 0.04
    assert symmetrize(Crystal([4] * 3, [90] * 3, [3, 3], [[0, 0, 0], [0, 0, 0]]), SYMPREC) is None
    assert capfd.readouterr() == ("", "")


def test_a_supercell_is_read_in_silence(capfd):
    """moyo would tell of operations that are no integers in the cell that it is given."""
    doubled = Crystal([8, 4, 4], [90] * 3, [3, 3], [[0, 0, 0], [0.5, 0, 0]])
    assert symmetrize(doubled, SYMPREC).crystal.space_group == 221
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("symprec", [0.0, -0.1, float("nan"), float("inf")])
def test_a_tolerance_that_would_end_the_process_is_refused(symprec):
    with pytest.raises(UserError, match=r"symprec is a distance in Å above 0, found"):
        symmetrize(Crystal([4] * 3, [90] * 3, [3], [[0, 0, 0]]), symprec)


def test_the_flattest_cell_has_a_group():
    """A model may write this without the grammar; what float64 takes for flat is no crystal."""
    assert symmetrize(Crystal([1e-3] * 3, [90, 30, 60.0000001], [11], [[0, 0, 0]])).crystal.space_group == 2


def test_more_symmetry_is_operations_or_translations():
    """A cell that is twice as large as it need be hides a translation; one atom of F-43m is Fm-3m."""
    doubled = symmetrize(Crystal([8, 4, 4], [90] * 3, [3, 3], [[0, 0, 0], [0.5, 0, 0]]))
    assert doubled.exceeds(123, 2) and not doubled.exceeds(221, 1)
    alone = symmetrize(Crystal([3] * 3, [60] * 3, [28], [[0, 0, 0]]))
    assert alone.crystal.space_group == 225 and alone.exceeds(216, 1) and not alone.exceeds(225, 1)
