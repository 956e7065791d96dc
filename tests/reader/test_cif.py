"""What a CIF means: symmetry, special positions, occupancies, stated contents; and what of it is refused."""

import re

import gemmi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.reader.cif import blocks, read_cif
from jaxcrystal.reader.rows import Refused
from jaxcrystal.reader.settings import settings as all_settings

CUBE = (5.64, 5.64, 5.64, 90, 90, 90)
IDENTITY = "loop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'\n"
NACL = ["Na1 Na 0 0 0", "Cl1 Cl 0.5 0.5 0.5"]
CSCL = ["Cs1 Cs 0 0 0", "Cl1 Cl 0.5 0.5 0.5"]


def cif(symmetry="", atoms=NACL, cell=CUBE, columns="", name="a", more=""):
    tags = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = [f"data_{name}", symmetry.rstrip(), *(f"_cell_{tag} {x}" for tag, x in zip(tags, cell, strict=True)), more]
    lines += ["loop_", "_atom_site_label", "_atom_site_type_symbol", *(f"_atom_site_fract_{x}" for x in "xyz")]
    return "\n".join(filter(None, [*lines, *columns.split(), *atoms])) + "\n"


def name(text):
    return f"_symmetry_space_group_name_H-M '{text}'"


def contents(text):
    crystal = read_cif(text).crystal
    return crystal.formula, len(crystal)


@pytest.mark.parametrize(
    ("symmetry", "expected"),
    [
        ("_symmetry_Int_Tables_number 225", ("ClNa", 8)),
        ("_space_group_IT_number 225", ("ClNa", 8)),
        ("_space_group.IT_number 225", ("ClNa", 8)),
        (name("F m -3 m"), ("ClNa", 8)),
        (name("F 4/m -3 2/m"), ("ClNa", 8)),
        ("_space_group_name_H-M_alt 'F m 3 m'", ("ClNa", 8)),
        ("_symmetry_space_group_name_Hall '-F 4 2 3'", ("ClNa", 8)),
        ("_space_group_name_Hall '-F 4 2 3'\n" + name("some name of their own"), ("ClNa", 8)),
        (name("P m -3 m"), ("ClNa", 2)),
        (name("P 1"), ("ClNa", 2)),
        (name("?") + "\n_symmetry_Int_Tables_number 225", ("ClNa", 8)),
        (IDENTITY, ("ClNa", 2)),
        ("", ("ClNa", 2)),
    ],
)
def test_a_group_without_operations_is_carried_out(symmetry, expected):
    found = read_cif(cif(symmetry))
    assert (found.crystal.formula, len(found.crystal)) == expected
    assumed = "no symmetry is stated: the atoms were read as they stand (P1)"
    assert (assumed in found.notes) == (symmetry == "")


@pytest.mark.parametrize(
    ("symmetry", "cell", "reason"),
    [
        (name("F m -3 n"), CUBE, "no Hermann-Mauguin name"),
        (name("P n m a") + "\n_symmetry_Int_Tables_number 225", CUBE, "contradict each other"),
        (name("F m -3 m"), (5.64, 5.64, 6.0, 90, 90, 90), "the cell contradicts"),
        (name("R -3 m"), (*CUBE[:3], 90, 90, 100), "the cell contradicts"),
        (name("F d -3 m"), CUBE, "2 settings of the space group remain .* which are different crystals"),
        ("_symmetry_Int_Tables_number 62", (5, 6, 7, 90, 90, 90), "settings of the space group remain"),
        ("_symmetry_Int_Tables_number 231", CUBE, "run from 1 to 230"),
        (IDENTITY + name("F m -3 m"), CUBE, "only the identity is listed, of space group 1, beside the name F m -3 m"),
        (IDENTITY.rstrip() + "\n'-x, -y, -z'\n" + name("P 1"), CUBE, "of space group 2, which the name P 1 contra"),
        (IDENTITY.rstrip() + "\n'y, z, x'\n", CUBE, "2 listed operations are no group; some are missing"),
        (IDENTITY.rstrip() + "\n'y, x, z'\n", (5, 6, 7, 90, 90, 90), "the cell contradicts the listed operations"),
        (IDENTITY.rstrip() + "\n'2x, y, z'\n", CUBE, "an operation cannot be read"),
        (IDENTITY.rstrip() + "\n'x+y/2, y, z'\n", CUBE, "maps the lattice onto another"),
        ("_cell_modulation_dimension 1", CUBE, "modulated"),
        ("_space_group_magn.number_BNS '62.441'", CUBE, "magnetic"),
    ],
)
def test_a_group_that_is_unknown_ambiguous_or_contradicted_is_never_p1(symmetry, cell, reason):
    with pytest.raises(Refused, match=reason) as refused:
        read_cif(cif(symmetry, cell=cell))
    assert refused.value.outcome == "symmetry_error"


def test_a_complete_list_needs_no_choice_of_setting():
    # All eight atoms of a general position of Pban, which are no orbits with its other origin.
    cell = (5, 6, 7, 90, 90, 90)
    first, second = (s for s in all_settings() if s.number == 50 and s.name.startswith("P 2/b 2/a 2/n"))
    whole = read_cif(cif(name(first.name), ["Fe1 Fe 0.11 0.29 0.37"], cell)).crystal
    atoms = [f"Fe{i} Fe {' '.join(map(str, x))}" for i, x in enumerate(whole.frac_coords)]
    assert contents(cif(name(first.name), atoms, cell)) == contents(cif(name("P b a n"), atoms, cell)) == ("Fe", 8)
    for wrong in (name(second.name), name("P m m m")):
        with pytest.raises(Refused, match="of the listed atoms are images of others"):
            read_cif(cif(wrong, atoms, cell))
    with pytest.raises(Refused, match="an atom is listed twice"):
        read_cif(cif(name(first.name), [*atoms, atoms[0].replace("Fe0", "Fe9")], cell))
    with pytest.raises(Refused, match="different crystals"):
        read_cif(cif(name("P b a n"), atoms[:1], cell))


@pytest.mark.parametrize(
    ("evidence", "columns", "atom"),
    [
        ("_chemical_formula_sum Si\n_cell_formula_units_Z 8", "", "Si1 Si 0 0 0"),
        ("", "_atom_site_symmetry_multiplicity", "Si1 Si 0 0 0 8"),
    ],
)
def test_stated_contents_choose_among_settings(evidence, columns, atom):
    # At 0 0 0 are eight atoms with the first origin of Fd-3m, sixteen with the second.
    text = cif(name("F d -3 m"), [atom], (5.43,) * 3 + (90,) * 3, columns, more=evidence)
    assert contents(text) == ("Si", 8)


def test_a_complete_list_under_a_groups_name_is_read_as_it_stands():
    whole = Structure.from_spacegroup(225, Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    atoms = [f"{s.specie}{i} {s.specie} {' '.join(map(str, s.frac_coords))}" for i, s in enumerate(whole)]
    found = read_cif(cif(IDENTITY + name("F m -3 m"), atoms))
    assert len(found.crystal) == 8 and any("every atom" in note for note in found.notes)
    primitive = Structure(Lattice.from_parameters(4, 4, 4, 60, 60, 60), ["Na", "Cl"], [[0] * 3, [0.5] * 3])
    atoms = [f"{s.specie}{i} {s.specie} {' '.join(map(str, s.frac_coords))}" for i, s in enumerate(primitive)]
    assert contents(cif(IDENTITY + name("F m -3 m"), atoms, (4, 4, 4, 60, 60, 60))) == ("ClNa", 2)
    with pytest.raises(Refused, match=r"of space group 1, beside the name P -1"):
        read_cif(cif(IDENTITY + name("P -1"), ["Na1 Na 0.1 0.2 0.3"], (5, 6, 7, 80, 85, 100)))


def test_without_symmetry_contents_that_the_atoms_do_not_have_are_refused():
    with pytest.raises(Refused, match="no symmetry is stated, but Z = 4 of Na Cl make other than 2 atoms"):
        read_cif(cif(more="_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z 4"))
    atoms = [f"{line} 4" for line in NACL]
    with pytest.raises(Refused, match="multiplicities make 8 atoms of 2"):
        read_cif(cif(atoms=atoms, columns="_atom_site_symmetry_multiplicity"))
    # pymatgen's sum is of the whole cell, whatever Z says.
    assert contents(cif(more="_chemical_formula_sum 'Na1 Cl1'\n_cell_formula_units_Z 1")) == ("ClNa", 2)


@pytest.mark.parametrize("digits", [2, 3, 4, 8])
def test_a_special_position_with_few_digits_is_one_atom(digits):
    # P6_3/mmc, 2c: 1/3 2/3 1/4.
    point = " ".join(f"{x:.{digits}f}" for x in (1 / 3, 2 / 3, 1 / 4))
    found = read_cif(cif(name("P 63/m m c"), [f"Mg1 Mg {point}"], (3.21, 3.21, 5.21, 90, 90, 120)))
    expected = sorted([(1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)])
    assert np.allclose(sorted(map(tuple, found.crystal.frac_coords)), expected, atol=1e-9)
    assert ("positions moved onto the special position near them" in found.notes) == (digits < 4)


@pytest.mark.parametrize(
    ("column", "values", "outcome", "words"),
    [
        ("_atom_site_occupancy", ("1", "."), "ok", "an occupancy that is not stated (. or ?) read as 1"),
        ("_atom_site_occupancy", ("1.0(2)", "?"), "ok", "an occupancy that is not stated (. or ?) read as 1"),
        ("_atom_site_occupancy", ("1", "0.5"), "disordered", "partially occupied: 0.5"),
        ("_atom_site_occupancy", ("1", "0"), "disordered", "partially occupied: 0"),
        ("_atom_site_occupancy", ("1", "1.2"), "disordered", "partially occupied: 1.2"),
        ("_atom_site_occupancy", ("1", "full"), "cif_error", "an occupancy is no number"),
        ("_atom_site_attached_hydrogens", ("0", "."), "ok", None),
        ("_atom_site_attached_hydrogens", ("0", "1"), "missing_atoms", "1 attached hydrogen atoms"),
        ("_atom_site_calc_flag", ("d", "dum"), "disordered", "a dummy"),
        ("_atom_site_disorder_group", (".", "1"), "disordered", "one of"),
    ],
)
def test_columns_beside_the_positions(column, values, outcome, words):
    text = cif(IDENTITY, [f"{line} {value}" for line, value in zip(CSCL, values, strict=True)], columns=column)
    if outcome == "ok":
        found = read_cif(text)
        assert len(found.crystal) == 2 and found.notes == ((words,) if words else ())
    else:
        with pytest.raises(Refused, match=words) as refused:
            read_cif(text)
        assert refused.value.outcome == outcome


@pytest.mark.parametrize(
    ("old", "new", "outcome", "words"),
    [
        ("0.5 0.5 0.5", ". . .", "missing_atoms", "a coordinate is missing"),
        ("0.5 0.5 0.5", "0.5 ? 0.5", "missing_atoms", "a coordinate is missing"),
        ("0.5 0.5 0.5", "0.5 0.5 0,5", "cif_error", "a coordinate is no number: '0,5'"),
        ("0.5 0.5 0.5", "0.5 0.5 1/2", "cif_error", "a coordinate is no number"),
        ("0.5 0.5 0.5", "0.5 0.5 1e999", "not_finite", "a coordinate is not a finite number"),
        ("0.5 0.5 0.5", "0.5 0.5", "cif_error", "[Ww]rong number of values"),
        ("_cell_length_a 5.64", "_cell_length_a ?", "cif_error", "a cell length is missing"),
        ("_cell_length_a 5.64\n", "", "cif_error", "the CIF has no _cell_length_a"),
        ("_cell_length_a 5.64", "_cell_length_a", "cif_error", "_cell_length_a has no value"),
        ("_cell_length_b 5.64", "_cell_length_b 0", "cell_error", "lengths must lie between"),
        ("_cell_angle_beta 90", "_cell_angle_beta 180", "cell_error", "angles must lie between"),
        (
            "_cell_angle_beta 90",
            "_CELL_ANGLE_BETA 90\n_cell_angle_beta 91",
            "cif_error",
            "occurs twice, with different",
        ),
        ("Cl1 Cl", "Cl1 Wat", "unknown_element", "'Wat' is no chemical element"),
        ("Cl1 Cl", "Cl1 .", "unknown_element", "a site's element is missing"),
        ("data_a", "", "cif_error", "expected block header"),
        ("'x, y, z'", "'x, y, z", "cif_error", "unterminated"),
        ("_atom_site_fract_", "_atom_site_Cartn_", "cif_error", "Cartesian coordinates only"),
    ],
)
def test_a_broken_cif_says_what_is_wrong(old, new, outcome, words):
    text = cif(IDENTITY, CSCL)
    assert old in text
    with pytest.raises(Refused, match=words) as refused:
        read_cif(text.replace(old, new))
    assert refused.value.outcome == outcome


@pytest.mark.parametrize(
    ("old", "new", "formula", "note"),
    [
        ("Cs1 Cs", "CS1 CS", "ClCs", "symbol CS read as Cs"),
        ("Cs1 Cs", "Cs1 Cs1+", "ClCs", "oxidation states are not kept"),
        ("Cs1 Cs", "Cs1 Cs+1", "ClCs", "oxidation states are not kept"),
        ("Cs1 Cs", "D1 D", "ClH", "deuterium (D) read as hydrogen"),
        ("Cs1 Cs", "C1 13C", "CCl", "mass numbers of isotopes are not kept"),
        ("Cl 0.5 0.5 0.5", "Cl -0.5 0.5 1.5", "ClCs", "coordinates moved into the cell by whole edges"),
        ("Cl 0.5 0.5 0.5", "Cl .5 5.0E-1 +.5(3)", "ClCs", None),
        ("data_a", "\ufeffdata_a", "ClCs", None),
        ("data_a", "data_a\n_journal_name 'Zeitschrift für Kristallographie'", "ClCs", None),
        ("Cl1 Cl 0.5", "Cl1\u00a0Cl \u22120.5", "ClCs", "coordinates moved into the cell by whole edges"),
        ("_cell_length_a 5.64", "_CELL_LENGTH_A 5.64(2)", "ClCs", None),
        ("_atom_site_", "_ATOM_SITE.", "ClCs", None),
        ("data_a", "data_a\n_cell_volume 100.0", "ClCs", "the stated volume is not the cell's, and was not used"),
        ("data_a", "data_a\n_chemical_formula_sum 'CS CL'", "ClCs", None),
        (
            "data_a",
            "data_a\n_chemical_formula_sum 'some salt'",
            "ClCs",
            "the stated formula cannot be read, and was not compared",
        ),
        ("data_a", "data_a\n_cell_angle_alpha 90", "ClCs", None),
    ],
)
def test_what_is_read_and_noted(old, new, formula, note):
    text = cif(IDENTITY, CSCL)
    assert old in text
    found = read_cif(text.replace(old, new))
    assert found.crystal.formula == formula and found.notes == ((note,) if note else ())


@pytest.mark.parametrize(
    ("tag", "stated", "agrees"),
    [
        ("_chemical_formula_sum", "'Cs1 Cl1'", True),
        ("_chemical_formula_sum", "'Cs4 Cl4'", True),
        ("_chemical_formula_sum", "CsCl", True),
        ("_chemical_formula_sum", "'Cs Cl H'", False),
        ("_chemical_formula_sum", "'Cs Cl2'", False),
        ("_chemical_formula_sum", "'Cs'", False),
        ("_chemical_formula_sum", "'Cs0.95 Cl'", False),
        ("_chemical_formula_structural", "CsClH2", False),
        ("_chemical_formula_structural", "'[Cs]Cl'", True),
        ("_chemical_formula_moiety", "'Cs Cl O'", False),
    ],
)
def test_the_stated_formula_is_compared(tag, stated, agrees):
    text = cif(IDENTITY, CSCL, more=f"{tag} {stated}")
    if agrees:
        assert contents(text) == ("ClCs", 2)
    else:
        with pytest.raises(Refused, match=r"the CIF states .*, its atoms are Cl1 Cs1") as refused:
            read_cif(text)
        assert refused.value.outcome == "formula_mismatch"


def test_labels_are_read_where_there_are_no_types():
    text = cif(IDENTITY, CSCL).replace("_atom_site_type_symbol\n", "")
    assert contents(text.replace("Cs1 Cs", "Cs(1)").replace("Cl1 Cl", "Cl12A")) == ("ClCs", 2)
    with pytest.raises(Refused, match="'OW1' is no chemical element"):
        read_cif(text.replace("Cs1 Cs", "Cs1").replace("Cl1 Cl", "OW1"))


def test_blocks():
    one, two = cif(IDENTITY, CSCL, name="one"), cif(IDENTITY, NACL, name="two")
    remarks = "data_global\n_journal_name 'x'\n"
    assert blocks(one) == [None] == blocks(remarks + one) and blocks(one + two) == ["one", "two"]
    assert contents(remarks + one) == ("ClCs", 2)
    assert read_cif(one + two, "two").crystal.formula == "ClNa"
    with pytest.raises(Refused, match=r"holds 2 structures \(one, two\), expected one"):
        read_cif(one + two)
    with pytest.raises(Refused, match="two blocks of the CIF have the name 'one'"):
        read_cif(one + cif(IDENTITY, NACL, name="ONE"))


def general_cell(rotations):
    """Lengths and angles of a cell of some 300 Å³ that the rotations leave alone and that is no more special."""
    start = np.diag([6.0, 7.1, 8.3]) @ np.array([[1, 0.05, 0.02], [0.04, 1, 0.07], [0.1, 0.03, 1]])
    metric = np.einsum("nji,jk,nkl->il", rotations, start @ start.T, rotations) / len(rotations)
    lattice = Lattice(np.linalg.cholesky(metric))
    return *lattice.abc, *lattice.angles


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(all_settings()),
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.11, 0.29])] * 3), min_size=1, max_size=2, unique=True),
    st.booleans(),
)
def test_orbits_are_pymatgens_of_the_same_operations(setting, points, listed):
    """Every setting, by its name and number or by its operations in any order, against pymatgen's of its operations."""
    rotations, translations = setting.operations.rotations, setting.operations.translations
    cell = general_cell(rotations)
    triplets = [gemmi.Op() for _ in rotations]
    for op, rotation, shift in zip(triplets, rotations, translations, strict=True):
        op.rot, op.tran = (24 * rotation).tolist(), np.round(24 * shift).astype(int).tolist()
    symmetry = f"{name(setting.name)}\n_symmetry_Int_Tables_number {setting.number}"
    if listed:
        symmetry += "\nloop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(f"'{op.triplet()}'" for op in triplets[::-1])
    symbols = ["Fe", "O"][: len(points)]
    atoms = [f"X{i} {s} {' '.join(map(str, p))}" for i, (s, p) in enumerate(zip(symbols, points, strict=True))]
    try:
        found = read_cif(cif(symmetry, atoms, cell)).crystal
    except Refused as refused:
        words = "Å apart|share a site" if listed else "different crystals|Å apart|share a site"
        assert re.search(words, refused.reason)
        return
    lattice, expected = Lattice.from_parameters(*cell), []
    for symbol, point in zip(symbols, np.array(points), strict=True):
        orbit: list[np.ndarray] = []
        for image in (rotations @ point + translations) % 1:
            if not orbit or lattice.get_all_distances([image], orbit).min() > 0.05:
                orbit.append(image)
        expected += [(symbol, image) for image in orbit]
    assert len(found) == len(expected)
    ours = Structure(lattice, found.symbols, found.frac_coords)
    theirs = Structure(lattice, [s for s, _ in expected], [x for _, x in expected])
    assert ours.composition == theirs.composition
    apart = lattice.get_all_distances(ours.frac_coords, theirs.frac_coords)
    same = np.array([[a.specie == b.specie for b in theirs] for a in ours])
    assert np.where(same, apart, np.inf).min(axis=1).max() < 1e-3
    assert isinstance(found, Crystal)


@pytest.mark.parametrize(
    ("symmetry", "more", "atoms", "columns", "reason"),
    [
        # Statements that are not understood, and those that contradict the contents, never end in P1.
        (IDENTITY + name("Fm-3m and more") + "\n_symmetry_Int_Tables_number 225", "", NACL, "", "of space group 1"),
        (IDENTITY + name("some words"), "", NACL, "", "only the identity is listed, and 'some words' is no Hermann"),
        (name("P 1"), "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z 4", NACL, "", "Z = 4 of Na Cl make other"),
        (
            IDENTITY,
            "",
            [f"{a} 4" for a in NACL],
            "_atom_site_symmetry_multiplicity",
            "multiplicities make 8 atoms of 2",
        ),
        ("_space_group_name_Schoenflies 'O_h^5'", "", NACL, "", "stated by _space_group_name_schoenflies alone"),
        ("_symmetry_cell_setting cubic", "", NACL, "", "stated by _symmetry_cell_setting alone, which is not read"),
        ("_space_group_Bravais_type cF", "", NACL, "", "stated by _space_group_bravais_type alone"),
        ("_space_group_ssg_name_IT 'x'", "", NACL, "", "modulated"),
        ("_parent_space_group.name_H-M_alt 'F m -3 m'", "", NACL, "", "magnetic"),
        (name("P m -3 m"), "", [*NACL, "K1 K 0 0 0"], "", "two elements share a site"),
        (name("P m -3 m"), "", ["Na1 Na 0.04 0 0"], "", "images of a site are .* Å apart: a special position"),
        (
            IDENTITY,
            "_chemical_formula_moiety '(Na +), (O H -), Cl'",
            NACL,
            "",
            "the CIF states .*, its atoms are Cl1 Na1",
        ),
        (IDENTITY, "_chemical_formula_structural 'Na (O H)'", NACL, "", "the CIF states Na .O H., its atoms are"),
        (IDENTITY, "_chemical_formula_iupac 'Na Cl H'", NACL, "", "the CIF states Na Cl H, its atoms are"),
    ],
)
def test_what_a_file_states_is_not_lost_in_silence(symmetry, more, atoms, columns, reason):
    with pytest.raises(Refused, match=reason):
        read_cif(cif(symmetry, atoms, columns=columns, more=more))


def test_a_number_beside_an_unknown_name_still_counts():
    assert contents(cif("_symmetry_Int_Tables_number 225.0")) == ("ClNa", 8)
    for tag in ("_space_group_number", "_symmetry_space_group_number"):
        assert contents(cif(f"{tag} 225")) == ("ClNa", 8)
    assert contents(cif("_symmetry_cell_setting triclinic")) == ("ClNa", 2)


def test_symmetry_in_another_block_is_not_overlooked():
    with pytest.raises(Refused, match=r"the symmetry is stated in another block \('sym'\)"):
        read_cif(f"data_sym\n{name('F m -3 m')}\n" + cif())


def test_few_digits_in_a_large_cell_are_one_atom():
    cell = (14, 14, 20, 90, 90, 120)
    text = cif(name("P 3 m 1"), ["Na1 Na 0.33 0.67 0.1", "Cl1 Cl 0.67 0.33 0.5"], cell)
    assert contents(text) == ("ClNa", 2)


def test_operations_of_another_setting_than_the_name_are_noted():
    first, _ = (s for s in all_settings() if s.number == 227)
    triplets = []
    for rotation, shift in zip(first.operations.rotations, first.operations.translations, strict=True):
        op = gemmi.Op()
        op.rot, op.tran = (24 * rotation).tolist(), np.round(24 * shift).astype(int).tolist()
        triplets.append(f"'{op.triplet()}'")
    listed = "loop_\n_symmetry_equiv_pos_as_xyz\n" + "\n".join(triplets) + "\n" + name("F d -3 m :2")
    found = read_cif(cif(listed, ["C1 C 0 0 0"], (3.57,) * 3 + (90,) * 3))
    assert len(found.crystal) == 8
    assert found.notes == ("the stated name is of another setting than the listed operations, which were used",)


@pytest.mark.parametrize(
    "more", ["_chemical_formula_sum 'CO1 O1'", "loop_\n_atom_type_symbol\n_atom_type_number_in_cell\nCO 1\nO 1"]
)
def test_a_formula_in_capitals_is_read_as_its_words_are(more):
    assert contents(cif(IDENTITY, ["CO1 CO 0 0 0", "O1 O 0.5 0.5 0.5"], more=more)) == ("CoO", 2)
    with pytest.raises(Refused, match="the CIF states"):
        read_cif(cif(IDENTITY, ["C1 C 0 0 0", "N1 N 0.5 0.5 0.5"], more=more))
