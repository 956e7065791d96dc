"""Crystals written for others come back to the last digit; what is no crystal stays a row."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from pymatgen.core import Structure
from some_crystals import SALT
from some_crystals import crystals as random_crystals

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.interface.files import structure_json
from jaxcrystal.interface.tables import Relaxations, Relaxed
from jaxcrystal.reader.rows import Row
from jaxcrystal.relaxation.batch import Relaxation, RelaxationStatus

CUBE = Crystal([3.9] * 3, [90] * 3, [38, 22, 8, 8, 8], [[0.5] * 3, [0] * 3, [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]])
HEXAGON = Crystal([3.25, 3.25, 5.2], [90, 90, 120], [30, 30, 8, 8], np.linspace(0, 0.97, 12).reshape(4, 3))


@settings(max_examples=50, deadline=None)
@given(random_crystals())
def test_a_crystal_comes_back_to_the_last_digit(crystal):
    text = structure_json(crystal)
    theirs, ours = Structure.from_dict(json.loads(text)), crystal.to_structure()
    np.testing.assert_array_equal(theirs.lattice.matrix, ours.lattice.matrix)
    np.testing.assert_array_equal(theirs.frac_coords, ours.frac_coords)
    assert [site.specie.symbol for site in theirs] == crystal.symbols
    (row,) = jaxcrystal.read(pd.DataFrame({"structure": [text]}))
    assert row.crystal == crystal and structure_json(row.crystal) == text


@pytest.fixture
def ledger(tmp_path):
    """What `sample` writes, of four attempts of which two came to nothing."""
    cifs = [HEXAGON.to_cif(), None, CUBE.to_cif(), None]
    rows = {"index": range(4), "draw": range(4), "seed": 0, "prompt": "", "conditions": "{}", "text": "x", "tokens": 9}
    table = pd.DataFrame(rows | {"status": ["ok", "truncated", "ok", "cell_error"], "cif": cifs})
    table.to_parquet(tmp_path / "samples.parquet")
    return tmp_path / "samples.parquet"


@pytest.mark.parametrize("name", ["submission.csv", "submission.parquet"])
def test_a_ledger_becomes_a_table_for_a_benchmark(ledger, tmp_path, capsys, name):
    out = tmp_path / name
    assert main(["write", str(ledger), "--out", str(out), "--workers", "0"]) == 0
    assert capsys.readouterr().out == f"{out}: 2 crystals of 4 rows, 1 truncated, 1 cell_error\n"
    table = pd.read_csv(out) if name.endswith("csv") else pd.read_parquet(out)  # as the benchmark reads it
    assert list(table) == ["material_id", "outcome", "structure"]
    assert list(table["outcome"]) == ["ok", "truncated", "ok", "cell_error"]
    assert table["structure"].isna().tolist() == [False, True, False, True]
    assert Structure.from_dict(json.loads(table["structure"][0])) == HEXAGON.to_structure()
    again = jaxcrystal.read(out)
    assert again.ids == ["0", "1", "2", "3"] and again.crystals == [HEXAGON, None, CUBE, None]
    assert again.outcomes == ["ok", "missing", "ok", "missing"]
    first = out.read_bytes()
    assert main(["write", str(out), "--out", str(tmp_path / f"second-{name}"), "--workers", "0"]) == 0
    second = jaxcrystal.read(tmp_path / f"second-{name}")
    assert second.crystals == again.crystals and out.read_bytes() == first


@pytest.mark.parametrize(("form", "ending"), [("cif", ".cif"), ("poscar", ".vasp")])
def test_a_ledger_becomes_a_folder_of_files(ledger, tmp_path, form, ending):
    out = tmp_path / "files"
    assert main(["write", str(ledger), "--out", str(out), "--form", form, "--workers", "0"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"SrTiO3_2{ending}", f"ZnO_0{ending}"]
    assert {row.crystal.formula for row in jaxcrystal.read(out)} == {CUBE.formula, HEXAGON.formula}


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("x.json", [], "cannot write x.json: give a name that ends in .csv or .parquet, or a folder"),
        ("x.csv", ["--form", "poscar"], "x.csv is a table of pymatgen's structures; poscar is what a folder may hold"),
        ("full", [], "full exists and is not an empty folder; choose another"),
        ("file/x.csv", [], "cannot write file/x.csv"),
    ],
)
def test_where_nothing_can_be_written_it_is_said_in_one_line(ledger, monkeypatch, capsys, out, options, message):
    monkeypatch.chdir(ledger.parent)
    (ledger.parent / "full").mkdir()
    (ledger.parent / "full" / "a.cif").touch()
    (ledger.parent / "file").touch()
    assert main(["write", ledger.name, "--out", out, "--workers", "0", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"jaxcrystal write: {message}")


def test_every_table_of_python_is_written(tmp_path):
    end = Relaxation(RelaxationStatus.CONVERGED, "", CUBE.to_structure(), -27.0, 5, 0.03, 0.01, -0.02)
    rows = [Row("a", 0, "ok", "", SALT, ""), Row("b", 1, "missing", "the row has no CIF", None, "")]
    relaxed = Relaxations([Relaxed.of(rows[0], end), Relaxed.of(rows[1], None)], "P")
    made = jaxcrystal.templates("prototypes", 5, tmp_path / "t.parquet", swaps=1)
    for number, table in enumerate([jaxcrystal.read([SALT, None]), relaxed, made]):
        (path,) = table.write(tmp_path / f"{number}.csv")
        again = jaxcrystal.read(path)
        assert again.ids == table.ids and [c is None for c in again.crystals] == [c is None for c in table.crystals]
        assert all(c is None or c == d for c, d in zip(table.crystals, again.crystals, strict=True))
