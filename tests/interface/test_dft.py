"""Inputs of DFT calculations: what was chosen, and nothing but what pymatgen itself reads back."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from ase.io.espresso import read_espresso_in, read_fortran_namelist
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp import Incar, Kpoints, Poscar
from pymatgen.io.vasp.sets import MPRelaxSet

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.interface import dft

#: Sites of an element do not stand together: POSCAR, MAGMOM and LDAUU must agree on an order of their own.
OXIDE = Structure(
    Lattice.orthorhombic(4.1, 4.3, 4.5),
    ["O", "Fe", "Li", "O", "Fe"],
    [[0.52, 0.5, 0.5], [0, 0.03, 0], [0.5, 0, 0.5], [0, 0.5, 0.47], [0.5, 0.46, 0]],
)
METAL = Structure(Lattice.hexagonal(2.9, 4.6), ["Yb", "Co"], [[0, 0, 0], [1 / 3, 2 / 3, 0.5]])
POLONIUM = Structure(Lattice.cubic(3.35), ["Po"], [[0, 0, 0]])
SSSP = {
    "O": {"filename": "O.upf", "cutoff_wfc": 50, "cutoff_rho": 400.0, "md5": "0"},
    "Fe": {"filename": "Fe.upf", "cutoff_wfc": 90.0, "cutoff_rho": 1080.0, "md5": "0"},
    "Li": {"filename": "Li.upf", "cutoff_wfc": 40.0, "cutoff_rho": 320.0, "md5": "0"},
}


def cif(structure: Structure) -> str:
    return Crystal.from_structure(structure).to_cif()


@pytest.fixture
def evaluation(tmp_path):
    """Attempts: one that relaxed, one that did not, no crystal, an element without POTCAR, a known one."""
    strained = OXIDE.copy().apply_strain(0.04)
    columns = {
        "id": ["../a", "b", "c", "d", "e"],
        "row": [0, 1, 2, 3, 7],
        "outcome": ["ok", "ok", "unreadable", "ok", "ok"],
        "reason": ["", "", "it is no CIF", "", ""],
        "cif": [cif(strained), cif(METAL), "broken", cif(POLONIUM), cif(METAL)],
        "relaxed_cif": [cif(OXIDE), None, None, cif(POLONIUM), cif(METAL)],
        "e_above_hull": [0.05, None, None, 0.01, -0.02],
        "formation_energy_per_atom": [-2.0] * 5,
        "relaxation": ["not_converged", "diverged", "no_crystal", "converged", "converged"],
        "unique_relaxed": [True, False, False, True, True],
        "novel_relaxed": [True, False, False, True, False],
        "known_as_relaxed": [None, None, None, None, "mp-1"],
    }
    return jaxcrystal.Evaluation(tmp_path / "report", {}, pd.DataFrame(columns))


def test_vasp_inputs_are_what_pymatgen_reads_back(evaluation, tmp_path):
    index = evaluation.dft_inputs(tmp_path / "dft", rows=[1, 0])
    assert list(index["folder"]) == ["CoYb_b", "Fe2LiO2_..-a"] and list(index["structure"]) == ["as sampled", "relaxed"]
    for folder, structure in zip(index["folder"], [METAL, OXIDE], strict=True):
        place, meant = tmp_path / "dft" / folder, MPRelaxSet(structure)
        assert sorted(p.name for p in place.iterdir()) == ["INCAR", "KPOINTS", "POSCAR", "POTCAR.spec"]
        poscar, incar = Poscar.from_file(place / "POSCAR", check_for_potcar=False), Incar.from_file(place / "INCAR")
        assert incar == meant.incar
        assert Kpoints.from_file(place / "KPOINTS").as_dict() == meant.kpoints.as_dict()
        assert (place / "POTCAR.spec").read_text().split() == meant.potcar_symbols
        assert [name.split("_")[0] for name in meant.potcar_symbols] == poscar.site_symbols
        assert poscar.structure.matches(structure, scale=False, ltol=1e-6, stol=1e-6, angle_tol=1e-4)
    # Of the oxide, in the order of its POSCAR, by hand: iron has a moment of 5 and a U of 5.3 eV.
    assert poscar.site_symbols == ["Li", "Fe", "O"] and poscar.natoms == [1, 2, 2]
    assert incar["MAGMOM"] == [0.6, 5, 5, 0.6, 0.6] and incar["LDAUU"] == [0, 5.3, 0] and incar["LDAUL"] == [0, 2, 0]
    # Yb's warning of pymatgen is kept; the index that was written is the one returned.
    assert "Yb_2" in index["notes"][0] and index["notes"][1] == ""
    written = pd.read_csv(tmp_path / "dft/index.csv", keep_default_na=False, na_values={"e_above_hull": [""]})
    pd.testing.assert_frame_equal(written, index, check_dtype=False)
    assert np.isnan(written["e_above_hull"][0]) and written["e_above_hull"][1] == 0.05
    assert list(written["relaxation"]) == ["diverged", "not_converged"]
    assert list(written["row"]) == [1, 0] and list(written["num_atoms"]) == [2, 5]


def test_quantum_espresso_takes_the_tables_names_and_highest_cutoffs(evaluation, tmp_path):
    (tmp_path / "sssp.json").write_text(json.dumps(SSSP))
    out = tmp_path / "new/dft"
    index = evaluation.dft_inputs(out, rows=[0], code="quantum-espresso", pseudopotentials=tmp_path / "sssp.json")
    assert list(index["notes"]) == [dft.NOT_COMPARABLE]
    text = (out / index["folder"][0] / "pw.in").read_text()
    assert f"title = '{dft.NOT_COMPARABLE}'" in text
    # ASE reads it: pymatgen cannot read what it writes of the moments.
    atoms = read_espresso_in(io.StringIO(text))
    assert StructureMatcher(primitive_cell=False, scale=False, ltol=1e-6, stol=1e-6).fit(
        Structure(atoms.cell[:], atoms.symbols, atoms.get_scaled_positions()), OXIDE
    )
    sections, cards = read_fortran_namelist(io.StringIO(text))
    system = sections["system"]
    assert (system["ecutwfc"], system["ecutrho"], system["nat"], system["ntyp"]) == (90, 1080, 5, 3)
    assert sections["control"]["title"] == dft.NOT_COMPARABLE
    # Moments are numbered as ATOMIC_SPECIES has them.
    assert [line.split()[::2] for line in cards[1:4]] == [["Fe", "Fe.upf"], ["Li", "Li.upf"], ["O", "O.upf"]]
    assert [system[f"starting_magnetization({i})"] for i in (1, 2, 3)] == [0.5, 0.1, 0.1]
    grid = cards[cards.index("K_POINTS automatic") + 1].split()
    assert grid == [*map(str, MPRelaxSet(OXIDE).kpoints.kpts[0]), "0", "0", "0"]


def test_the_best_are_the_new_ones_nearest_to_the_hull(evaluation, tmp_path):
    found = jaxcrystal.Evaluation(evaluation.out, {}, evaluation.table[evaluation.table["id"] != "d"])
    assert list(found.dft_inputs(tmp_path / "dft")["id"]) == ["../a"]
    with pytest.raises(jaxcrystal.UserError, match=r"no crystal of .* is among the best 0 new ones; choose rows"):
        found.dft_inputs(tmp_path / "none", best=0)
    with pytest.raises(jaxcrystal.UserError, match="no distances to a hull"):
        jaxcrystal.Evaluation(evaluation.out, {}, found.table.drop(columns="e_above_hull")).dft_inputs(tmp_path / "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [4]}, "there is no row 4; rows of this evaluation run from 0 to 7"),
        ({"rows": [0, 0]}, "row 0 is named twice"),
        ({"rows": [0, 2]}, r"row 2 \(c\) has no crystal: it is no CIF"),
        ({"rows": [7, 3, 0]}, r"row 3 \(d\): MPRelaxSet has no pseudopotential of Po; rows .* calculated: 7,0$"),
        ({"rows": [3]}, r"row 3 \(d\): MPRelaxSet has no pseudopotential of Po; nor can another row be written"),
        ({"rows": [0], "pseudopotentials": "x"}, "give a table of them with quantum-espresso only"),
        ({"rows": [0], "code": "abinit"}, "written for vasp or quantum-espresso, not for 'abinit'"),
        ({"rows": [0], "code": "quantum-espresso"}, "needs a table of pseudopotentials, such as https"),
        ({"rows": [1], "table": json.dumps(SSSP)}, r"row 1 \(b\): .*table.json has no pseudopotential of Co; nor"),
        ({"rows": [0], "table": "{"}, "table.json is no JSON"),
        ({"rows": [0], "table": "[]"}, "table.json: the file has not filename, cutoff_wfc, cutoff_rho, the last two"),
        ({"rows": [0], "table": '{"Fe": {"filename": "x"}}'}, "table.json: Fe has not filename, cutoff_wfc"),
        ({"rows": [0], "code": "quantum-espresso", "pseudopotentials": "no/where"}, "cannot read no/where: No such"),
    ],
)
def test_what_is_refused_leaves_nothing(evaluation, options, message, tmp_path):
    if "table" in options:
        (tmp_path / "table.json").write_text(options.pop("table"))
        options |= {"code": "quantum-espresso", "pseudopotentials": tmp_path / "table.json"}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(jaxcrystal.UserError, match=message) as caught:
        evaluation.dft_inputs(tmp_path / "dft", **options)
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_an_output_that_holds_other_things_is_left_alone(evaluation, tmp_path):
    (tmp_path / "dft").mkdir()
    assert len(evaluation.dft_inputs(tmp_path / "dft", rows=[0])) == 1  # an empty folder is as good as none
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(jaxcrystal.UserError, match="dft exists and is not an empty folder; choose another"):
        evaluation.dft_inputs(tmp_path / "dft", rows=[1])
    (tmp_path / "file").touch()
    with pytest.raises(jaxcrystal.UserError, match=r"cannot write .*below: (Not a directory|File exists)"):
        evaluation.dft_inputs(tmp_path / "file/below", rows=[1])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "file"])


@pytest.mark.parametrize("code", ["vasp", "quantum-espresso"])
def test_what_the_command_says(evaluation, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jaxcrystal.Evaluation, "read", lambda folder: evaluation)
    (tmp_path / "sssp.json").write_text(json.dumps(SSSP))
    more = [] if code == "vasp" else ["--code", code, "--pseudopotentials", str(tmp_path / "sssp.json")]
    assert main(["dft-inputs", "report", "--out", str(tmp_path / "dft"), "--rows", "0", *more]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"1 crystal in {tmp_path / 'dft'}, 1 as they relaxed; ")
    assert (dft.NOT_COMPARABLE in said) == (code != "vasp") and ("pmg potcar" in said) == (code == "vasp")
