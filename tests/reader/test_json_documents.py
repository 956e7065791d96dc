"""What pymatgen and pandas write is read back, in every shape; what is broken is an outcome of its own."""

import bz2
import copy
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monty.serialization import dumpfn
from pymatgen.core import Lattice, Species, Structure
from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.reading import read

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
RUTILE = Structure.from_spacegroup(
    "P4_2/mnm", Lattice.tetragonal(4.59, 2.96), [Species("Ti", 4), Species("O", -2)], [[0, 0, 0], [0.305, 0.305, 0]]
)
BOTH = [Crystal.from_structure(SALT), Crystal.from_structure(RUTILE)]


def entry(structure, name):
    return ComputedStructureEntry(structure, -3.0 * len(structure), entry_id=name)


def written(folder, content, name="crystals.json"):
    path = folder / name
    dumpfn(content, path)  # monty, as pymatgen's users do; packs by the name's ending
    return path


def same(found: Crystal, expected: Crystal) -> bool:
    shift = found.frac_coords - expected.frac_coords
    return (
        np.allclose(found.lengths, expected.lengths, rtol=0, atol=1e-6)
        and np.allclose(found.angles, expected.angles, rtol=0, atol=1e-6)
        and found.symbols == expected.symbols
        and np.abs(shift - np.round(shift)).max() < 1e-8
    )


def pandas_json(orient):
    """As matbench and matbench-discovery publish tables: pandas and `as_dict`."""
    rows = {"structure": [SALT.as_dict(), RUTILE.as_dict()], "e_form": [-2.1, -3.0], "material_id": ["a", "b"]}
    return json.loads(pd.DataFrame(rows, index=[7, 8]).to_json(orient=orient))


SHAPES = {
    "list": ([SALT, RUTILE], ["0", "1"]),
    "by_id": ({"a": SALT, "b": RUTILE}, ["a", "b"]),
    "by_id_that_reads_like_a_column": ({"a_structure": SALT, "b_structure": RUTILE}, ["a_structure", "b_structure"]),
    "rows": ([{"structure": SALT, "material_id": "a"}, {"gap": 1.0, "structure": RUTILE}], ["a", "1"]),
    "rows_by_id": ({"a": {"initial_structure": SALT}, "b": {"structure": RUTILE, "old_structure": SALT}}, ["a", "b"]),
    "entries": ([entry(SALT, "a"), entry(RUTILE, "b")], ["a", "b"]),
    "entries_in_rows": ([{"computed_structure_entry": entry(SALT, "a")}, {"entry": entry(RUTILE, "b")}], ["0", "1"]),
    "columns": (pandas_json("columns"), ["a", "b"]),
    "split": (pandas_json("split"), ["a", "b"]),
    "records": (pandas_json("records"), ["a", "b"]),
    "index": (pandas_json("index"), ["a", "b"]),
}


@pytest.mark.parametrize("name", ["crystals.json", "crystals.json.gz", "crystals.json.bz2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_which_structures_are_kept(tmp_path, shape, name):
    content, ids = SHAPES[shape]
    samples = read(written(tmp_path, content, name)).rows
    assert [(s.id, s.row, s.outcome, s.reason) for s in samples] == [(ids[0], 0, "ok", ""), (ids[1], 1, "ok", "")]
    assert all(same(s.crystal, crystal) for s, crystal in zip(samples, BOTH, strict=True))


@pytest.mark.parametrize("content", [SALT, entry(SALT, "a"), {"structure": SALT, "material_id": "a"}])
def test_one_alone(tmp_path, content):
    (sample,) = read(written(tmp_path, content)).rows
    assert same(sample.crystal, BOTH[0]) and sample.id == ("0" if content is SALT else "a")


def changed(**changes):
    """Rock salt's dictionary with one site, or the lattice, other than pymatgen would have it."""
    found = copy.deepcopy(SALT.as_dict())
    for name, value in changes.items():
        if name in ("matrix", "pbc"):
            found["lattice"][name] = value
        else:
            found["sites"][1][name] = value
    return found


def without(structure, name):
    return {key: value for key, value in structure.items() if key != name}


@pytest.mark.parametrize(
    ("item", "outcome", "reason"),
    [
        (None, "json_error", "no structure"),
        ("NaCl", "json_error", "'NaCl' is neither JSON nor CIF"),
        ({}, "json_error", "expected one structure"),
        ({"structure": None}, "missing", "the row has no structure"),
        ({"a_structure": SALT.as_dict(), "an_entry": {}}, "json_error", "several: a_structure, an_entry"),
        (ComputedEntry("NaCl", -6.0).as_dict(), "json_error", "expected one structure, with lattice and sites"),
        (without(SALT.as_dict(), "sites"), "json_error", "expected one structure"),
        (SALT.as_dict() | {"lattice": {}}, "json_error", "the structure has no matrix"),
        (SALT.as_dict() | {"sites": []}, "no_atoms", "no atoms"),
        (changed(abc=[0.5, 0.5]), "json_error", ""),
        (changed(abc=["half", 0.5, 0.5]), "json_error", "half"),
        (changed(abc=[float("nan"), 0.5, 0.5]), "not_finite", "a coordinate"),
        (changed(matrix=[[4, 0, 0], [0, 4, 0]]), "cell_error", "three vectors"),
        (changed(matrix=[[4, 0, 0], [0, 4, 0], [0, 0, float("inf")]]), "not_finite", "a cell vector"),
        (changed(matrix=[[4, 0, 0], [0, 4, 0], [0, 0, 0]]), "cell_error", "length 0"),
        (changed(matrix=[[4, 0, 0], [4, 0, 0], [0, 0, 4]]), "cell_error", "angles must lie"),
        (changed(pbc=[True, True, False]), "not_periodic", "not periodic"),
        (changed(species=[{"element": "Qq", "occu": 1}]), "unknown_element", "'Qq' is no chemical element"),
        (changed(species=[{"element": "Na", "occu": 0.5}]), "disordered", "partially"),
        (changed(species=[{"element": "Na", "occu": 0.5}, {"element": "K", "occu": 0.5}]), "disordered", "K"),
        (changed(species=[]), "json_error", ""),
    ],
)
def test_each_failure_is_an_outcome_and_costs_only_itself(tmp_path, item, outcome, reason):
    path = tmp_path / "crystals.json"
    path.write_text(json.dumps([item, SALT.as_dict()]))
    first, second = read(path).rows
    assert (first.outcome, first.crystal) == (outcome, None) and reason in first.reason and first.reason
    assert second.outcome == "ok"


def test_atoms_that_coincide_are_both_kept(tmp_path):
    path = tmp_path / "crystals.json"
    path.write_text(json.dumps(changed(abc=[0.0, 0.0, 0.0])))
    (sample,) = read(path).rows
    assert len(sample.crystal) == 8


@pytest.mark.parametrize(
    "content", [b"[", b"", b"3", b"\x1f\x8bno", b"BZhno", b"\xff\xfe", gzip.compress(b"[1,", mtime=0)]
)
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "crystals.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"crystals\.json (is no JSON|is empty|holds|cannot be unpacked)"):
        read(path)
    path.write_bytes(bz2.compress(b"[]"))
    with pytest.raises(UserError, match="holds no crystals"):
        read(path)


symbols = st.sampled_from(["H", "Li", "O", "Fe", "Xe", "U"])
coordinates = st.tuples(*[st.floats(-2, 2, allow_nan=False)] * 3)
atoms = st.lists(st.tuples(symbols, coordinates), min_size=1, max_size=6)
cells = st.tuples(*[st.floats(2, 30)] * 3, *[st.floats(65, 115)] * 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, atoms), min_size=1, max_size=4))
def test_whatever_pymatgen_writes_is_read_back(tmp_path_factory, drawn):
    structures = [
        Structure(Lattice.from_parameters(*cell), [s for s, _ in sites], [x for _, x in sites]) for cell, sites in drawn
    ]
    path = written(tmp_path_factory.mktemp("json"), structures, "crystals.json.gz")
    samples = read(path).rows
    assert len(samples) == len(structures)
    assert all(same(x.crystal, Crystal.from_structure(s)) for x, s in zip(samples, structures, strict=True))
