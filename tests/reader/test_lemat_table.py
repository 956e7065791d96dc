"""LeMat-GenBench's table: pymatgen's structures as JSON in a column, beside ids and others; rows may be empty."""

import json

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from jaxcrystal.errors import UserError
from jaxcrystal.reader.reading import read

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
ZINCITE = Structure.from_spacegroup(
    "P6_3mc", Lattice.hexagonal(3.25, 5.2), ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
)


def table(column="structure", as_text=lambda structure: json.dumps(structure.as_dict())):
    """As the benchmark's README shows it, with what pandas makes of missing values."""
    texts = [as_text(SALT), None, as_text(ZINCITE), np.nan, "no structure {", '{"lattice": {}}', ""]
    ids = [f"gen-{i}" for i in range(len(texts))]
    return pd.DataFrame({"material_id": ids, column: texts, "smact_validity": True, "other_metadata": "x"})


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("column", ["structure", "LeMatStructs"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_row_is_read_or_counted(tmp_path, kind, column, index):
    path = tmp_path / f"submission.{kind}"
    frame = table(column)
    frame.to_csv(path, index=index) if kind == "csv" else frame.to_parquet(path, index=index)
    found = read(path)
    assert [row.outcome for row in found.rows] == [
        "ok",
        "missing",
        "ok",
        "missing",
        "json_error",
        "json_error",
        "missing",
    ]
    assert [row.id for row in found.rows] == list(frame["material_id"])
    assert {row.reason for row in found.rows if row.outcome == "missing"} == {"the row has no structure"}
    assert all(row.reason for row in found.rows if row.crystal is None)
    assert "no structure {" in found.rows[4].reason
    for row, structure in ((found.rows[0], SALT), (found.rows[2], ZINCITE)):
        again = row.crystal.to_structure()
        np.testing.assert_allclose(again.lattice.parameters, structure.lattice.parameters, rtol=0, atol=1e-7)
        shift = again.frac_coords - structure.frac_coords
        np.testing.assert_allclose(shift, np.round(shift), rtol=0, atol=2.0**-32)
    assert "smact_validity" in found.ignored_columns  # it is judged here, not believed


def test_cifs_in_the_third_name_of_the_column(tmp_path):
    path = tmp_path / "submission.csv"
    table("cif_string", lambda structure: structure.to(fmt="cif")).to_csv(path, index=False)
    rows = read(path).rows
    assert [row.crystal.formula for row in rows if row.crystal is not None] == ["ClNa", "OZn"]


def test_an_index_column_alone_names_the_rows(tmp_path):
    path = tmp_path / "submission.csv"
    table()[["structure"]].set_index(pd.Index([10, 20, 30, 40, 50, 60, 70])).to_csv(path)
    assert [row.id for row in read(path).rows] == ["10", "20", "30", "40", "50", "60", "70"]


def test_a_stated_cell_is_taken_where_it_is_the_vectors():
    """pymatgen computes angles by arccos; what stands beside the vectors is exact, unless it is another cell's."""
    found = ZINCITE.as_dict()
    cell = dict(zip(("a", "b", "c", "alpha", "beta", "gamma"), (3.25, 3.25, 5.2, 90.0, 90.0, 120.0), strict=True))
    (row,) = read([{**found, "lattice": {**found["lattice"], **cell}}]).rows
    np.testing.assert_array_equal(row.crystal.angles, [90, 90, 120])
    for wrong in ({"gamma": 119.9}, {"a": 3.26}, {"b": None}, {"c": "5.2"}):
        (other,) = read([{**found, "lattice": {**found["lattice"], **cell, **wrong}}]).rows
        np.testing.assert_allclose(other.crystal.lengths, [3.25, 3.25, 5.2], rtol=0, atol=1e-7)
        np.testing.assert_allclose(other.crystal.angles, [90, 90, 120], rtol=0, atol=1e-7)


def test_a_table_of_energies_says_where_the_crystals_are(tmp_path):
    path = tmp_path / "wbm-summary.csv"
    path.write_text("material_id,formula,e_above_hull_mp2020_corrected_ppd_mp\nwbm-1-1,NaCl,0.1\n")
    with pytest.raises(UserError, match=r"wbm-summary\.csv has energies and no crystals: .*prepare --labels"):
        read(path)


@pytest.mark.parametrize("name", ["ppd-mp.pkl.gz", "crystals.pickle", "crystals.PKL"])
def test_a_pickle_is_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UserError, match=r"is a pickle, .*give its crystals as JSON"):
        read(tmp_path / name)
