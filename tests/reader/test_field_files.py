"""The small files beside the checkout that have what everyday files have: right in both verbs, by one reader.

Files of the same kinds are made in the other tests of this room; here the real ones go through the command line.
"""

import csv
import json

import pandas as pd
import pytest

from jaxcrystal.cli import main
from jaxcrystal.crystals.dataset import load

#: By file: id, formula and atoms of each row; or the words of its refusal; or, of the file as a whole, the words.
EXPECTED = {
    "01_it_number_only.cif": [("01_it_number_only", "ClNa", 8)],
    "02_hm_full.cif": [("02_hm_full", "ClNa", 8)],
    "06b_R_H.cif": [("06b_R_H", "Bi2Te3", 15)],
    "06e_R_rhombo_nosuffix.cif": [("06e_R_rhombo_nosuffix", "Bi2Te3", 5)],
    "07c_Fd3m_origin1_colon.cif": [("07c_Fd3m_origin1_colon", "Si", 8)],
    "08_deuterium.cif": [("08_deuterium", "HLi", 2)],
    "13d_coord_dot.cif": ["a coordinate is missing"],
    "14b_bom.cif": [("14b_bom", "ClCs", 2)],
    "16_two_blocks.cif": [("16_two_blocks#one", "ClCs", 2), ("16_two_blocks#two", "BrK", 2)],
    "16b_global_and_one.cif": [("16b_global_and_one", "ClCs", 2)],
    "16d_same_name_blocks.cif": ["two blocks of the CIF have the name 'one'"],
    "20_UPPER.CIF": [("20_UPPER", "ClCs", 2)],
    "21b_upper_symbols.cif": [("21b_upper_symbols", "ClCs", 2)],
    "27_attached_H.cif": ["1 attached hydrogen atoms that have no positions"],
    "27c_H_missing_formula.cif": ["the CIF states H K O, its atoms are K1 O1"],
    "bytes.parquet": [("mp-1", "ClCs", 2), ("mp-2", "BrK", 2), ("mp-3", "FNa", 2)],
    "dup_col.csv": "has 2 columns 'cif'",
    "duplicate_tag.cif": ["_cell_length_a occurs twice, with different values"],
    "foreign_status.parquet": [("mp-1", "ClCs", 2), ("mp-2", "BrK", 2), ("mp-3", "FNa", 2)],
    "icsd_ox_with_formula.cif": [("icsd_ox_with_formula", "FeO", 8)],
    "index_is_id.parquet": [("mp-1", "ClCs", 2), ("mp-2", "BrK", 2), ("mp-3", "FNa", 2)],
    "mptrj_nested.json": [(f"mp-{i}-0-{j}", "ClCs", 2) for i in (0, 1) for j in (0, 1)],
    "occ_one_dot.cif": [("occ_one_dot", "ClCs", 2)],
    "optimade.json": [("x", "ClCs", 2)],
    "oxidation_pymatgen.csv": [(name, "FeO", 2) for name in ("plain", "decorated", "decorated_no_loop")],
    "pbc_F.extxyz": ["not periodic in three directions"],
    "quartz_left.extxyz": [("0", "O2Si", 9)],
    "trailing_comma.csv": [("mp-0", "ClCs", 2), ("mp-1", "BrK", 2), ("mp-2", "FNa", 2)],
    "uppercase_tags.cif": [("uppercase_tags", "ClCs", 2)],
    "zero_atoms.extxyz": ["the frame has no atoms", ("1", "ClCs", 2)],
}
#: Densities in g/cm³, by hand: what a wrong setting or a lost atom would change.
DENSITY = {"01_it_number_only": 2.16, "02_hm_full": 2.16, "07c_Fd3m_origin1_colon": 2.33, "06b_R_H": 7.87}


def test_the_list_is_whole(shared):
    assert EXPECTED.keys() == {path.name for path in (shared / "field").iterdir()} - {"README.md"}


@pytest.mark.parametrize("name", EXPECTED)
def test_both_verbs_read_the_same(shared, tmp_path, capsys, name):
    path, expected = shared / "field" / name, EXPECTED[name]
    code = main(["prepare", str(path), "--out", str(tmp_path / "set"), "--no-niggli"])
    said = capsys.readouterr()
    judged = main(["evaluate", str(path), "--out", str(tmp_path / "report"), "--workers", "1"])
    if isinstance(expected, str):
        assert code == judged == 1 and expected in said.err and expected in capsys.readouterr().err
        return
    crystals = [row for row in expected if isinstance(row, tuple)]
    assert judged == 0 and code == (0 if crystals else 1)
    (part,) = json.loads((tmp_path / "set" / "report.json").read_text())["parts"]
    assert (part["read"], part["kept"]) == (len(expected), len(crystals))
    with (tmp_path / "set" / "left_out.csv").open() as file:
        left_out = [row["message"] for row in csv.DictReader(file)]
    words = [row for row in expected if isinstance(row, str)]
    assert len(words) == len(left_out) and all(w in m for w, m in zip(words, left_out, strict=True))
    assert all(w in said.out + said.err for w in words), "the terminal says the reason, not its code alone"

    table = pd.read_parquet(tmp_path / "report" / "structures.parquet")
    assert len(table) == len(expected)
    for (_, row), want in zip(table.iterrows(), expected, strict=True):
        if isinstance(want, str):
            assert row["outcome"] != "ok" and want in row["reason"]
        else:
            assert row["outcome"] == "ok" and (row["id"], row["num_atoms"]) == (want[0], want[2])
            assert row["density"] == pytest.approx(DENSITY.get(want[0], row["density"]), abs=0.01)
    stored = load(tmp_path / "set" / f"{part['part']}.parquet")
    assert [(i, stored.crystal(n).formula, len(stored.crystal(n))) for n, i in enumerate(stored.ids)] == crystals
    if name == "08_deuterium.cif":
        assert table["notes"].tolist() == ["deuterium (D) read as hydrogen"]
    if name == "quartz_left.extxyz":
        assert table["spacegroup"][0] == 152


def test_the_folder_as_a_whole_names_what_it_does_not_read(shared, tmp_path, capsys):
    assert main(["prepare", str(shared / "field"), "--out", str(tmp_path / "set"), "--max-atoms", "0"]) == 0
    said = capsys.readouterr().out
    assert "not read: 1 .md file (README.md), 2 .parquet files" not in said and ".parquet files (" in said
    part = json.loads((tmp_path / "set" / "report.json").read_text())["parts"][0]
    cifs = {n: rows for n, rows in EXPECTED.items() if n.lower().endswith(".cif")}
    assert part["read"] == sum(len(rows) for rows in cifs.values())
    assert part["kept"] == sum(isinstance(row, tuple) for rows in cifs.values() for row in rows)
    assert sum(map(len, part["unread"].values())) == len(EXPECTED) - len(cifs) + 1
