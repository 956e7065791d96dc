"""Every format, and every way in which a row can fail to be a crystal: counted with its reason, never dropped."""

import sys

import ase
import ase.io
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.reading import read
from jaxcrystal.sampling.attempts_table import SCHEMA
from jaxcrystal.workers import local

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
RUTILE = Structure.from_spacegroup(
    "P4_2/mnm", Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
)
CIF = str(CifWriter(Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])))
ATOM = "0.50000000  0.50000000  0.50000000"


def outcomes(path, **options):
    return [sample.outcome for sample in read(path, **options).rows]


def csv(folder, cifs, **columns):
    path = folder / "samples.csv"
    pd.DataFrame({"cif": cifs, **columns}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("cif", "outcome", "reason"),
    [
        (CIF, "ok", ""),
        ("", "missing", "the row has no CIF"),
        ("no CIF at all", "cif_error", ""),
        (CIF[:300], "cif_error", ""),
        (CIF.replace(ATOM, "0.5 0.5"), "cif_error", ""),
        (CIF.replace("Cl  Cl1", "Qq  Qq1"), "unknown_element", "'Qq' is no chemical element"),
        (CIF.replace(ATOM, "nan 0.5 0.5"), "not_finite", "a coordinate is not a finite number"),
        (CIF.replace("_cell_length_a   4.00000000", "_cell_length_a   nan"), "not_finite", "a cell length"),
        (CIF.replace("_cell_length_a   4.0", "_cell_length_a   -4.0"), "cell_error", "lengths must lie between"),
        (CIF.replace("_cell_angle_alpha   90.0", "_cell_angle_alpha   200.0"), "cell_error", "angles must lie"),
        (CIF.replace(f"{ATOM}  1", f"{ATOM}  0.5"), "disordered", "partially occupied"),
    ],
)
def test_each_failure_of_a_cif_is_an_outcome(tmp_path, cif, outcome, reason):
    first, second = read(csv(tmp_path, [cif, CIF], material_id=["a", "b"])).rows
    assert (first.id, first.row, first.outcome) == ("a", 0, outcome)
    assert reason in first.reason and bool(first.reason) == (outcome != "ok")
    assert (first.crystal is None) == (outcome != "ok")
    assert second.outcome == "ok" and second.id == "b"
    assert first.cif == cif


def test_a_library_that_is_missing_is_no_fault_of_a_row(tmp_path, monkeypatch):
    """As on a bare accelerator host: not one failed row a crystal, but one line that says what to install."""
    (tmp_path / "salt.cif").write_text(CIF)
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(UserError, match=r"gemmi is not installed; pip install 'jaxcrystal\[evaluate\]'"):
        read(tmp_path / "salt.cif")


def test_atoms_that_coincide_are_both_kept(tmp_path):
    twice = CIF.replace("'Na1 Cl1'", "'Na1 Cl2'").rstrip() + f"\n  Cl  Cl2  1  {ATOM}  1\n"
    (sample,) = read(csv(tmp_path, [twice])).rows
    assert sample.crystal.symbols == ["Na", "Cl", "Cl"]


@pytest.mark.parametrize("structure", [SALT, RUTILE], ids=["salt", "rutile"])
def test_symmetry_operations_are_carried_out(tmp_path, structure):
    plain, symmetric = str(CifWriter(structure)), str(CifWriter(structure, symprec=0.01))
    assert symmetric.count("\n") != plain.count("\n")
    samples = read(csv(tmp_path, [plain, symmetric])).rows
    for sample in samples:
        assert len(sample.crystal) == len(structure)
        assert sample.crystal.to_structure().matches(structure)


def test_a_plain_cif_is_read_as_pymatgen_reads_it(shared, tmp_path):
    table = pd.read_parquet(shared / "data/mp20/test.parquet").head(60)
    for sample, cif in zip(read(csv(tmp_path, list(table["cif"]))).rows, table["cif"], strict=True):
        expected = Crystal.from_structure(Structure.from_str(cif, fmt="cif", primitive=False))
        # pymatgen goes by way of a matrix, which costs the last digits.
        assert np.allclose(sample.crystal.lengths, expected.lengths, rtol=0, atol=1e-6)
        assert np.allclose(sample.crystal.angles, expected.angles, rtol=0, atol=1e-6)
        assert sample.crystal.symbols == expected.symbols
        shift = sample.crystal.frac_coords - expected.frac_coords
        # pymatgen takes 0.66667 for 2/3; we take it as it is written.
        assert np.abs(shift - np.round(shift)).max() < 1e-4


def test_the_ledger_keeps_what_the_sampler_said(tmp_path):
    path = tmp_path / "ledger.parquet"
    status = ["ok", "truncated", "parse_error:angles", "cell_error"]
    row = dict.fromkeys(SCHEMA.names) | {"seed": 0, "draw": 0}
    rows = [row | {"index": 7 + i, "status": s, "cif": CIF if s == "ok" else None} for i, s in enumerate(status)]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    assert read(path).ignored_columns == ()
    samples = read(path).rows
    assert [(s.id, s.outcome) for s in samples] == list(zip(["7", "8", "9", "10"], status, strict=True))
    assert samples[1].reason == "the sampler reported truncated"
    # As a folder, the CIF files alone would hide the three that failed.
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "attempts.parquet")
    (folder / "000007.cif").write_text(CIF)
    assert outcomes(folder) == status


def test_prepared_arrays_come_back_bit_for_bit(tmp_path):
    crystals = [Crystal.from_structure(structure) for structure in (SALT, RUTILE)]
    columns = {
        "material_id": ["salt", "rutile"],
        "lengths": [list(c.lengths) for c in crystals],
        "angles": [list(c.angles) for c in crystals],
        "species": [list(map(int, c.species)) for c in crystals],
        "frac_coords": [list(c.frac_coords.reshape(-1)) for c in crystals],
    }
    pq.write_table(pa.table(columns), tmp_path / "prepared.parquet")
    samples = read(tmp_path / "prepared.parquet").rows
    assert [s.crystal for s in samples] == crystals and [s.id for s in samples] == ["salt", "rutile"]
    columns["frac_coords"][0] = columns["frac_coords"][0][:-1]
    pq.write_table(pa.table(columns), tmp_path / "short.parquet")
    assert outcomes(tmp_path / "short.parquet") == ["json_error", "ok"]


def test_a_broken_frame_costs_only_itself(tmp_path):
    atoms = ase.Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[4, 4, 4], pbc=True)
    molecule = ase.Atoms("OH", positions=[[0, 0, 0], [0, 0, 1]])
    path = tmp_path / "frames.extxyz"
    ase.io.write(path, [atoms, atoms, molecule, atoms])
    lines = path.read_text().split("\n")
    lines[6] = "Cl two two two"
    path.write_text("\n".join(lines))
    assert outcomes(path) == ["ok", "extxyz_error", "not_periodic", "ok"]
    assert np.allclose(read(path).rows[3].crystal.frac_coords[1], 0.5)
    path.write_text("two\n" + path.read_text())
    with pytest.raises(UserError, match=r"frames.extxyz, line 1: expected a frame's number of atoms, found 'two'"):
        read(path)


def test_a_folder_of_cifs(tmp_path):
    (tmp_path / "b.cif").write_text("broken")
    (tmp_path / "a.cif").write_text(CIF)
    (tmp_path / "notes.txt").write_text("not a crystal")
    samples = read(tmp_path).rows
    assert [(s.id, s.outcome) for s in samples] == [("a", "ok"), ("b", "cif_error")]


def test_processes_and_limit_change_nothing_but_the_number(tmp_path):
    path = csv(tmp_path, [CIF, "broken", CIF])
    alone = read(path, limit=2).rows
    assert [s.outcome for s in alone] == ["ok", "cif_error"]
    with local(2) as workers:
        together = read(path, workers=workers, limit=2).rows
    assert [(s.outcome, s.crystal) for s in together] == [(s.outcome, s.crystal) for s in alone]


def test_what_cannot_be_read_names_file_and_expectation(tmp_path):
    empty, columns, rows = (tmp_path / f"{n}.csv" for n in ("empty", "columns", "rows"))
    empty.touch()
    pd.DataFrame({"crystal": [CIF]}).to_csv(columns)
    pd.DataFrame({"cif": []}).to_csv(rows)
    (tmp_path / "broken.parquet").write_text("not parquet")
    for path, message in (
        (tmp_path / "absent.csv", "does not exist"),
        (empty, "empty.csv is empty; give a .csv"),
        (columns, "columns.csv has no column of crystals; its columns are .*crystal; expected a column `cif` or"),
        (rows, "rows.csv holds no crystals"),
        (tmp_path / "broken.parquet", "cannot read .*broken.parquet as a table"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)
    (tmp_path / "x.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"the kind of file '\.yaml' is not known"):
        read(tmp_path / "x.yaml")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no crystals"):
        read(tmp_path / "none")


def test_one_per_cent_of_broken_cifs_is_counted_and_costs_nothing_else(tmp_path):
    rows = 2000
    broken = {
        "": "missing",
        "no CIF at all": "cif_error",
        CIF[:300]: "cif_error",
        CIF.replace("Cl  Cl1", "Qq  Qq1"): "unknown_element",
        CIF.replace(ATOM, "nan 0.5 0.5"): "not_finite",
    }
    cifs, expected = [CIF] * rows, ["ok"] * rows
    for i, row in enumerate(np.random.default_rng(0).choice(rows, rows // 100, replace=False)):
        cifs[row], expected[row] = list(broken.items())[i % len(broken)]
    samples = read(csv(tmp_path, cifs)).rows
    assert [(s.row, s.outcome) for s in samples] == list(enumerate(expected))
    assert sum(s.crystal is None for s in samples) == sum(bool(s.reason) for s in samples) == 20


def test_the_hash_follows_the_content(tmp_path):
    first = read(csv(tmp_path, [CIF])).sha256
    assert read(csv(tmp_path, [CIF])).sha256 == first != read(csv(tmp_path, [CIF, CIF])).sha256
