"""Crystals by their symmetry: the tables against independent ones, the crystal against its atoms, and one description
for all ways in which a crystal can be given."""

import ast
from functools import cache
from importlib import resources

import moyopy
import numpy as np
import pandas as pd
import pytest
import spglib
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from symmetric_crystals import random_symmetric

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.crystals.wyckoff import GRID, GROUPS, LETTERS, cosets, free_axes, group, read, written
from jaxcrystal.crystals.wyckoff_tables import cell_vectors, normalizers, positions
from jaxcrystal.errors import UserError


@cache
def listed() -> list[list[list[str]]]:
    """Pyxtal's orbits of each position of each group, the general one first."""
    pytest.importorskip("pyxtal", reason="pyxtal's list of positions is not installed")
    table = pd.read_csv(resources.files("pyxtal") / "database/wyckoff_list.csv")
    return [[], *(ast.literal_eval(table["0"][number]) for number in GROUPS)]


def hall_of(number: int) -> int:
    """Spglib's number of the setting in which our tables stand."""
    ours = {r.tobytes() + t.tobytes() for r, t in group(number).operations}
    for hall in range(1, 531):
        if spglib.get_spacegroup_type(hall).number == number:
            found = spglib.get_symmetry_from_database(hall)
            moves = np.round(found["translations"] * GRID).astype(np.int64) % GRID
            rotations = found["rotations"].astype(np.int64)
            if {r.tobytes() + t.tobytes() for r, t in zip(rotations, moves, strict=True)} == ours:
                return hall
    raise AssertionError(f"spglib has no setting of group {number} with these operations")


def given_otherwise(crystal: Crystal, seed: int) -> Crystal:
    """Another cell, origin and order of atoms."""
    random = np.random.default_rng(seed)
    basis = np.eye(3, dtype=int)
    for _ in range(3):
        i, j = random.choice(3, 2, replace=False)
        basis[i] += random.choice([-1, 1]) * basis[j]
    order = random.permutation(len(crystal))
    coords = (crystal.frac_coords + random.random(3)) @ np.linalg.inv(basis)
    lattice = basis @ crystal.to_structure().lattice.matrix
    return Crystal.from_vectors(lattice, crystal.species[order], coords[order])


def key(crystal: SymmetricCrystal) -> tuple:
    return crystal.space_group, tuple((o.species, o.letter) for o in crystal.orbits)


def assert_same(one: SymmetricCrystal, other: SymmetricCrystal) -> None:
    assert key(one) == key(other)
    np.testing.assert_allclose(one.parameters, other.parameters, rtol=1e-5)
    away = np.array([o.frac_coords for o in one.orbits]) - np.array([o.frac_coords for o in other.orbits])
    assert np.abs(away - np.round(away)).max() < 1e-5


@pytest.mark.parametrize("number", GROUPS)
def test_operations_are_those_of_a_setting_of_spglib(number):
    entry = spglib.get_spacegroup_type(hall_of(number))
    assert entry.hall_symbol == group(number).hall_symbol
    assert entry.choice in ("", "b", "b1", "2", "H")


@pytest.mark.parametrize("number", GROUPS)
def test_positions_are_those_of_another_list(number):
    """Letter by letter: the whole orbit of the first listed representative; and the representative itself."""
    theirs = listed()[number][::-1]
    here = group(number)
    assert [p.letter for p in here.positions] == list(LETTERS[: len(theirs)])
    for position, orbit in zip(here.positions, theirs, strict=True):
        assert position.multiplicity == len(orbit)
        matrix, shift = read(orbit[0].replace(" ", "").replace(",", ";"))
        assert (matrix == position.matrix).all() and (shift == position.shift).all()
        assert written(matrix, shift) == written(position.matrix, position.shift)
        random = np.random.default_rng(number).uniform(0, 1, 3)
        ours = here.operations.images(position.representative(random))
        maps = [read(text.replace(" ", "").replace(",", ";")) for text in orbit]
        images = np.array([(m @ random + s / GRID) % 1 for m, s in maps])
        away = images[:, None] - ours
        together = (np.abs(away - np.round(away)) < 1e-9).all(-1)
        assert together.any(0).all() and (together.sum(1) == len(ours) // len(orbit)).all()


def test_free_parameters_are_coordinates():
    """What makes a text without formulas possible; and the counts that International Tables lead to."""
    positions = [p for number in GROUPS for p in group(number).positions]
    assert np.bincount([p.free.sum() for p in positions]).tolist() == [616, 718, 167, 230]
    for p in positions:
        assert (p.matrix[p.free] == np.eye(3, dtype=int)[p.free]).all() and not p.shift[p.free].any()
        assert (p.matrix[~p.free][:, ~p.free] == 0).all()
    assert sum(len(free_axes(number)) > 0 for number in GROUPS) == 68


def test_tables_are_what_the_script_writes():
    """Of one group in fifteen; and how many cosets all have."""
    for number in GROUPS[::15]:
        here = [(p.letter, p.multiplicity, written(p.matrix, p.shift)) for p in group(number).positions]
        assert positions(number) == here
        assert [written(*each) for each in normalizers(number)] == [written(*each) for each in cosets(number)]
    assert sum(len(cosets(number)) for number in GROUPS) == 1109


@pytest.mark.parametrize("number", GROUPS)
def test_cosets_are_those_of_moyos_normalizer(number):
    """Of a crystal whose letters tell nothing; by number, and each maps the group onto itself."""
    here = group(number)
    known = {r.tobytes() + t.tobytes() for r, t in here.operations}
    for linear, shift in cosets(number):
        assert round(np.linalg.det(linear)) in ((1,) if here.chiral else (1, -1))
        inverse = np.round(np.linalg.inv(linear)).astype(np.int64)
        for rotation, move in here.operations:
            turned = linear @ rotation @ inverse
            moved = (linear @ move + shift - turned @ shift) % GRID
            assert turned.tobytes() + moved.tobytes() in known
    random = np.random.default_rng(number).uniform(0, 1, (3, 3))
    orbits = [np.unique(np.round(here.operations.images(x), 9), axis=0) for x in random]
    species = np.repeat([1, 2, 3], [len(x) for x in orbits])
    cell = moyopy.Cell(cell_vectors(number).tolist(), np.concatenate(orbits).tolist(), species.tolist())
    found = moyopy.MoyoDataset(cell, symprec=1e-4, setting=moyopy.Setting.standard())
    normalizer = found.normalizer_wyckoff_positions(preserve_chirality=True)
    theirs = [*normalizer.stabilizer, *(operation for operation, _ in normalizer.coset_representatives)]
    kept = [axis for axis in range(3) if axis not in free_axes(number)]

    def coset(linear: np.ndarray, shift: np.ndarray) -> frozenset[bytes]:
        return frozenset(
            (r @ linear).astype(np.int64).tobytes() + (((r @ shift + t) % GRID)[kept]).astype(np.int64).tobytes()
            for r, t in here.operations
        )

    ours = {coset(linear, shift) for linear, shift in cosets(number)}
    assert len(ours) == len(cosets(number))
    shifts = [np.round(np.array(operation.origin_shift) * GRID).astype(np.int64) for operation in theirs]
    assert ours == {coset(np.array(o.linear, np.int64), shift) for o, shift in zip(theirs, shifts, strict=True)}


@pytest.mark.parametrize("number", GROUPS)
def test_a_crystal_is_written_and_found_again(number):
    """By its own group or, where random positions happen to have more symmetry, by one of more operations."""
    crystal = random_symmetric(number, 0)
    atoms = crystal.to_crystal()
    assert len(atoms) == sum(crystal.composition.values())
    found = symmetrize(atoms, 1e-4)
    assert found is not None and found.moved < 1e-5
    again = found.crystal
    assert len(again.group.operations) / again.group.centring >= len(crystal.group.operations) / crystal.group.centring
    assert again.space_group == number or number in (1, 2, 5, 8, 12)
    assert StructureMatcher(0.01, 0.01, 0.1, primitive_cell=False).fit(
        atoms.to_structure(), again.to_crystal().to_structure()
    )
    for other in found.descriptions[1:]:
        assert_same(symmetrize(other.to_crystal(), 1e-4).crystal, again)


@settings(max_examples=150, deadline=None)
@given(number=st.sampled_from(GROUPS), seed=st.integers(0, 2**32 - 1))
def test_a_crystal_has_one_canonical_description(number, seed):
    """From any cell, origin and order of atoms."""
    crystal = random_symmetric(number, seed % 1000).to_crystal()
    one = symmetrize(crystal, 1e-4)
    other = symmetrize(given_otherwise(crystal, seed), 1e-4)
    assert_same(one.crystal, other.crystal)
    assert len(one.descriptions) == len(other.descriptions)


def test_real_crystals_have_one_canonical_description(shared):
    rows = pd.read_parquet(shared / "data/mp20/val.parquet", columns=["cif"])["cif"][::200]
    crystals = [Crystal.from_structure(Structure.from_str(cif, "cif")) for cif in rows]
    for seed, crystal in enumerate(crystals):
        one, other = symmetrize(crystal), symmetrize(given_otherwise(crystal, seed))
        assert key(one.crystal) == key(other.crystal)
        np.testing.assert_allclose(one.crystal.parameters, other.crystal.parameters, rtol=1e-3)


def test_a_mirror_image_is_another_crystal_only_in_chiral_groups():
    quartz = random_symmetric(152, 1)
    mirrored = SymmetricCrystal(
        154, quartz.lengths, quartz.angles, tuple(Orbit(o.species, o.letter, o.frac_coords) for o in quartz.orbits)
    )
    assert symmetrize(mirrored.to_crystal(), 1e-4).crystal.space_group == 154
    assert symmetrize(quartz.to_crystal(), 1e-4).crystal.space_group == 152


@pytest.mark.parametrize(
    "number", [1, 2, 4, 5, 9, 19, 33, 62, 82, 92, 122, 144, 152, 166, 173, 186, 198, 212, 217, 225]
)
def test_an_inverted_crystal_is_the_same_where_the_group_has_improper_operations(number):
    """Else it is another, of the same group or of the one that is its mirror image."""
    here, mirror = group(number), {92: 96, 144: 145, 152: 154, 212: 213}
    crystal = random_symmetric(number, 3).to_crystal()
    inverted = Crystal(crystal.lengths, crystal.angles, crystal.species, -crystal.frac_coords % 1)
    one, other = (symmetrize(each, 1e-4).crystal for each in (crystal, inverted))
    if here.chiral:
        assert other.space_group == mirror.get(number, number)
        away = np.array([o.frac_coords for o in one.orbits]) - np.array([o.frac_coords for o in other.orbits])
        assert key(one) != key(other) or np.abs(away - np.round(away)).max() > 1e-3
    else:
        assert_same(one, other)


def cubic(*orbits: Orbit, number: int = 225) -> SymmetricCrystal:
    return SymmetricCrystal(number, np.full(3, 5.0), np.full(3, 90.0), orbits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cubic(Orbit(3, "a", (0, 0, 0)), number=231), "space group 231 does not exist"),
        (lambda: cubic(Orbit(3, "m", (0, 0, 0))), "has positions a to l, not 'm'"),
        (lambda: cubic(Orbit(3, "a", (0, 0, 0)), Orbit(8, "a", (0, 0, 0))), "lie on the same points of a"),
        (lambda: cubic(Orbit(3, "e", (0, 0, 0))), "the orbit of Li on e of space group 225 collapses: it has 1 atoms"),
        (lambda: cubic(Orbit(3, "e", (0.2, 0, 0)), Orbit(8, "e", (0.8, 0, 0))), "Li and O lie on the same points of e"),
        (lambda: cubic(), "at least one orbit"),
        (
            lambda: SymmetricCrystal(225, np.array([5, 5, 6.0]), np.full(3, 90.0), (Orbit(3, "a", (0, 0, 0)),)),
            "is not cubic, as space group 225 is",
        ),
    ],
)
def test_what_is_no_symmetric_crystal(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_composition_and_formula():
    perovskite = cubic(Orbit(8, "c", (0, 0, 0)), Orbit(38, "a", (0, 0, 0)), Orbit(22, "b", (0, 0, 0)), number=221)
    assert perovskite.composition == {"Sr": 1, "Ti": 1, "O": 3} and perovskite.formula == "O3SrTi"
    assert [o.symbol for o in perovskite.sorted().orbits] == ["Sr", "Ti", "O"]
