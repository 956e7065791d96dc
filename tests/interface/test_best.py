"""Which crystals are shown and written, of many."""

from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

import jaxcrystal
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.interface.tables import Attempts
from jaxcrystal.sampling.attempt import Attempt

SVG = "{http://www.w3.org/2000/svg}"


def rock_salt(one: str, other: str, a: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [one, other], [[0, 0, 0], [0.5, 0.5, 0.5]])


SALTS = [rock_salt("Na", "Cl", 5.69), rock_salt("K", "Cl", 6.38), rock_salt("Mg", "O", 4.24)]


@pytest.mark.parametrize("form", ["cif", "poscar"])
def test_crystals_are_written_and_read_again(form, tmp_path):
    crystals = jaxcrystal.read({"a/b": SALTS[0], "a b": SALTS[0], "nothing": None, "ü": SALTS[2]})
    paths = crystals.write(tmp_path / "out", form)
    ending = {"cif": ".cif", "poscar": ".vasp"}[form]
    assert [p.name for p in paths] == [f"NaCl_a-b{ending}", f"NaCl_a-b-2{ending}", f"MgO_-{ending}"]
    again = jaxcrystal.read(tmp_path / "out")
    assert again.counts == {"ok": 3}
    for structure, row in zip([SALTS[2], SALTS[0], SALTS[0]], again, strict=True):
        assert sorted(row.crystal.species) == sorted(s.specie.Z for s in structure)
        np.testing.assert_allclose(row.crystal.lengths, structure.lattice.abc, atol=1e-6)
        assert row.crystal.to_structure().matches(structure)
    with pytest.raises(jaxcrystal.UserError, match=r"out exists and is not an empty folder; choose another"):
        crystals.write(tmp_path / "out", form)


def test_crystals_are_written_in_forms_that_there_are(tmp_path):
    with pytest.raises(jaxcrystal.UserError, match="crystals are written as cif or poscar, not as 'xyz'"):
        jaxcrystal.read(SALTS).write(tmp_path / "out", "xyz")
    (tmp_path / "file").touch()
    with pytest.raises(jaxcrystal.UserError, match="file/below: Not a directory"):
        jaxcrystal.read(SALTS).write(tmp_path / "file/below")


def test_the_best_attempts_are_the_likeliest_a_token():
    texts = [
        "Na 1 Cl 1\n225\nNa a\nCl b\n5.69",
        "Na 1 Cl 1\n225\nNa a\nCl b\n5.70",
        "K 1 Cl 1\n225\nK a\nCl b\n6.38",
        "K",
    ]
    known = [(texts[0], -8.0, 20), (texts[1], -9.0, 30), (texts[0], -8.0, 20), (texts[2], -2.0, 4), (texts[3], -1.0, 9)]
    rows = [
        Attempt(
            i, i, 0, "", "{}", text, "truncated" if text == "K" else "ok", log_p, 0.0, tokens, None, None, None, None,
            written_group=225,
        )
        for i, (text, log_p, tokens) in enumerate(known)
    ]  # fmt: skip
    best = Attempts(rows).best(3)
    assert best.ids == ["1", "0", "3"] and Attempts(rows).best(1).ids == ["1"]


def table() -> pd.DataFrame:
    cifs = [Crystal.from_structure(s).to_cif() for s in SALTS]
    columns = {
        "id": ["a", "b", "c", "d", "e"],
        "row": range(5),
        "cif": [""] * 5,
        "relaxed_cif": [cifs[0], cifs[1], cifs[2], cifs[0], None],
        "e_above_hull": [0.05, -0.01, 0.02, 0.04, None],
        "formation_energy_per_atom": [-2.0] * 5,
        "unique_relaxed": [False, True, True, True, False],
        "novel_relaxed": [True, False, True, True, False],
        "known_as_relaxed": [None, "mp-22851", None, None, None],
    }
    return pd.DataFrame(columns)


def test_the_best_of_an_evaluation_are_the_nearest_to_the_hull(tmp_path):
    found = jaxcrystal.Evaluation(tmp_path, {}, table())
    best = found.best(5)
    assert best.ids == ["c", "d"] and best["c"].crystal == Crystal.from_structure(SALTS[2])
    assert best["c"].labels == {"e_above_hull": 0.02, "formation_energy_per_atom": -2.0, "known_as": None}
    known = found.best(1, new=False)
    assert known.ids == ["b"] and known["b"].labels["known_as"] == "mp-22851"
    assert list(best.to_pandas()["e_above_hull"]) == [0.02, 0.04]
    svg = ElementTree.fromstring(found.pictures(5)._repr_svg_())
    assert len(svg.findall(f"{SVG}g/{SVG}svg")) == 2 and "+0.020 eV/atom" in list(svg.itertext())
    with pytest.raises(jaxcrystal.UserError, match="no distances to a hull; evaluate with a potential and a hull"):
        jaxcrystal.Evaluation(tmp_path, {}, table().drop(columns="e_above_hull")).best(1)


def test_pictures_are_of_crystals_alone(tmp_path):
    crystals = jaxcrystal.read({"<b>": SALTS[0], "nothing": None, "c": SALTS[1], "d": SALTS[2]})
    path = crystals.pictures(2).write(tmp_path / "two.svg")
    svg = ElementTree.parse(path).getroot()
    assert len(svg.findall(f"{SVG}g/{SVG}svg")) == 2 and svg.get("width") == "300"
    assert {"<b>", "c"} < set(svg.itertext()) and "d" not in set(svg.itertext())
    ids = [element.get("id") for element in svg.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) == 4  # colours of each picture are its own
    many = ElementTree.fromstring(jaxcrystal.read(SALTS * 5).pictures(7).svg)
    assert (many.get("width"), many.get("height")) == ("900", "380")
    assert ElementTree.fromstring(crystals[1:2].pictures().svg).findall(f"{SVG}g") == []
    with pytest.raises(jaxcrystal.UserError, match=r"cannot write .*nowhere/x.svg: No such file or directory"):
        crystals.pictures().write(tmp_path / "nowhere/x.svg")
