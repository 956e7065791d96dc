"""Preparing: every row is kept or left out with its reason, and what is kept is the crystal that the file stated."""

import csv
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import spglib
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.crystals.crystal import CELL_BITS, ELEMENTS, Crystal
from jaxcrystal.crystals.dataset import load
from jaxcrystal.errors import UserError
from jaxcrystal.reader import preparing as prepare_module
from jaxcrystal.reader.checks import Checked, Checks, Doubt, Finding, Reason, check
from jaxcrystal.reader.preparing import prepare
from jaxcrystal.reader.reading import interpret
from jaxcrystal.reader.rows import Outcome
from jaxcrystal.reader.sources import Record, open_source

NACL = Structure(Lattice.from_parameters(4.02, 4.02, 4.02, 60, 60, 60), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
TIO2 = Structure.from_spacegroup(136, Lattice.tetragonal(4.6, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]])
#: Trigonal selenium, whose screw turns to one side: P3₁21. Its mirror image is P3₂21.
SELENIUM = Structure.from_spacegroup(152, Lattice.hexagonal(4.37, 4.96), ["Se"], [[0.225, 0, 1 / 3]])


def cif(structure: Structure) -> str:
    return str(CifWriter(structure))


def table(path: Path, rows: list[dict]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def left_out(out: Path, name: str = "left_out") -> list[tuple[str, str]]:
    with (out / f"{name}.csv").open() as file:
        return [(row["id"], row["reason"]) for row in csv.DictReader(file)]


def checked(content: str | Crystal, form: str = "cif", labels: dict | None = None, **checks) -> Checked | Finding:
    return check(interpret(Record("x", 7, form, content, labels=labels or {})), Checks(**checks))


def kept(text: str, **checks) -> Checked:
    outcome = checked(text, **checks)
    assert isinstance(outcome, Checked), outcome
    return outcome


GOOD = cif(NACL)
TWO_BLOCKS = GOOD + "\n" + cif(TIO2)
BROKEN = {
    Outcome.CIF_ERROR: [
        "not a CIF",
        GOOD[: GOOD.index("_atom_site_type")],
        TWO_BLOCKS,
        GOOD.replace("_cell_length_a   4.02", "_cell_length_a   nan (4.02"),
        GOOD.replace("_cell_length_a   4.02", "_cell_length_a   4,02"),
    ],
    Outcome.MISSING_ATOMS: [GOOD.replace("0.50000000", "?", 1), GOOD.replace("0.50000000", ".", 1)],
    Outcome.UNKNOWN_ELEMENT: [GOOD.replace("  Na  Na0", "  Nq  Nq0"), GOOD.replace("  Na  Na0", "  Xx  Xx0")],
    Outcome.NOT_FINITE: [
        GOOD.replace("0.50000000  0.5", "nan  0.5", 1),
        GOOD.replace("0.50000000  0.5", "inf  0.5", 1),
        re.sub("_cell_length_a .*", "_cell_length_a nan", GOOD),
    ],
    Outcome.DISORDERED: [GOOD[::-1].replace("1", "5.0", 1)[::-1], GOOD[::-1].replace("1", "0", 1)[::-1]],
    Outcome.CELL_ERROR: [
        GOOD.replace("_cell_length_a   4.02", "_cell_length_a   -4.02"),
        GOOD.replace("_cell_length_a   4.02", "_cell_length_a   400.02"),
        GOOD.replace("_cell_angle_alpha   60.", "_cell_angle_alpha   150."),
        cif(Structure(Lattice.from_parameters(4, 4, 4, 100, 100, 160), ["Na"], [[0, 0, 0]])),
    ],
    Reason.FAILED_REDUCTION: [
        cif(Structure(Lattice.from_parameters(4, 4, 4, 179.99, 90, 90), ["Na"], [[0, 0, 0]])),
    ],
    Reason.TOO_MANY_ATOMS: [cif(NACL * (3, 2, 2))],
    Reason.COINCIDENT_ATOMS: [
        cif(Structure(Lattice.orthorhombic(0.08, 4, 4), ["Na"], [[0, 0, 0]])),
        cif(Structure(NACL.lattice, ["Na", "Cl"], [[0, 0, 0], [0, 0.004, 0.999]])),
    ],
    Outcome.FORMULA_MISMATCH: [GOOD.rstrip().rsplit("\n", 1)[0] + "\n", GOOD.replace("'Na1 Cl1'", "'Na1 Cl1 H2'")],
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in BROKEN.items() for text in texts])
def test_a_bad_cif_is_left_out_for_its_reason(reason, text):
    outcome = checked(text)
    assert isinstance(outcome, Finding) and outcome.kind == reason, outcome
    assert (outcome.row, outcome.id) == (7, "x") and outcome.message


def test_a_reduction_that_fails_or_lies_costs_the_row(monkeypatch):
    def fail(self, algorithm):
        raise ValueError("can't find niggli")

    monkeypatch.setattr(Structure, "get_reduced_structure", fail)
    outcome = checked(GOOD)
    assert outcome.kind == Reason.FAILED_REDUCTION and "can't find niggli" in outcome.message
    monkeypatch.setattr(Structure, "get_reduced_structure", lambda self, algorithm: self * (2, 1, 1))
    assert checked(GOOD).kind == Reason.FAILED_REDUCTION
    assert kept(GOOD, niggli=False)


def test_one_table_of_good_and_bad_rows_is_accounted_for(tmp_path):
    texts = [(f"{reason}-{i}", text) for reason, all_ in BROKEN.items() for i, text in enumerate(all_)]
    rows = [{"material_id": name, "cif": text, "band_gap": 1.5, "note": "n"} for name, text in texts]
    rows += [{"material_id": "salt", "cif": GOOD, "band_gap": 0.0}, {"material_id": "rutile", "cif": cif(TIO2)}]
    rows += [{"material_id": "salt", "cif": GOOD, "band_gap": "wide", "pretty_formula": "KCl", "elements": "['K']"}]
    path = table(tmp_path / "set.csv", rows)
    report = prepare([path], tmp_path / "out", workers=1)

    (part,) = report.parts
    assert part.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (part.read, part.kept) == (len(rows), 3)
    assert Counter(part.left_out) == {reason.value: len(all_) for reason, all_ in BROKEN.items()}
    assert part.because.keys() == part.left_out.keys()
    assert part.because["unknown_element"] == "row 7 (unknown_element-0): 'Nq' is no chemical element"
    assert "2 unknown_element, first row 7 (unknown_element-0): 'Nq' is no chemical element" in str(report)
    assert sorted(name for name, _ in left_out(tmp_path / "out")) == sorted(name for name, _ in texts)
    assert all(name.startswith(reason) for name, reason in left_out(tmp_path / "out"))
    assert part.missing == {
        "pretty_formula": 0,
        "elements": 0,
        "spacegroup.number": 3,
        "formation_energy_per_atom": 3,
        "band_gap": 2,
        "e_above_hull": 3,
    }
    assert part.doubts == {"bad_label": 1, "elements_differ": 1, "formula_differs": 1}
    assert left_out(tmp_path / "out", "doubts") == [
        ("salt", kind) for kind in ("formula_differs", "elements_differ", "bad_label")
    ]
    assert part.ignored_columns == ("note",)
    assert part.repeated_ids == {"salt": 2} and report.duplicates == (("set:salt", "set:salt"),)
    assert part.atoms == {2: 2, 6: 1}

    stored = load(tmp_path / "out" / "set.parquet")
    assert stored.ids == ("salt", "rutile", "salt")
    assert stored.attributes(0) == {"pretty_formula": "NaCl", "elements": ["Cl", "Na"], "band_gap": 0.0}
    assert stored.attributes(2) == {"pretty_formula": "NaCl", "elements": ["Cl", "Na"]}  # the structure is believed
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["parts"][0]["left_out"] == part.left_out and written["settings"] == {
        "niggli": True,
        "max_atoms": 20,
        "symprec": 0.1,
    }
    assert f"{len(rows)} rows read, 3 kept" in str(report)


def test_labels_are_typed_and_the_absent_stay_absent(tmp_path):
    labels = {
        "formation_energy_per_atom": -2.1,
        "band_gap": float("nan"),
        "spacegroup.number": 225.0,
        "e_above_hull": 0.0,
    }
    frame = pd.DataFrame([{"cif": GOOD, **labels, "e_above_hull_estimated": 9.0}, {"cif": GOOD}])
    frame.to_parquet(tmp_path / "set.parquet")
    report = prepare([tmp_path / "set.parquet"], tmp_path / "out", workers=1)
    stored = load(tmp_path / "out" / "set.parquet")
    own = {"pretty_formula": "NaCl", "elements": ["Cl", "Na"]}
    assert stored.attributes(0) == own | {
        "spacegroup.number": 225,
        "formation_energy_per_atom": -2.1,
        "e_above_hull": 0.0,
    }
    assert stored.attributes(1) == own
    assert stored.ids == ("0", "1")  # the row's number where there is no material_id
    assert report.parts[0].ignored_columns == ("e_above_hull_estimated",)


@pytest.mark.parametrize("value", ["0", "231", "2.5", "inf", "P1"])
def test_what_is_no_space_group_is_doubted(value):
    outcome = checked(GOOD, labels={"spacegroup.number": value})
    assert [doubt.kind for doubt in outcome.doubts] == [Doubt.BAD_LABEL] and "spacegroup.number" not in outcome.labels


def test_max_atoms_and_niggli_change_what_is_stored(tmp_path):
    long_cell = Structure(Lattice([[4, 0, 0], [8, 5, 0], [0, 0, 6]]), ["Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    path = table(tmp_path / "set.csv", [{"cif": cif(TIO2)}, {"cif": cif(long_cell)}, {"cif": cif(NACL * (4, 4, 1))}])
    reduced = prepare([path], tmp_path / "reduced", workers=1)
    assert reduced.parts[0].left_out == {"too_many_atoms": 1}
    small = prepare([path], tmp_path / "small", max_atoms=5, workers=1)
    assert small.parts[0].left_out == {"too_many_atoms": 2}
    assert kept(cif(TIO2), max_atoms=6)  # as many as are allowed
    everything = prepare([path], tmp_path / "all", max_atoms=None, niggli=False, workers=1)
    assert everything.parts[0].kept == 3
    assert np.allclose(load(tmp_path / "all" / "set.parquet").crystal(1).lengths, long_cell.lattice.abc)
    assert np.allclose(load(tmp_path / "reduced" / "set.parquet").crystal(1).lengths, [4, 5, 6])


@pytest.mark.parametrize("niggli", [True, False])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 0, 2]], ids=["right-handed", "left-handed"])
def test_a_left_handed_cell_does_not_become_its_mirror_image(niggli, rows, tmp_path):
    lattice = SELENIUM.lattice.matrix[rows]
    lines = [
        "3",
        'Lattice="{}" Properties=species:S:1:pos:R:3 pbc="T T T" material_id=se'.format(
            " ".join(map(str, lattice.flat))
        ),
    ]
    lines += [f"Se {x} {y} {z}" for x, y, z in SELENIUM.cart_coords]
    (tmp_path / "se.extxyz").write_text("\n".join(lines) + "\n")
    (record,) = open_source(tmp_path / "se.extxyz").records
    outcome = check(interpret(record), Checks(niggli=niggli))
    found = outcome.crystal.to_structure()
    cell = (found.lattice.matrix, found.frac_coords, [34] * 3)
    assert spglib.get_symmetry_dataset(cell, symprec=1e-3).number == 152
    assert outcome.id == "se"


def test_folder_extxyz_and_single_file_are_read(tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    (folder / "salt.cif").write_text(GOOD)
    (folder / "a_broken.cif").write_text("nothing")
    (folder / "notes.txt").write_text("no crystal")
    (tmp_path / "rutile.cif").write_text(cif(TIO2))
    header = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 band_gap=1.25 pbc="T T T"'
    frames = (
        f"2\n{header}\nCs 0 0 0\nCl 2 2 2\n1\n{header}\nQq 0 0 0\n1\nno cell\nFe 0 0 0\n1\n{header}\nFe 0 nan 0\nend\n"
    )
    (tmp_path / "md.extxyz").write_text(frames)
    report = prepare([folder, tmp_path / "rutile.cif", tmp_path / "md.extxyz"], tmp_path / "out", workers=1)
    assert [(p.part, p.read, p.kept) for p in report.parts] == [("cifs", 2, 1), ("rutile", 1, 1), ("md", 5, 1)]
    assert left_out(tmp_path / "out") == [
        ("a_broken", "cif_error"),
        ("1", "unknown_element"),
        ("2", "not_periodic"),
        ("3", "not_finite"),
        ("4", "malformed_row"),
    ]
    assert report.parts[0].unread == {".txt file": ("notes.txt",)}
    assert "not read: 1 .txt file (notes.txt)" in str(report)
    caesium = load(tmp_path / "out" / "md.parquet")
    assert caesium.crystal(0) == Crystal([4] * 3, [90] * 3, [55, 17], [[0] * 3, [0.5] * 3])
    assert caesium.attributes(0) == {"pretty_formula": "CsCl", "elements": ["Cl", "Cs"], "band_gap": 1.25}
    assert load(tmp_path / "out" / "cifs.parquet").ids == ("salt",)


def test_the_embedded_set_is_prepared_as_two_parts(tmp_path):
    report = prepare(["prototypes"], tmp_path, max_atoms=None, workers=1)
    train, validation = report.parts
    assert (train.part, validation.part) == ("prototypes_train", "prototypes_validation")
    assert train.kept == train.read > validation.kept == validation.read > 0
    first = load("prototypes:train")
    stored = load(tmp_path / "prototypes_train.parquet")
    assert stored.ids == first.ids
    assert stored.attributes(0)["spacegroup.number"] == first.attributes(0)["spacegroup.number"]


def test_a_csv_row_of_the_wrong_width_costs_itself_only(tmp_path):
    (tmp_path / "set.csv").write_text(f'material_id,cif\na,"{GOOD}"\nb,"{GOOD}",surplus\nc\nd,"{GOOD}"\n')
    report = prepare([tmp_path / "set.csv"], tmp_path / "out", workers=1)
    assert (report.parts[0].kept, report.parts[0].left_out) == (2, {"malformed_row": 2})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "absent.csv does not exist; give a .csv"),
        ("absent", None, "absent does not exist"),
        ("empty.csv", "", "empty.csv is empty"),
        ("header.csv", "material_id,cif\n", "header.csv holds no crystals"),
        ("column.csv", "material_id,band_gap\na,1\n", "no column of crystals; its columns are material_id, band_gap"),
        ("empty.parquet", "", "empty.parquet is empty"),
        ("empty.extxyz", "", "empty.extxyz is empty"),
        ("set.xlsx", "x", "the kind of file '.xlsx' is not known; give a .csv"),
        ("cut.csv", 'cif\n"data_a', "cut.csv cannot be read as CSV after 0 rows"),
        ("broken.parquet", "not parquet", "cannot read .*broken.parquet as a table"),
        ("twice.csv", "cif,band_gap,cif\na,1,b\n", "twice.csv has 2 columns 'cif'; rename or remove all but one"),
        ("case.csv", "cif,CIF\na,b\n", "case.csv has 2 columns 'cif'"),
    ],
)
def test_a_file_that_holds_no_rows_is_named_with_the_remedy(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"folder holds no crystals; it holds 1 .txt file \(notes.txt\), which are not"):
        prepare([tmp_path / "folder"], tmp_path / "out")


def test_a_prepared_file_can_be_prepared_again(tmp_path):
    prepare([table(tmp_path / "set.csv", [{"cif": GOOD, "band_gap": 1.0}, {"cif": cif(TIO2)}])], tmp_path, workers=1)
    report = prepare([tmp_path / "set.parquet"], tmp_path / "small", max_atoms=2, workers=1)
    assert report.parts[0].left_out == {"too_many_atoms": 1}
    first, again = load(tmp_path / "set.parquet"), load(tmp_path / "small" / "set.parquet")
    assert again.crystal(0) == first.crystal(0) and again.attributes(0) == first.attributes(0)


def test_two_inputs_of_one_name_are_refused_and_a_second_run_replaces_the_first(tmp_path):
    (tmp_path / "other").mkdir()
    first = table(tmp_path / "set.csv", [{"cif": GOOD}])
    second = table(tmp_path / "other" / "set.csv", [{"cif": cif(TIO2)}])
    with pytest.raises(UserError, match=r"set.csv, .*other/set.csv would all be written to .*set.parquet"):
        prepare([first, second], tmp_path / "out")
    prepare([first], tmp_path / "out", workers=1)
    prepare([second], tmp_path / "out", workers=1)
    assert load(tmp_path / "out" / "set.parquet").attributes(0)["pretty_formula"] == "TiO2"
    assert len(list((tmp_path / "out").iterdir())) == 5  # nothing unfinished lies about


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "each", None)  # no row may be reached
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file.*choose another folder"):
        prepare([table(tmp_path / "set.csv", [{"cif": GOOD}])], tmp_path / "file" / "out", workers=1)


def test_processes_do_the_same_as_one(tmp_path, monkeypatch):
    rows = [{"material_id": str(i), "cif": cif(TIO2) if i % 3 else "broken"} for i in range(100)]
    path = table(tmp_path / "set.csv", rows)
    alone = prepare([path], tmp_path / "one", workers=1)
    monkeypatch.setattr(prepare_module, "WORTH_PROCESSES", 1)
    together = prepare([path], tmp_path / "two", workers=2)
    for name in ("left_out.csv", "doubts.csv", "notes.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert load(tmp_path / "one" / "set.parquet").ids == load(tmp_path / "two" / "set.parquet").ids
    assert alone.duplicates == together.duplicates and len(alone.duplicates[0]) == 66


def test_the_duplicate_key_sees_through_origin_axes_and_order():
    rng = np.random.default_rng(0)
    base = Structure(
        Lattice.from_parameters(4.1, 5.3, 6.7, 81, 77, 85),
        ["Ti", "O", "O", "Sr"],
        [[0.1, 0.2, 0.3], [0.55, 0.71, 0.13], [0.82, 0.31, 0.77], [0.44, 0.05, 0.62]],
    )

    def key_of(structure: Structure) -> str:
        # Not by way of a CIF, whose atoms pymatgen puts into an order of its own.
        return checked(Crystal.from_structure(structure), "object").duplicate_key

    key = key_of(base)
    for _ in range(20):
        axes = np.eye(3, dtype=int)[rng.permutation(3)]
        axes[0] += rng.integers(-2, 3) * axes[1] + rng.integers(-2, 3) * axes[2]
        coords = (base.frac_coords + rng.random(3)) @ np.linalg.inv(axes)
        order = rng.permutation(4)
        other = Structure(axes @ base.lattice.matrix, [base[i].specie for i in order], coords[order])
        assert key_of(other) == key
    moved = base.copy()
    moved.translate_sites([1], [0.02, 0, 0])
    swapped = base.copy()
    swapped[0], swapped[3] = "Sr", "Ti"
    larger = base.copy()
    larger.apply_strain(0.01)
    assert len({key, *map(key_of, (moved, swapped, larger))}) == 4
    fcc, bcc = (Structure(lattice, ["Fe"], [[0] * 3]) for lattice in _same_volume())
    assert key_of(fcc) != key_of(bcc)


def _same_volume() -> tuple[Lattice, Lattice]:
    face = Lattice(np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 1.8)
    body = Lattice(np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) * 1.8)
    return face, body.scale(face.volume)


@pytest.mark.slow
def test_mp20s_validation_crystals_survive_reduction(shared, tmp_path):
    raw = pd.read_parquet(shared / "data" / "mp20" / "val.parquet").iloc[::4].reset_index(drop=True)
    raw.to_parquet(tmp_path / "some.parquet")
    report = prepare([tmp_path / "some.parquet"], tmp_path / "out")
    stored = load(tmp_path / "out/some.parquet")
    assert (report.parts[0].read, report.parts[0].kept) == (2262, 2262)
    assert report.parts[0].missing == dict.fromkeys(report.parts[0].missing, 0)
    assert stored.ids == tuple(raw["material_id"])

    # What the CIF itself states, read without pymatgen.
    volumes = raw["cif"].str.extract(r"_cell_volume +([0-9.]+)")[0].astype(float).to_numpy()
    a, b, c = (stored.batch.lengths / 2**CELL_BITS).T
    ca, cb, cg = np.cos(np.radians(stored.batch.angles / 2**CELL_BITS)).T
    assert np.allclose(a * b * c * np.sqrt(1 - ca**2 - cb**2 - cg**2 + 2 * ca * cb * cg), volumes, rtol=1e-5)
    for i, text in enumerate(raw["cif"]):
        stated = re.search(r"_chemical_formula_sum +'?([A-Za-z0-9 ]+)", text).group(1)
        found = Counter(ELEMENTS[z] for z in stored.batch.species[i] if z)
        assert {k: int(v) for k, v in re.findall(r"([A-Z][a-z]?)(\d+)", stated)} == found
        assert Composition(raw["pretty_formula"][i]) == Composition(stored.attributes(i)["pretty_formula"])

    for i in np.random.default_rng(0).choice(len(raw), 100, replace=False):
        original = Structure.from_str(raw["cif"][i], fmt="cif")
        crystal = stored.crystal(int(i))
        assert StructureMatcher(primitive_cell=False).fit(original, crystal.to_structure()), stored.ids[i]
        by_spglib = np.linalg.norm(spglib.niggli_reduce(original.lattice.matrix, eps=1e-5), axis=1)
        assert np.allclose(np.sort(crystal.lengths), np.sort(by_spglib), atol=1e-3), stored.ids[i]


def test_what_came_of_looking_for_symmetry_is_counted(shared, tmp_path):
    """Of rows of MP-20 val: one at a smaller tolerance, three of another group than stated, one of these moved far."""
    rows = pd.read_parquet(shared / "data/mp20/val.parquet").set_index("material_id", drop=False)
    names = ["mp-1225552", "mp-754553", "mp-1294141", "mp-545769", *rows.index[:20]]
    path = tmp_path / "few.parquet"
    rows.loc[list(dict.fromkeys(names))].to_parquet(path, index=False)
    report = prepare([path], tmp_path / "out", workers=1)
    assert report.parts[0].symmetry == {
        "without a space group": 0,
        "found at a smaller tolerance": 1,
        "of another group than stated": 3,
        "moved by more than 0.05 Å": 1,
    }
    assert "symmetry: 1 found at a smaller tolerance, 3 of another group than stated, 1 moved by more than 0.05 Å" in (
        str(report)
    )
    stored = pq.read_table(tmp_path / "out/few.parquet").to_pandas().set_index("material_id")
    assert stored.loc["mp-1225552", "symmetry.symprec"] < 0.1 and stored.loc["mp-754553", "symmetry.moved"] > 0.05
    assert stored.loc["mp-1294141", "symmetry.space_group"] == 21 and rows.loc["mp-1294141", "spacegroup.number"] == 115
