"""Crystals from memory become what the reader makes of the same in a file: typed outcomes, exact numbers, ids."""

import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk
from pymatgen.core import DummySpecies, Lattice, Species, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry

import jaxcrystal
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
ODD = Crystal([3.1, 4.7, 5.9], [71.3, 88.8, 119.99999999], [3, 8], [[0.1, 0.2, 0.3], [0.123456789, 0.5, 0.999]])


def cell(*sites, edge=4.0):
    return Structure(Lattice.cubic(edge), [species for species, _ in sites], [[x, 0, 0] for _, x in sites])


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        (SALT, "ok"),
        (SALT.copy().add_oxidation_state_by_element({"Na": 1, "Cl": -1}), "ok"),
        (bulk("NaCl", "rocksalt", a=5.69), "ok"),
        (ComputedStructureEntry(SALT, -3.0), "ok"),
        (SALT.as_dict(), "ok"),
        (ODD, "ok"),
        (SALT.to(fmt="cif"), "ok"),
        (None, "missing"),
        (7, "json_error"),
        ("data_x\n_cell_length_a 3\n", "cif_error"),
        (cell(({"Na": 0.5, "K": 0.5}, 0)), "disordered"),
        (cell(({"Na": 0.5}, 0)), "disordered"),
        (cell((DummySpecies("X"), 0)), "unknown_element"),
        (cell((Species("Fe", 2), 0), ("O", np.nan)), "not_finite"),
        (Structure(Lattice.cubic(3.0, pbc=(True, True, False)), ["Na"], [[0, 0, 0]]), "not_periodic"),
        (cell(("Na", 0), edge=300.0), "cell_error"),
        (Atoms("Na", cell=[3, 3, 3], pbc=(True, True, False)), "not_periodic"),
        (Atoms("Na", [[1, 2, 3]]), "not_periodic"),
        (Atoms("Na", [[1, 2, 3]], pbc=True), "not_periodic"),
        (Atoms("Na", [[np.inf, 2, 3]], cell=[3, 3, 3], pbc=True), "not_finite"),
        (Atoms("X", cell=[3, 3, 3], pbc=True), "unknown_element"),
    ],
)
def test_what_is_no_crystal_is_typed(given, outcome):
    found = jaxcrystal.read([given])
    assert (found.outcomes, found.ids) == ([outcome], ["0"])
    assert (found[0].crystal is None) == (outcome != "ok") == bool(found[0].reason)


def test_shared_sites_of_ase_are_disordered():
    atoms = bulk("NaCl", "rocksalt", a=5.69)
    atoms.info["occupancy"] = {"0": {"Na": 0.5, "K": 0.5}, "1": {"Cl": 1.0}}
    atoms.set_array("spacegroup_kinds", np.array([0, 1]))
    (row,) = jaxcrystal.read(atoms)
    assert row.outcome == "disordered" and "K" in row.reason
    atoms.info["occupancy"]["0"] = {"Na": 1.0}
    assert jaxcrystal.read(atoms).outcomes == ["ok"]


def test_numbers_are_kept():
    (read,) = jaxcrystal.read(ODD)
    assert read.crystal == ODD  # bit for bit
    for given in (SALT, bulk("Zn"), ODD.to_structure(), ODD.to_atoms()):
        (row,) = jaxcrystal.read(given)
        theirs = given.lattice if isinstance(given, Structure) else given.cell
        lengths, angles = (theirs.abc, theirs.angles) if isinstance(given, Structure) else np.split(theirs.cellpar(), 2)
        np.testing.assert_allclose(row.crystal.lengths, lengths, atol=2**-24)
        np.testing.assert_allclose(row.crystal.angles, angles, atol=2**-23)
        coords = given.frac_coords if isinstance(given, Structure) else given.get_scaled_positions(wrap=False)
        apart = (row.crystal.frac_coords - coords + 0.5) % 1 - 0.5
        np.testing.assert_allclose(apart, 0, atol=2**-32)
        symbols = [s.specie.symbol for s in given] if isinstance(given, Structure) else given.get_chemical_symbols()
        assert row.crystal.symbols == symbols


@pytest.mark.parametrize(
    ("given", "ids", "named"),
    [
        ([SALT, None], ["0", "1"], False),
        ((s for s in (SALT, ODD.to_atoms())), ["0", "1"], False),
        ([ODD, SALT.to(fmt="cif")], ["0", "1"], False),
        ({"x": SALT, "y": None}, ["x", "y"], True),
        ({"x": ODD, 7: ODD}, ["x", "7"], True),
        (pd.Series([SALT, None]), ["0", "1"], False),
        (pd.Series([ODD.to_cif(), ODD], index=["x", "y"]), ["x", "y"], True),
        (pd.DataFrame({"structure": [SALT, SALT]}), ["0", "1"], False),
        (pd.DataFrame({"structure": [SALT, SALT], "material_id": ["x", "y"], "e": [1, 2]}), ["x", "y"], True),
        (pd.DataFrame({"structure": [ODD, None]}, index=["x", "y"]), ["x", "y"], True),
        (pd.DataFrame({"cif": [ODD.to_cif()] * 2}, index=[10, 20]), ["10", "20"], True),
        (pd.DataFrame({"cif": [ODD.to_cif()] * 2, "material_id": ["x", "y"]}), ["x", "y"], True),
    ],
    ids=[f"source{i}" for i in range(12)],
)
def test_ids_are_those_of_the_source(given, ids, named):
    found = jaxcrystal.read(given)
    assert found.ids == ids and found.source.has_ids == named
    assert set(found.outcomes) <= {"ok", "missing"} and found.outcomes[0] == "ok"


def test_what_was_read_is_read_again_as_it_is():
    found = jaxcrystal.read([cell(({"Na": 0.5}, 0)), SALT, None, SALT])
    again = jaxcrystal.read(found)
    assert list(again) == list(found) and again.source.sha256 == found.source.sha256
    assert list(jaxcrystal.read(found, limit=2)) == list(found)[:2] == list(jaxcrystal.read(found[:2]))
    part = found[1:]
    assert [row.row for row in part] == [1, 2, 3] and part.source.sha256 != found.source.sha256


def test_labels_are_kept_with_every_digit():
    energy = -1.2345678901234567
    for column in ({"structure": [SALT, SALT]}, {"cif": [ODD.to_cif()] * 2}):
        table = pd.DataFrame({**column, "formation_energy_per_atom": [energy, np.nan], "mine": np.array([1, 2])})
        found = jaxcrystal.read(table)
        assert found[0].labels["formation_energy_per_atom"] == energy
        assert found.source.ignored_columns == ("mine",)
        again = jaxcrystal.read(found.to_pandas())
        assert again[0].labels["formation_energy_per_atom"] == energy and again.crystals == found.crystals


def test_a_site_property_does_not_stop_a_structure():
    magnetic = SALT.copy(site_properties={"force": np.zeros((8, 3)).tolist(), "m": [np.float64(1)] * 8})
    assert jaxcrystal.read(magnetic).outcomes == ["ok"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"there are no crystals"),
        ({}, r"there are no crystals"),
        (pd.DataFrame({"cif": []}), r"there are no crystals"),
        (pd.DataFrame({"energy": [1.0]}), r"no column of crystals; its columns are energy"),
        (pd.DataFrame({"my_structure": [SALT], "its_atoms": [SALT]}), r"several columns that may hold the crystals"),
        ("nowhere.csv", r"nowhere\.csv does not exist"),
    ],
    ids=str,
)
def test_what_holds_no_crystals_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        jaxcrystal.read(given)


def test_a_list_may_mix_kinds():
    found = jaxcrystal.read([SALT, ODD, bulk("Cu"), SALT.to(fmt="cif"), 7])
    assert found.outcomes == ["ok"] * 4 + ["json_error"] and "a int is no structure" in found[4].reason
