"""The page: self-contained, complete, and safe whatever a sample is called."""

import base64
import hashlib
import json
import os
import re
import struct
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.likeness.uniqueness import group_ids
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.protocols import PROTOCOLS
from jaxcrystal.evaluation.table import Provenance, describe
from jaxcrystal.reader.inputs import Input
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.rows import Row
from jaxcrystal.report import packed, plots, report
from jaxcrystal.report.drawing import draw
from jaxcrystal.report.quantities import measured

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
CAESIUM = Structure(Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
HELIUM = Structure(Lattice.cubic(4.12), ["He", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
CLOSE = Structure(Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.05, 0, 0]])
HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "samples.csv"
    cifs = [str(CifWriter(s)) for s in (SALT, CAESIUM, HELIUM, CLOSE, SALT)] + ["broken", "broken too"]
    pd.DataFrame({"cif": cifs, "material_id": [HOSTILE, *"bcdefg"]}).to_csv(path, index=False)
    samples = read(path).rows
    table = describe(samples, PROTOCOLS["cdvae"])
    sound = [s.crystal if ok else None for s, ok in zip(samples, table["structural_valid"], strict=True)]
    table["group"] = pd.array(group_ids(sound), dtype="Int64")
    table["unique"] = (table["group"].notna() & ~table["group"].duplicated()).astype(bool)
    return table


def placed(table):
    return table.assign(
        relaxation=["converged", "diverged", "converged", "invalid", "converged", "no_crystal", "no_crystal"],
        relaxation_reason=["", "energy is not finite", "", "", "", "", ""],
        converged=[True, False, True, False, True, False, False],
        energy_per_atom=[-3.0, np.nan, -2.0, np.nan, -3.0, np.nan, np.nan],
        e_above_hull=[-0.01, np.nan, 0.5, np.nan, 0.05, np.nan, np.nan],
        rmsd=[0.1, np.nan, 0.2, np.nan, 0.1, np.nan, np.nan],
        relaxed_cif=table["cif"],
    )


def page(folder, table, *, training=None, reference=None, metrics=None):
    """The page of a folder that holds these tables, as `jaxcrystal report` makes it."""
    provenance = Provenance("cdvae", {"jaxcrystal": "0", "samples": f"{HOSTILE} sha256:0"}, "a potential", "a hull")
    metrics = metrics or metrics_from_table(table, provenance)
    known = training and [Row(i, row, "ok", "", c, "") for row, (i, c) in enumerate(training.items())]
    results.write(folder, table, metrics, provenance, reference=reference, known=known)
    assert report.write(folder) == folder / "report.html"
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def data_of(text):
    """What the page's scripts read."""
    return json.loads(Tags(text).scripts[0])


def unpacked(data, number):
    """Lengths and angles, atomic numbers and coordinates of a packed crystal, read as packed.py describes it."""
    raw, at = base64.b64decode(data["structures"]), 0
    for k in range(number + 1):
        (n,) = struct.unpack_from("<H", raw, at)
        if k < number:
            at += 26 + 7 * n
    cell = struct.unpack_from("<6f", raw, at + 2)
    species = struct.unpack_from(f"<{n}B", raw, at + 26)
    coords = np.array(struct.unpack_from(f"<{3 * n}H", raw, at + 26 + n)).reshape(n, 3) / 65536
    return np.array(cell), species, coords


def test_the_page_needs_nothing_but_itself(tmp_path, table):
    text = page(tmp_path, placed(table), reference=table)
    assert "{{" not in text
    tags = Tags(text).found
    assert not [tag for tag, attrs in tags if tag in ("link", "img", "iframe") or "src" in attrs or "href" in attrs]
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "alert(1)</script>" not in text
    data, script = Tags(text).scripts
    assert json.loads(data)["rows"][0][0] == HOSTILE
    (policy,) = [attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and policy.endswith(f"script-src 'sha256-{digest}'")
    identifiers = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_the_funnel_counts_what_passed_every_step(table):
    assert report.funnel(table) == [("attempts", 7), ("parsed", 5), ("valid", 3), ("unique", 2)]
    steps = dict(report.funnel(placed(table).assign(novel=True)))
    assert list(steps) == ["attempts", "parsed", "valid", "relaxed", "unique", "novel", "metastable", "stable"]
    assert list(steps.values()) == [7, 5, 3, 2, 1, 1, 1, 1]
    # Where there are relaxed crystals, it is they that are unique and novel, as in the numbers.
    relaxed = placed(table).assign(novel=True, unique_relaxed=table.index == 4, novel_relaxed=False)
    relaxed["group_relaxed"] = pd.array([0, None, 1, None, 0, None, None], dtype="Int64")
    steps = dict(report.funnel(relaxed))
    assert (steps["relaxed"], steps["unique"], steps["novel"]) == (2, 1, 0)
    assert report.statuses(relaxed)[0][1] == "same as group 0"


def test_each_attempt_has_a_row_with_its_fate(tmp_path, table):
    def words(text):
        rows = data_of(text)["rows"]
        return [row[0] for row in rows], [row[2] for row in rows], [row[-1] for row in rows]

    ids, fates, _ = words(page(tmp_path, table))
    assert ids == [HOSTILE, *"bcdefg"]
    assert fates == ["valid", "valid", "unbalanced", "invalid", "duplicate", "cif_error", "cif_error"]
    _, fates, why = words(page(tmp_path, placed(table)))
    assert fates == ["stable", "diverged", "unstable", "invalid", "metastable", "cif_error", "cif_error"]
    assert why[1] == "energy is not finite" and why[2] == "smact14 has no oxidation state of He"
    assert why[3] == "Cs and Cl are 0.21 Å apart, below 0.50" and why[4] == "same as group 0"


def test_a_crystal_is_packed_to_a_ten_thousandth_of_its_cell():
    for structure in (SALT, CAESIUM, CLOSE):
        crystal = Crystal.from_structure(structure)
        cell, species, coords = unpacked({"structures": packed.pack([Crystal.from_structure(HELIUM), crystal])}, 1)
        assert cell == pytest.approx([*crystal.lengths, *crystal.angles], rel=1e-6)
        assert list(species) == list(crystal.species)
        assert np.abs(coords - crystal.frac_coords).max() <= 0.5 / 65536
        assert len(packed.pack([crystal])) == 4 * -(-packed.size(crystal) // 3)
    nearly_one = Crystal([4, 4, 4], [90, 90, 90], [1], [[1 - 2**-20, 0, 0]])
    assert unpacked({"structures": packed.pack([nearly_one])}, 0)[2][0, 0] == 0


def test_crystals_are_there_as_sampled_as_relaxed_and_beside_their_nearest_training_crystal(tmp_path, table):
    known = table.assign(
        known_as=["mp-1", None, None, None, "mp-1", None, None],
        train_nearest=["mp-2", "mp-2", "mp-3", "mp-2", None, None, None],
        train_structure_distance=[0.0, 0.25, np.nan, 1.0, 0.0, np.nan, np.nan],
        train_composition_distance=[0.0, 3.0, 1.0, 1.0, 0.0, np.nan, np.nan],
    )
    training = {"mp-1": Crystal.from_structure(SALT), "mp-2": Crystal.from_structure(HELIUM)}
    others = {"mp-9": Crystal.from_structure(CAESIUM)}
    data = data_of(page(tmp_path, placed(known), training=training | others))
    assert results.read(tmp_path).training == training  # and no other
    assert data["trained"]
    assert data["neighbours"][:3] == [["mp-1", True, 0.0, 0.0], ["mp-2", False, 0.25, 3.0], ["mp-3", False, None, 1.0]]
    assert data["neighbours"][4:] == [["mp-1", True, 0.0, 0.0], None, None]
    sampled, relaxed, near = data["views"][1]
    assert unpacked(data, sampled)[1] == unpacked(data, relaxed)[1] == (55, 17)
    assert unpacked(data, near)[1] == (2, 17)
    assert data["views"][0][2] == data["views"][4][2]  # one training crystal is there once
    assert data["views"][2][2] == -1 and data["views"][5] == [-1, -1, -1]
    assert {symbol for symbol, *_ in data["elements"].values()} == {"Na", "Cl", "Cs", "He"}
    assert data["elements"]["11"][1] == "#ab5cf2"  # Jmol's sodium
    alone = data_of(page(tmp_path, table))
    assert not alone["trained"] and alone["neighbours"] == [None] * 7


def test_a_page_that_is_full_says_how_many_crystals_it_left_out(tmp_path, table, monkeypatch):
    assert "not drawn" not in page(tmp_path, table)
    monkeypatch.setattr(report, "MOST_BYTES", packed.size(Crystal.from_structure(SALT)))
    text = page(tmp_path, table)
    assert "4 crystals are too many for this page and not drawn" in text
    assert [views[0] for views in data_of(text)["views"]] == [0, -1, -1, -1, -1, -1, -1]


def test_every_number_is_written_with_its_interval(tmp_path, table):
    metrics = {
        "protocol": "cdvae",
        "counts": {"attempts": 7},
        "coverage": {"recall": 0.5, "recall_of_all": 0.25, "cutoffs": "mp_20"},
        "distribution": {"density_wasserstein": 0.1234},
        "own": {"figure": 2.5},
        "confidence_95": {"coverage.recall": [0.4, 0.6], "coverage.recall_of_all": [0.2, 0.3]},
        "versions": {},
    }
    text = re.sub(r"<svg.*?</svg>", "", page(tmp_path, table, metrics=metrics))
    words = re.sub(
        r"\s+", " ", re.sub(r"<[^>]*>", " ", text.partition("All numbers")[2].partition("Distributions</h2>")[0])
    )
    assert "50.0 % 40.0 to 60.0 %" in words
    assert "Coverage recall, of all nothing is left out 25.0 % 20.0 to 30.0 %" in words
    assert "0.123 g/cm³ no interval" in words and "own.figure 2.500" in words


def test_the_page_is_made_of_the_folder_alone(tmp_path, table):
    (tmp_path / "a").mkdir()
    first = page(tmp_path / "a", placed(table), reference=table)
    os.rename(tmp_path / "a", tmp_path / "b")
    before = (tmp_path / "b" / "report.html").read_bytes()
    (tmp_path / "b" / "report.html").unlink()
    report.write(tmp_path / "b")
    assert (tmp_path / "b" / "report.html").read_bytes() == before == first.encode()


def test_what_an_earlier_evaluation_left_is_not_shown(tmp_path, table):
    known = table.assign(known_as="mp-1")
    page(tmp_path, known, reference=table, training={"mp-1": Crystal.from_structure(SALT)})
    assert 'class="reference"' not in page(tmp_path, table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html", "structures.parquet"]


def test_the_folder_of_an_older_evaluation_has_a_page(tmp_path, table):
    """It keeps no training crystals: the page says of which the attempts are nearest to, and does not draw them."""
    page(tmp_path, table.assign(known_as="mp-1"), training={"mp-1": Crystal.from_structure(SALT)})
    (tmp_path / "training.parquet").unlink()
    data = data_of(report.write(tmp_path).read_text(encoding="utf-8"))
    assert data["neighbours"][0][0] == "mp-1" and data["views"][0][2] == -1


def test_a_folder_that_is_no_evaluation_is_refused(tmp_path, table):
    with pytest.raises(UserError, match=r"cannot read .*nowhere.metrics\.json: No such file"):
        report.write(tmp_path / "nowhere")
    page(tmp_path, table)
    structures = tmp_path / "structures.parquet"
    content = structures.read_bytes()
    for damage in (b"", b"no parquet", content[: len(content) // 2]):
        structures.write_bytes(damage)
        with pytest.raises(UserError, match=r"structures\.parquet is no table of `jaxcrystal evaluate`"):
            report.write(tmp_path)
    table.to_parquet(structures)  # of pandas' own
    with pytest.raises(UserError, match=r"structures\.parquet is no table of `jaxcrystal evaluate`"):
        report.write(tmp_path)
    structures.unlink()
    with pytest.raises(UserError, match=r"cannot read .*structures\.parquet: No such file"):
        report.write(tmp_path)
    with pytest.raises(UserError, match=r"structures\.parquet has no column density, cif: evaluate the crystals again"):
        lacking = table.drop(columns=["density", "cif"])
        results.write(tmp_path, lacking, metrics_from_table(table, Provenance("cdvae", {})), Provenance("cdvae", {}))
        report.write(tmp_path)


def test_a_set_without_a_single_crystal_still_has_a_page(tmp_path, table):
    text = page(tmp_path, table.iloc[5:].reset_index(drop=True))
    assert "No attempt got far enough to be drawn." in text and "cif_error" in text


def test_the_reference_is_drawn_only_when_given(tmp_path, table):
    assert 'class="reference"' not in page(tmp_path, table)
    assert 'class="reference"' in page(tmp_path, table, reference=table)


def test_what_was_left_out_of_an_input_is_on_the_page(table):
    train = Input("<t>.csv", "0", 12, 3, {"cif_error": 9}, {"cif_error": "no cell"})
    inputs = {"train": asdict(train), "reference": asdict(replace(train, rows=3, left_out={}))}
    assert report._inputs({"inputs": inputs}) == [
        ("rows of train", "3 of 12 rows of <t>.csv are used; left out: 9 cif_error (no cell)")
    ]
    provenance = Provenance("cdvae", {}, inputs={"train": train})
    assert not {"inputs.train.rows"} & {n.quantity.name for n in measured(metrics_from_table(table, provenance))}


def test_a_histogram_shows_every_value():
    values = np.concatenate([np.random.default_rng(0).normal(size=990), [1e3] * 10])
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', plots.histogram(values, label="x"))]
    counts = np.array(heights) / sum(heights) * len(values)
    assert counts[-1] >= 9  # what lies far beyond the axis is in the last bin
    assert "<rect" in plots.histogram(np.array([2.0, 2.0]), label="all equal")


def test_elements_stand_where_the_periodic_table_has_them():
    places = {s: plots._place(z) for z, s in enumerate(plots.ELEMENTS) if z}
    expected = {"H": (0, 0), "He": (17, 0), "Li": (0, 1), "B": (12, 1), "Ca": (1, 3), "Sc": (2, 3), "Zn": (11, 3)}
    expected |= {"Kr": (17, 3), "La": (2, 7), "Yb": (15, 7), "Lu": (2, 5), "Hf": (3, 5), "Rn": (17, 5), "U": (5, 8)}
    expected |= {"Lr": (2, 6), "Rf": (3, 6), "Og": (17, 6)}
    assert {symbol: places[symbol] for symbol in expected} == expected
    assert len(set(places.values())) == 118
    assert "Og: 2 crystals" in plots.periodic_table({"Og": 2}, "elements")


def test_a_drawing_repeats_atoms_on_the_borders():
    picture = draw(CAESIUM, prefix="p")
    assert picture.count("<circle") == 9  # eight corners and the middle
    assert picture.count('class="edge"') == 12
    assert picture.count('class="bond"') == 16  # eight neighbours, two halves each
    assert picture.count("url(#p-55)") == 8 and picture.count("url(#p-17)") == 1


def test_status_prefers_the_first_failure(table):
    failed = placed(table).assign(outcome="truncated", reason="the sampler reported truncated")
    assert set(report.statuses(failed)) == {("truncated", "the sampler reported truncated")}


def test_a_place_beside_the_hull_that_cannot_be_is_no_success(tmp_path, table):
    """An outcome of which this page knows nothing is shown by its name, whatever its distance, and is not drawn."""
    odd = placed(table).assign(competing_phases=pd.array([3, None, 0, None, 1, None, None], dtype="Int64"))
    odd.loc[2, ["relaxation", "relaxation_reason"]] = ["far_above", "half an eV above the hull"]
    text = page(tmp_path, odd)
    data = data_of(text)
    assert data["rows"][2][2] == "far_above" and data["rows"][2][-1] == "half an eV above the hull"
    assert data["columns"][4][0] == "competing phases"
    assert [row[4] for row in data["rows"]] == [3, None, 0, None, 1, None, None]
    assert "far above" in text.partition("What failed, and why")[2].partition('<section id="attempts">')[0]


def test_a_potential_without_a_hull_and_a_failed_relaxation_still_draw(tmp_path, table):
    relaxed = placed(table).drop(columns="e_above_hull")
    relaxed["relaxed_cif"] = [None, np.nan, *relaxed["relaxed_cif"][2:]]
    data = data_of(page(tmp_path, relaxed))
    assert data["views"][0][1] == -1 and data["views"][1][1] == -1 and data["views"][2][1] >= 0
