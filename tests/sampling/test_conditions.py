"""Conditions of many prompts as a CSV: what is read, and how what cannot be read is told."""

import pytest

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.conditions import read


def test_a_row_is_a_prompt_and_an_empty_cell_is_not_stated(tmp_path):
    path = tmp_path / "wishes.csv"
    path.write_text(
        "pretty_formula,elements,spacegroup.number,formation_energy_per_atom,band_gap,e_above_hull\n"
        'LiFePO4,,62,-2.5,3.5,0\n"Mg(OH)2", ,,,,\n,"Li, O",,,,\n,Na-Cl,,,,\n,K I,225,,0,\n,,,,,\n'
    )
    assert read(path) == [
        {
            "pretty_formula": "LiFePO4",
            "spacegroup.number": 62,
            "formation_energy_per_atom": -2.5,
            "band_gap": 3.5,
            "e_above_hull": 0.0,
        },
        {"pretty_formula": "Mg(OH)2"},
        {"elements": ["Li", "O"]},
        {"elements": ["Na", "Cl"]},
        {"elements": ["K", "I"], "spacegroup.number": 225, "band_gap": 0.0},
        {},
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"wishes\.csv is empty; expected a header of pretty_formula, elements"),
        ("band_gap\n", "a header and no row"),
        ("formula\nNaCl\n", "the column 'formula'; columns are pretty_formula, elements"),
        ("band_gap,band_gap\n1,2\n", "a column twice"),
        ("band_gap,elements\n1,O\n2\n", r"wishes\.csv, row 2: 1 cells, the header has 2"),
        ("band_gap\n1\nwide\n", r"wishes\.csv, row 2: 'wide' is no value of band_gap"),
        ("spacegroup.number\n225.5\n", "row 1: '225.5' is no value of spacegroup.number"),
        ("spacegroup.number\n231\n", "row 1: space group 231 does not exist"),
        ("band_gap\nnan\n", "row 1: .* is no value of band_gap"),
        ("band_gap\n1e999\n", "row 1: .* is no value of band_gap"),
        ("elements\nLi Xx\n", "row 1: 'Xx' is no chemical element"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_row_and_value(tmp_path, text, match):
    (tmp_path / "wishes.csv").write_text(text)
    with pytest.raises(UserError, match=match):
        read(tmp_path / "wishes.csv")


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.csv"):
        read(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*bytes\.csv"):
        read(tmp_path / "bytes.csv")
    (tmp_path / "long.csv").write_text("band_gap\n" + "1" * 200_000)
    with pytest.raises(UserError, match=r"cannot read .*long\.csv"):
        read(tmp_path / "long.csv")


def test_what_a_spreadsheet_writes_before_the_first_letter_is_no_part_of_it(tmp_path):
    (tmp_path / "wishes.csv").write_text("band_gap\n1\n", encoding="utf-8-sig")
    assert read(tmp_path / "wishes.csv") == [{"band_gap": 1.0}]
