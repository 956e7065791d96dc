"""The stored data set: what is stored is what is loaded, and what is no data set is refused by name."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import Crystal, CrystalBatch, cell_volume
from jaxcrystal.crystals.dataset import CrystalSet, load, store, written_whole
from jaxcrystal.errors import UserError

ROCK_SALT = Crystal([5.69] * 3, [90] * 3, [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
IRON = Crystal([2.5] * 3, [109.47] * 3, [26], [[0.1, 0.2, 1 / 3]])
KNOWN = {
    "pretty_formula": "NaCl",
    "elements": ["Cl", "Na"],
    "spacegroup.number": 225,
    "formation_energy_per_atom": -2.1,
    "band_gap": 5.0,
    "e_above_hull": 0.0,
}


def coordinates():
    return st.floats(-2, 2, allow_nan=False) | st.integers(0, 2**32).map(lambda k: k / 2**32)


@st.composite
def crystals(draw) -> Crystal:
    angle = st.floats(60, 119)
    angles = draw(st.tuples(angle, angle, angle).filter(lambda a: cell_volume(np.ones(3), np.array(a)) > 0.01))
    species = draw(st.lists(st.integers(1, 118), min_size=1, max_size=8))
    coords = draw(st.lists(st.tuples(*[coordinates()] * 3), min_size=len(species), max_size=len(species)))
    return Crystal(draw(st.tuples(*[st.floats(0.1, 255.9)] * 3)), angles, species, coords)


def attribute_sets():
    values = {
        "pretty_formula": st.text(max_size=5),
        "elements": st.lists(st.sampled_from(["Na", "Cl", "Fe"]), unique=True).map(sorted),
        "spacegroup.number": st.integers(1, 230),
        "formation_energy_per_atom": st.floats(-10, 10),
        "band_gap": st.floats(0, 20),
        "e_above_hull": st.floats(0, 1),
    }
    return st.fixed_dictionaries({}, optional=values)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.text(max_size=8), crystals(), attribute_sets()), max_size=6))
def test_what_is_stored_is_loaded_bit_for_bit(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "part.parquet"
    ids, structures, known = ([row[column] for row in rows] for column in range(3))
    store(CrystalSet.from_crystals(ids, structures, known), path, {})
    loaded = load(path)

    assert loaded.ids == tuple(ids) and len(loaded) == len(rows)
    assert [loaded.crystal(i) for i in range(len(loaded))] == structures
    assert [loaded.attributes(i) for i in range(len(loaded))] == [
        {name: row[name] for name in ATTRIBUTES if name in row} for row in known
    ]
    expected = CrystalBatch.from_crystals(structures)
    for name in ("lengths", "angles", "species", "frac_coords", "num_atoms"):
        got, want = getattr(loaded.batch, name), getattr(expected, name)
        assert got.dtype == want.dtype and np.array_equal(got, want), name


def test_the_file_reads_in_natural_units_and_says_where_it_came_from(tmp_path):
    path = tmp_path / "part.parquet"
    store(CrystalSet.from_crystals(["a", "b"], [ROCK_SALT, IRON], [KNOWN, {}]), path, {"source": "x.csv"})
    rows = pq.read_table(path).to_pylist()
    assert rows[0]["lengths"] == pytest.approx([5.69] * 3, abs=1e-7)
    assert rows[0]["frac_coords"] == [0, 0, 0, 0.5, 0.5, 0.5]
    assert rows[0]["species"] == [11, 17]
    assert {name: rows[0][name] for name in ATTRIBUTES} == KNOWN
    assert all(rows[1][name] is None for name in ATTRIBUTES)  # missing is null, not NaN and not 0
    assert json.loads(pq.read_schema(path).metadata[dataset.PROVENANCE]) == {"source": "x.csv"}


def test_a_bare_accelerator_host_loads(tmp_path):
    path = tmp_path / "part.parquet"
    store(CrystalSet.from_crystals(["a"], [IRON], [{}]), path, {})
    absent = "import sys; sys.modules.update(dict.fromkeys(['pymatgen', 'ase', 'torch', 'matgl']))"
    code = f"{absent}; from jaxcrystal.crystals.dataset import load; print(len(load({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_labels_and_attributes_are_the_same_list():
    assert tuple(dataset.LABELS.names) == ATTRIBUTES


def test_off_grid_numbers_land_where_crystal_puts_them(tmp_path):
    path = tmp_path / "part.parquet"
    store(CrystalSet.from_crystals(["a"], [IRON], [{}]), path, {})
    table = pq.read_table(path)
    lengths, angles, coords = [2.1, 3.3, 4.7], [91.23456789, 88.1, 119.99999999999], [-0.1, 1.0, 1 - 1e-12]
    for name, values in (("lengths", lengths), ("angles", angles), ("frac_coords", coords)):
        index = table.column_names.index(name)
        table = table.set_column(index, dataset.SCHEMA.field(name), pa.array([values], dataset.SCHEMA.field(name).type))
    pq.write_table(table, path)
    assert load(path).crystal(0) == Crystal(lengths, angles, [26], [coords])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("lengths", [1.0, float("nan"), 1.0], "lengths must lie"),
        ("lengths", [1.0, 300.0, 1.0], "lengths must lie"),
        ("angles", [90.0, 90.0, 180.0], "angles must lie"),
        ("angles", [150.0, 150.0, 150.0], "close no cell"),
        ("species", [11, 119], "atomic numbers run"),
        ("species", [], "no atoms"),
        ("species", None, "species is null"),
        ("frac_coords", [0.0] * 5, "three coordinates an atom"),
        ("frac_coords", [0.0] * 5 + [float("inf")], "not a finite number"),
    ],
)
def test_a_row_that_is_no_crystal_is_named(tmp_path, column, value, message):
    path = tmp_path / "part.parquet"
    store(CrystalSet.from_crystals(["good", "bad"], [ROCK_SALT] * 2, [{}, {}]), path, {})
    table = pq.read_table(path)
    values = [table[column][0].as_py(), value]
    field = dataset.SCHEMA.field(column)
    pq.write_table(table.set_column(table.column_names.index(column), field, pa.array(values, field.type)), path)
    with pytest.raises(UserError, match=rf"part.parquet, row 1 \(bad\): .*{message}.*jaxcrystal prepare"):
        load(path)


def test_what_is_no_data_set_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the data set .*absent"):
        load(tmp_path / "absent.parquet")
    with pytest.raises(UserError, match="cannot read the data set"):
        load(tmp_path)  # a folder
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"text.parquet is no parquet file; run `jaxcrystal prepare"):
        load(tmp_path / "text.parquet")
    pq.write_table(pa.table({"material_id": ["a"], "cif": ["data_x"]}), tmp_path / "raw.parquet")
    with pytest.raises(UserError, match=r"no column 'lengths'.*run `jaxcrystal prepare"):
        load(tmp_path / "raw.parquet")
    path = tmp_path / "typed.parquet"
    store(CrystalSet.from_crystals(["a"], [IRON], [{}]), path, {})
    table = pq.read_table(path)
    index = table.column_names.index("band_gap")
    pq.write_table(table.set_column(index, "band_gap", pa.array(["1.0"])), path)
    with pytest.raises(UserError, match=r"column 'band_gap' holds string, expected double"):
        load(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "part.parquet"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"cannot write .*choose another place"), written_whole(path / "below") as _:
        pass


def test_the_embedded_set_splits_by_formula_and_always_alike(monkeypatch):
    formulas = [f"A{i}B" for i in range(2000)]
    cards = [SimpleNamespace(crystal=ROCK_SALT, prototype="rock_salt", formula=f, spacegroup=225) for f in formulas]
    module = SimpleNamespace(embedded=lambda: cards)
    monkeypatch.setitem(sys.modules, "jaxcrystal.crystals.prototypes", module)
    train, validation, everything = (load(f"prototypes{side}") for side in (":train", ":validation", ""))
    assert set(train.ids).isdisjoint(validation.ids)
    assert {*train.ids, *validation.ids} == set(everything.ids) and len(everything) == 2000
    assert 60 < len(validation) < 140  # 1 in 20
    assert everything.attributes(0) == {"pretty_formula": "A0B", "elements": ["Cl", "Na"], "spacegroup.number": 225}
    assert sorted(validation.ids)[:3] == [
        "rock_salt/A1011B",
        "rock_salt/A1015B",
        "rock_salt/A1046B",
    ]  # as on any machine
    with pytest.raises(UserError, match="prototypes:test does not exist"):
        load("prototypes:test")
