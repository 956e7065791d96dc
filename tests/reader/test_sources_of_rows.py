"""Every source that people have, and the files of each kind that used to be read wrong or dropped."""

import bz2
import csv
import gzip
import json
import lzma

import ase.io
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import spglib
from ase.io import jsonio
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.preparing import prepare
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.sources import LEDGER, SUBSTITUTIONS
from jaxcrystal.sampling.attempts_table import SCHEMA

SALT = Structure(Lattice.from_parameters(4, 4, 4, 60, 60, 60), ["Na", "Cl"], [[0] * 3, [0.5] * 3])
RUTILE = Structure.from_spacegroup(136, Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]])
CIF = str(CifWriter(SALT))


def one(path):
    (row,) = read(path).rows
    return row


def is_salt(crystal):
    return (crystal.formula, len(crystal)) == ("ClNa", 2) and np.isclose(crystal.volume, SALT.volume)


def left_handed(structure):
    """The same crystal, its cell's vectors in an order that forms a left hand."""
    return Structure(structure.lattice.matrix[[1, 0, 2]], structure.species, structure.frac_coords[:, [1, 0, 2]])


def jarvis(structure):
    return {
        "lattice_mat": structure.lattice.matrix.tolist(),
        "coords": structure.frac_coords.tolist(),
        "elements": [site.specie.symbol for site in structure],
        "cartesian": False,
    }


def optimade(structure, **more):
    symbols = sorted({site.specie.symbol for site in structure})
    return {
        "lattice_vectors": structure.lattice.matrix.tolist(),
        "cartesian_site_positions": structure.cart_coords.tolist(),
        "species_at_sites": [site.specie.symbol for site in structure],
        "species": [{"name": s, "chemical_symbols": [s], "concentration": [1.0]} for s in symbols],
        "dimension_types": [1, 1, 1],
        "nsites": len(structure),
        **more,
    }


@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize(
    "name",
    ["a.cif", "a.CIF", "POSCAR", "CONTCAR", "a.vasp", "mp-1.POSCAR", "POSCAR_mp-1", "a.json", "a.extxyz", "a.csv"],
)
def test_a_file_of_each_kind_packed_or_not(tmp_path, name, pack):
    plain = tmp_path / name
    atoms = AseAtomsAdaptor.get_atoms(SALT)
    match plain.suffix.lower():
        case ".cif":
            plain.write_text(CIF)
        case ".json":
            plain.write_text(json.dumps(SALT.as_dict()))
        case ".extxyz":
            ase.io.write(plain, atoms)
        case ".csv":
            pd.DataFrame({"material_id": ["a"], "cif": [CIF]}).to_csv(plain, index=False)
        case _:
            Poscar(SALT).write_file(plain)
    path = plain
    if pack is not None:
        path = tmp_path / f"{name}.{ {gzip.compress: 'gz', bz2.compress: 'bz2', lzma.compress: 'xz'}[pack] }"
        path.write_bytes(pack(plain.read_bytes()))
    assert is_salt(one(path).crystal)


@pytest.mark.parametrize("zero", ["0.0E+00", "0.0e0", "0"])
def test_coordinates_of_a_poscar_may_have_exponents(zero, tmp_path):
    text = str(Poscar(SALT)).replace(" 0.0000000000000000", f" {zero}")
    (tmp_path / "POSCAR").write_text(text)
    assert is_salt(one(tmp_path / "POSCAR").crystal)


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [
        (lambda s: s.replace("Na Cl", "1 1", 1), "poscar_error", "line 6 names no elements"),
        (lambda s: "\n".join(s.split("\n")[:5] + s.split("\n")[6:]), "poscar_error", "line 6 names no elements"),
        (lambda s: s.replace("Na Cl", "Na Qq", 1), "unknown_element", "'Qq' is no chemical element"),
        (
            lambda s: "\n".join(s.split("\n")[:-2]),
            "poscar_error",
            "counts 2 atoms, 1 lines of coordinates follow",
        ),
        (lambda s: s.replace("1 1\n", "1\n", 1), "poscar_error", "line 6 names 2 elements, line 7 does not count"),
        (lambda s: s.rstrip("\n") + "\n0.1 0.2 0.3\n", "poscar_error", "counts 2 atoms, 3 lines of coordinates follow"),
        (lambda s: s.replace("Na Cl", "Na/K Cl", 1), "unknown_element", "'Na/K' is no chemical element"),
        (lambda s: "\n".join(s.split("\n")[:4]), "poscar_error", "ends after 4 lines"),
    ],
)
def test_a_broken_poscar(tmp_path, change, outcome, words):
    text = str(Poscar(SALT))
    assert "Na Cl" in text
    (tmp_path / "POSCAR").write_text(change(text))
    row = one(tmp_path / "POSCAR")
    assert row.outcome == outcome and words in row.reason


def test_what_a_poscar_states_beside(tmp_path):
    Poscar(SALT, selective_dynamics=[[True] * 3, [False] * 3]).write_file(tmp_path / "POSCAR")
    text = (tmp_path / "POSCAR").read_text().replace("Na Cl", "Na_pv Cl", 1)
    (tmp_path / "POSCAR").write_text(text)
    row = one(tmp_path / "POSCAR")
    assert is_salt(row.crystal) and row.notes == ("selective dynamics are not kept",)


SHAPES = {
    "optimade": ({"data": [{"id": "x", "type": "structures", "attributes": optimade(SALT)}], "meta": {}}, ["x"]),
    "optimade_single": ({"data": {"id": "x", "type": "structures", "attributes": optimade(SALT)}}, ["x"]),
    "lemat_rows": ([{"immutable_id": "agm1", **optimade(SALT)}], ["agm1"]),
    "mptrj": (
        {"mp-0": {f"mp-0-{i}-0": {"structure": SALT.as_dict(), "mp_id": "mp-0"} for i in range(2)}},
        ["mp-0-0-0", "mp-0-1-0"],
    ),
    "nested_without_prefix": ({"a": {"0": {"structure": SALT.as_dict()}}, "b": {"0": SALT.as_dict()}}, ["a/0", "b/0"]),
    "jarvis": ([{"jid": "JVASP-1", "atoms": jarvis(SALT)}], ["JVASP-1"]),
    "text_of_json": ([{"material_id": "a", "structure": json.dumps(SALT.as_dict())}], ["a"]),
    "text_of_cif": ([{"material_id": "a", "cif": CIF}], ["a"]),
    "table": ({"schema": {}, "data": [{"material_id": "a", "structure": SALT.as_dict()}]}, ["a"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_other_projects(tmp_path, shape):
    content, ids = SHAPES[shape]
    (tmp_path / "a.json").write_text(json.dumps(content))
    rows = read(tmp_path / "a.json").rows
    assert [row.id for row in rows] == ids and all(is_salt(row.crystal) for row in rows), [r.reason for r in rows]


def test_ases_own_json_and_lines_of_json(tmp_path):
    atoms = AseAtomsAdaptor.get_atoms(SALT)
    ase.io.write(tmp_path / "a.json", [atoms, atoms])
    rows = read(tmp_path / "a.json").rows
    assert len(rows) == 2 and all(is_salt(row.crystal) for row in rows)
    (tmp_path / "b.json").write_text(jsonio.encode([atoms]))
    assert is_salt(one(tmp_path / "b.json").crystal)
    lines = [{"x-optimade": {}}, {"type": "info", "id": "structures"}]
    lines += [{"type": "structures", "id": f"x{i}", "attributes": optimade(SALT)} for i in range(3)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row.id for row in read(tmp_path / "c.jsonl").rows] == ["x0", "x1", "x2"]


@pytest.mark.parametrize("content", [{"a": 1, "b": 2}, {"results": {"n": 3}}, {"keys": [1, 2], "values": {}}])
def test_json_that_holds_no_structures_is_refused_whole(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json holds no structures in a shape that is read; its keys are"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"structure_features": ["implicit_atoms"]}, "missing_atoms"),
        ({"nsites": 4}, "missing_atoms"),
        ({"dimension_types": [1, 1, 0]}, "not_periodic"),
        (
            {"species": [{"name": "Na", "chemical_symbols": ["Na", "vacancy"], "concentration": [0.5, 0.5]}]},
            "disordered",
        ),
        ({"species": [{"name": "Na", "chemical_symbols": ["Na"], "concentration": [0.9]}]}, "disordered"),
        (
            {"species": [{"name": "Na", "chemical_symbols": ["Na"], "attached": ["H"], "nattached": [1]}]},
            "missing_atoms",
        ),
        ({"lattice_vectors": [[4, 0, 0], [0, 4, 0], [None, None, None]]}, "not_finite"),
        ({"cartesian_site_positions": [[0, 0, 0]]}, "json_error"),
        ({"species_at_sites": []}, "missing_atoms"),
        ({"structure_features": ["disorder"]}, "disordered"),
        ({"dimension_types": None, "nperiodic_dimensions": 2}, "not_periodic"),
    ],
)
def test_what_optimade_says_of_its_sites(tmp_path, change, outcome):
    (tmp_path / "a.json").write_text(json.dumps([optimade(SALT, **change)]))
    row = one(tmp_path / "a.json")
    assert row.outcome == outcome and row.reason


@pytest.mark.parametrize("form", ["json", "python", "nested", "cif", "bytes"])
def test_a_column_structure_in_any_form(tmp_path, form):
    structure = {k: v for k, v in SALT.as_dict().items() if k in ("lattice", "sites")}
    for site in structure["sites"]:
        site["properties"] = {"magmom": 0.5}  # parquet has no dictionary without names
    value = {"json": json.dumps(structure), "python": str(structure), "nested": structure}
    value |= {"cif": CIF, "bytes": CIF.encode()}
    pq.write_table(pa.table({"structure": [value[form]] * 2, "immutable_id": ["a", "b"]}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet").rows
    assert [row.id for row in rows] == ["a", "b"] and all(is_salt(row.crystal) for row in rows), rows[0].reason
    assert ("the sites' magmom is not kept" in rows[0].notes) == (form not in ("cif", "bytes"))


def test_lematerials_columns_of_a_layer(tmp_path):
    pd.DataFrame([optimade(SALT, dimension_types=None, nperiodic_dimensions=2)]).to_parquet(tmp_path / "a.parquet")
    assert one(tmp_path / "a.parquet").outcome == "not_periodic"


@pytest.mark.parametrize("pbc", ["F F F", [True, True, False], "T T F"])
def test_pymatgens_directions_in_any_spelling(tmp_path, pbc):
    structure = SALT.as_dict()
    structure["lattice"]["pbc"] = pbc
    (tmp_path / "a.json").write_text(json.dumps(structure))
    assert one(tmp_path / "a.json").outcome == "not_periodic"


def test_lematerials_columns(tmp_path):
    pd.DataFrame([{"immutable_id": "agm1", "energy": 1.0, **optimade(SALT)}]).to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.rows[0].id == "agm1" and is_salt(found.rows[0].crystal), found.rows[0].reason
    assert found.ignored_columns == ("energy",)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ids_come_from_a_column_or_the_index(tmp_path, kind):
    def written(table, **options):
        path = tmp_path / f"a.{kind}"
        table.to_csv(path, **options) if kind == "csv" else table.to_parquet(path)
        return read(path)

    table = pd.DataFrame({"cif": [CIF] * 2})
    numbered = written(table)
    assert [row.id for row in numbered.rows] == ["0", "1"]
    for index in (pd.Index(["a", "b"], name="material_id"), pd.Index(["a", "b"]), pd.Index(["a", "b"], name="mp")):
        found = written(table.set_index(index))
        expected = ["0", "1"] if kind == "csv" and index.name == "mp" else ["a", "b"]  # a CSV tells no index by name
        assert [row.id for row in found.rows] == expected and found.has_ids == (expected == ["a", "b"])
    found = written(table.assign(task_id=["x", "y"]))
    assert [row.id for row in found.rows] == ["x", "y"] and found.has_ids


def test_a_foreign_column_status_is_no_ledger(tmp_path):
    assert set(SCHEMA.names) >= LEDGER
    pd.DataFrame({"cif": [CIF], "status": ["COMPLETED"], "index": [7]}).to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert is_salt(found.rows[0].crystal) and found.ignored_columns == ("status", "index")
    # Ours, whatever its rows are called, by all of its columns; also as CSV.
    row = dict.fromkeys(SCHEMA.names, "") | {"index": 3, "status": "truncated", "seed": 0}
    pd.DataFrame([row, row | {"index": 4, "status": "ok", "cif": CIF}]).to_csv(tmp_path / "b.csv", index=False)
    rows = read(tmp_path / "b.csv").rows
    assert [(r.id, r.outcome) for r in rows] == [("3", "truncated"), ("4", "ok")]
    # And what `templates` makes; pandas may have its own word for nothing.
    row = dict.fromkeys(SUBSTITUTIONS, "x") | {"index": 3, "status": "no_swap", "cif": pd.NA}
    rows = read(pd.DataFrame([row, row | {"index": 4, "status": "ok", "cif": CIF}])).rows
    assert [(r.id, r.outcome, r.cif) for r in rows] == [("3", "no_swap", ""), ("4", "ok", CIF)]


def test_a_row_that_ends_in_commas_is_read_and_one_with_more_is_not(tmp_path):
    (tmp_path / "a.csv").write_text(f'material_id,cif\na,"{CIF}",\nb,"{CIF}",,,\nc,"{CIF}",x\nd\n')
    rows = read(tmp_path / "a.csv").rows
    assert [row.outcome for row in rows] == ["ok", "ok", "malformed_row", "malformed_row"]
    assert rows[0].notes == ("empty fields behind the last column were dropped",)
    assert rows[2].reason == "the row has 3 fields, the header 2"


@pytest.mark.parametrize("raw", [CIF.encode("utf-16"), b"# " + "Jürgen é".encode("latin-1") + b"\n" + CIF.encode()])
def test_other_encodings(tmp_path, raw):
    (tmp_path / "a.cif").write_bytes(raw)
    assert is_salt(one(tmp_path / "a.cif").crystal)
    text = f'material_id,cif\nJürgen,"{CIF}"\n'
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    row = one(tmp_path / "a.csv")
    assert row.id == "Jürgen" and is_salt(row.crystal)


def test_what_a_folder_holds_is_read_or_named(tmp_path):
    folder = tmp_path / "set"
    (folder / "more").mkdir(parents=True)
    (folder / "odd.cif").mkdir()
    for name in ("a.cif", "b.CIF", "two.cif"):
        (folder / name).write_text(CIF if name != "two.cif" else CIF + CIF.replace("data_NaCl", "data_other"))
    (folder / "c.cif.gz").write_bytes(gzip.compress(CIF.encode()))
    (folder / "broken.cif.gz").write_bytes(b"\x1f\x8bno")
    (folder / "a.cif.bz2").write_bytes(bz2.compress(CIF.encode()))
    Poscar(SALT).write_file(folder / "d.vasp")
    (folder / "gone.cif").symlink_to(tmp_path / "nowhere")
    for name in ("m.mcif", "notes.txt", ".DS_Store", "README"):
        (folder / name).write_text("")
    found = read(folder)
    outcomes = {row.id: row.outcome for row in found.rows}
    assert outcomes == dict.fromkeys(["a.cif", "a.cif.bz2", "b", "two#NaCl", "two#other", "c", "d"], "ok") | {
        "broken": "missing",
        "gone": "missing",
    }
    assert found.has_ids and found.unread == {
        "folder": ("more", "odd.cif"),
        ".mcif file": ("m.mcif",),
        ".txt file": ("notes.txt",),
        "other file": (".DS_Store", "README"),
    }


@pytest.mark.parametrize("form", ["extxyz", "POSCAR", "json", "structure", "atoms"])
def test_the_hand_of_a_cell_is_kept(tmp_path, form):
    # Trigonal selenium, whose screw turns to one side: P3_1 2 1, number 152. Its mirror image is 154.
    selenium = Structure.from_spacegroup(152, Lattice.hexagonal(4.37, 4.96), ["Se"], [[0.225, 0, 1 / 3]])
    for structure in (selenium, left_handed(selenium)):
        atoms = AseAtomsAdaptor.get_atoms(structure)
        match form:
            case "extxyz":
                ase.io.write(tmp_path / "a.extxyz", atoms)
                source = tmp_path / "a.extxyz"
            case "POSCAR":
                # Not pymatgen's writer, which turns the vectors of a left-handed cell round and leaves the fractions.
                ase.io.write(tmp_path / "POSCAR", atoms, format="vasp")
                source = tmp_path / "POSCAR"
            case "json":
                (tmp_path / "a.json").write_text(json.dumps(structure.as_dict()))
                source = tmp_path / "a.json"
            case "structure":
                source = structure
            case "atoms":
                source = [atoms]
        found = one(source).crystal.to_structure()
        cell = (found.lattice.matrix, found.frac_coords, found.atomic_numbers)
        assert spglib.get_symmetry_dataset(cell, symprec=1e-3).number == 152
        assert spglib.get_symmetry_dataset((found.lattice.matrix, -found.frac_coords, [34] * 3), 1e-3).number == 154


NOT_PERIODIC = [
    'pbc="FFF"',
    "pbc=FFF",
    'PBC="F F F"',
    'pbc="f f f"',
    'pbc="[False False False]"',
    'pbc="no no no"',
    "pbc=xyz",
]
NOT_PERIODIC += ['periodic="F F F"', 'boundary="p p f"', 'pbc="0 0 0"']
PERIODIC = [
    'pbc="T T T"',
    "pbc=TTT",
    'pbc="True True True"',
    'pbc="[True True True]"',
    'pbc="1 1 1"',
    'boundary="p p p"',
]
FRAME = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3'


@pytest.mark.parametrize(
    ("frame", "outcome"),
    [
        (f"2\n{FRAME}\nCs 0 0 0\nCl 2 2 2\n", "ok"),
        (f'2\n{FRAME} pbc="T T T"\nCS 0 0 0\nCl 2 2 2\n', "ok"),
        (f'2\n{FRAME} pbc="F F F"\nCs 0 0 0\nCl 2 2 2\n', "not_periodic"),
        (f'2\n{FRAME} pbc="T T F"\nCs 0 0 0\nCl 2 2 2\n', "not_periodic"),
        *((f"2\n{FRAME} {pbc}\nCs 0 0 0\nCl 2 2 2\n", "not_periodic") for pbc in NOT_PERIODIC),
        *((f"2\n{FRAME} {pbc}\nCs 0 0 0\nCl 2 2 2\n", "ok") for pbc in PERIODIC),
        (f'2\n{FRAME} Lattice="9 0 0 0 9 0 0 0 9"\nCs 0 0 0\nCl 2 2 2\n', "extxyz_error"),
        (f"2\n{FRAME.replace('Lattice', 'lattice')}\nCs 0 0 0\nCl 2 2 2\n", "ok"),
        (f"2\n{FRAME.replace('pos', 'scaled_pos')}\nCs 0 0 0\nCl 2 2 2\n", "missing_atoms"),
        (f"2\n{FRAME}:Z:I:1\nCs 0 0 0 55\nCl 2 2 2 17\n", "extxyz_error"),
        (f"2\n{FRAME}:occupancy:R:1\nCs 0 0 0 1\nCl 2 2 2 0.5\n", "disordered"),
        (f"2\n{FRAME}\n55 0 0 0\n17 2 2 2\n", "ok"),
        (f"2\n{FRAME}\nCs/K 0 0 0\nCl 2 2 2\n", "unknown_element"),
        ("2\nno cell\nCs 0 0 0\nCl 2 2 2\n", "not_periodic"),
        (f"0\n{FRAME}\n", "no_atoms"),
        (f"2\n{FRAME}\nD 0 0 0\nCl 2 2 2\n", "ok"),
        (f"2\n{FRAME}\nQq 0 0 0\nCl 2 2 2\n", "unknown_element"),
        (f"2\n{FRAME}\nCs 0 nan 0\nCl 2 2 2\n", "not_finite"),
        (f"2\n{FRAME}\nCs 0 0\nCl 2 2 2\n", "extxyz_error"),
        (f"3\n{FRAME}\nCs 0 0 0\nCl 2 2 2\n", "extxyz_error"),
        ('1\nLattice="4 0 0 0 4 0 0 0 0"\nCs 0 0 0\n', "not_periodic"),
        ('1\nLattice="4 0 0 0 4 0 0 0 4" Properties=pos:R:3:species:S:1\n0 0 0 Cs\n', "ok"),
    ],
)
def test_a_frame_is_read_or_refused_and_costs_only_itself(tmp_path, frame, outcome):
    last = frame.startswith("3")  # its missing line would be taken from the next
    (tmp_path / "a.extxyz").write_text(frame if last else frame + f"1\n{FRAME} material_id=last\nFe 0 0 0\n")
    rows = read(tmp_path / "a.extxyz").rows
    assert rows[0].outcome == outcome and bool(rows[0].reason) == (outcome != "ok"), rows[0].reason
    assert last or (rows[1].id, rows[1].crystal.formula) == ("last", "Fe")


HYDRIDE = Structure(Lattice.cubic(4), ["Li", "H"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("form", ["cif", "json", "extxyz", "POSCAR", "optimade"])
def test_deuterium_is_hydrogen_in_every_format(tmp_path, form):
    source = tmp_path / ("POSCAR" if form == "POSCAR" else f"a.{form}")
    match form:
        case "cif":
            source.write_text(str(CifWriter(HYDRIDE)).replace("  H  H1", "  D  D1"))
        case "json":
            source.write_text(json.dumps(HYDRIDE.as_dict()).replace('"H"', '"D"'))
        case "extxyz":
            source.write_text(f"2\n{FRAME}\nLi 0 0 0\nD 2 2 2\n")
        case "POSCAR":
            source.write_text("d\n1\n4 0 0\n0 4 0\n0 0 4\nLi D\n1 1\nDirect\n0 0 0\n.5 .5 .5\n")
        case "optimade":
            source = tmp_path / "a.json"
            source.write_text(json.dumps([optimade(HYDRIDE)]).replace('"H"', '"D"'))
    row = one(source)
    assert row.crystal.formula == "HLi" and row.notes == ("deuterium (D) read as hydrogen",), row.reason


def test_what_is_in_memory(tmp_path):
    atoms = AseAtomsAdaptor.get_atoms(SALT)
    slab = atoms.copy()
    slab.pbc = (True, True, False)
    crystal = Crystal.from_structure(SALT)
    disordered = Structure(SALT.lattice, [{"Na": 0.5, "K": 0.5}, "Cl"], SALT.frac_coords)
    found = read([SALT, atoms, crystal, SALT.as_dict(), CIF, disordered, slab, None, 3])
    outcomes = ["ok"] * 5 + ["disordered", "not_periodic", "missing", "json_error"]
    assert [row.outcome for row in found.rows] == outcomes and not found.has_ids
    assert all(is_salt(row.crystal) for row in found.rows[:5])
    assert read([SALT]).sha256 == read([SALT.copy()]).sha256 != read([RUTILE]).sha256
    table = pd.DataFrame({"structure": [SALT, None], "band_gap": [1.5, 2.0]}, index=["a", "b"])
    rows = read(table).rows
    assert [(row.id, row.outcome, row.labels) for row in rows] == [
        ("a", "ok", {"band_gap": 1.5}),
        ("b", "missing", {"band_gap": 2.0}),
    ]
    for empty in ([], pd.DataFrame({"cif": []})):
        with pytest.raises(UserError, match="there are no crystals"):
            read(empty)


def test_the_embedded_set_is_a_source_for_both(tmp_path):
    rows = read("prototypes:validation").rows
    assert rows and all(row.crystal is not None and row.labels["spacegroup.number"] for row in rows)
    report = prepare(["prototypes:validation"], tmp_path, max_atoms=None, workers=1)
    assert (report.parts[0].part, report.parts[0].kept) == ("prototypes_validation", len(rows))


symbols = st.sampled_from(["H", "Li", "O", "Fe", "Xe", "U"])
coordinates = st.tuples(*[st.floats(-2, 2, allow_nan=False)] * 3)
cells = st.tuples(*[st.floats(2, 30)] * 3, *[st.floats(65, 115)] * 3)


@settings(max_examples=40, deadline=None)
@given(cells, st.lists(st.tuples(symbols, coordinates), min_size=1, max_size=6), st.booleans())
def test_one_crystal_is_the_same_from_every_format(tmp_path_factory, cell, sites, left):
    structure = Structure(Lattice.from_parameters(*cell), [s for s, _ in sites], [x for _, x in sites])
    structure = left_handed(structure) if left else structure
    folder = tmp_path_factory.mktemp("formats")
    atoms = AseAtomsAdaptor.get_atoms(structure)
    (folder / "a.json").write_text(json.dumps(structure.as_dict()))
    ase.io.write(folder / "b.json", atoms)
    (folder / "c.json").write_text(json.dumps([optimade(structure)]))
    (folder / "d.json").write_text(json.dumps([{"atoms": jarvis(structure)}]))
    ase.io.write(folder / "e.extxyz", atoms)
    expected = Crystal.from_structure(structure)
    for source in (*sorted(folder.iterdir()), structure, [atoms], expected):
        found = one(source).crystal
        assert found.symbols == expected.symbols
        assert np.allclose([*found.lengths, *found.angles], [*expected.lengths, *expected.angles], rtol=0, atol=1e-6)
        shift = found.frac_coords - expected.frac_coords
        assert np.abs(shift - np.round(shift)).max() < 1e-7


def test_a_line_that_is_no_json_costs_itself(tmp_path):
    text = json.dumps({"material_id": "a\u2028b", "structure": SALT.as_dict()}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{text}\n{text[:50]}\n{text}\n")
    rows = read(tmp_path / "a.jsonl").rows
    assert [row.outcome for row in rows] == ["ok", "json_error", "ok"] and rows[1].reason.startswith(
        "line 2 is no JSON"
    )


@pytest.mark.parametrize("content", ['{"a": {"b": 1, "b": 2}}', '[{"structure": 1, "structure": 2}]'])
def test_a_key_that_occurs_twice_refuses_the_document(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"the key '.*' occurs twice"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["entries", "structures", "results"])
def test_a_list_under_a_name(tmp_path, name):
    (tmp_path / "a.json").write_text(json.dumps({name: [{"material_id": "a", "structure": SALT.as_dict()}], "n": 1}))
    assert one(tmp_path / "a.json").id == "a"


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_what_excel_separates_by(tmp_path, separator):
    pd.DataFrame({"material_id": ["a"], "cif": [CIF]}).to_csv(tmp_path / "a.csv", index=False, sep=separator)
    assert one(tmp_path / "a.csv").id == "a"
    (tmp_path / "b.csv").write_text(f"sep={separator}\n" + (tmp_path / "a.csv").read_text())
    assert one(tmp_path / "b.csv").id == "a"


def test_bytes_and_nothing_as_text(tmp_path):
    rows = [{"id": "a", "cif": str(CIF.encode())}, *({"id": x, "cif": x} for x in ("nan", "None", "NULL"))]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    assert [row.outcome for row in read(tmp_path / "a.csv").rows] == ["ok", "missing", "missing", "missing"]


def test_tables_of_pandas_in_their_usual_forms():
    table = pd.DataFrame({"material_id": ["a", "b"], "cif": pd.array([CIF, None], dtype="string")})
    for found in (read(table), read(table.set_index("material_id", drop=False)), read(table.set_index("material_id"))):
        assert [(row.id, row.outcome) for row in found.rows] == [("a", "ok"), ("b", "missing")] and found.has_ids
    double = table.assign(run=[1, 1]).set_index(["run", "material_id"])
    assert [row.id for row in read(double).rows] == ["1/a", "1/b"]
    ids = pd.DataFrame({"ID": [7.0, None], "cif": [CIF, CIF]})
    assert [row.id for row in read(ids).rows] == ["7", "1"]


def test_what_is_no_path():
    assert is_salt(one(CIF).crystal)
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(UserError):
            read(path)


def test_what_systems_leave_in_a_folder(tmp_path):
    (tmp_path / "a.cif").write_text(CIF)
    for name in ("._a.cif", "POSCAR.swp", "POSCAR.tar", "POSCAR~"):
        (tmp_path / name).write_text("x")
    found = read(tmp_path)
    assert [row.id for row in found.rows] == ["a"] and sum(map(len, found.unread.values())) == 4


def test_reading_a_table_leaves_the_csv_module_as_it_was(tmp_path):
    before = csv.field_size_limit()
    pd.DataFrame({"cif": [CIF + "# " + "x" * 200_000]}).to_csv(tmp_path / "a.csv", index=False)
    assert is_salt(one(tmp_path / "a.csv").crystal) and csv.field_size_limit() == before
