"""The page: self-contained, complete, and safe whatever a sample is called."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.evaluate import plots, report
from jaxcrystal.evaluate.drawing import draw
from jaxcrystal.evaluate.metrics import metrics_from_table
from jaxcrystal.evaluate.protocols import PROTOCOLS
from jaxcrystal.evaluate.samples import read
from jaxcrystal.evaluate.table import Provenance, describe
from jaxcrystal.evaluate.uniqueness import group_ids

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
    samples = read(path).samples
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


def page(folder, table, **options):
    metrics = metrics_from_table(table, Provenance("cdvae", {"jaxcrystal": "0"}, "a potential", "a hull"))
    report.write(folder / "report.html", table, metrics, title=HOSTILE, **options)
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_but_itself(tmp_path, table):
    text = page(tmp_path, placed(table), reference=table)
    assert "{{" not in text
    tags = Tags(text).found
    assert not [tag for tag, attrs in tags if tag in ("link", "img", "iframe") or "src" in attrs or "href" in attrs]
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "alert(1)</script>" not in text and sum(tag == "script" for tag, _ in tags) == 1
    identifiers = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


def test_the_funnel_counts_what_passed_every_step(table):
    assert report.funnel(table) == [("attempts", 7), ("parsed", 5), ("valid", 3), ("unique", 2)]
    steps = dict(report.funnel(placed(table).assign(novel=True)))
    assert steps["relaxed"] == 1 and steps["metastable"] == 1 and steps["stable"] == 1


def test_each_attempt_has_a_row_with_its_fate(tmp_path, table):
    def words(text):
        rows = json.loads(re.search(r"rows = (\[.*?\]), perPage", text)[1])
        return [row[0] for row in rows], [row[2] for row in rows], [row[-1] for row in rows]

    ids, fates, _ = words(page(tmp_path, table))
    assert ids == [HOSTILE, *"bcdefg"]
    assert fates == ["valid", "valid", "unbalanced", "invalid", "duplicate", "cif_error", "cif_error"]
    _, fates, why = words(page(tmp_path, placed(table)))
    assert fates == ["stable", "diverged", "unstable", "invalid", "metastable", "cif_error", "cif_error"]
    assert why[1] == "energy is not finite" and why[2] == "smact14 has no oxidation state of He"
    assert why[3] == "Cs and Cl are 0.21 Å apart, below 0.50" and why[4] == "same as group 0"


def test_a_set_without_a_single_crystal_still_has_a_page(tmp_path, table):
    text = page(tmp_path, table.iloc[5:].reset_index(drop=True))
    assert "No attempt got far enough to be drawn." in text and "cif_error" in text


def test_the_reference_is_drawn_only_when_given(tmp_path, table):
    assert 'class="reference"' not in page(tmp_path, table)
    assert 'class="reference"' in page(tmp_path, table, reference=table)


def test_a_histogram_shows_every_value():
    values = np.concatenate([np.random.default_rng(0).normal(size=990), [1e3] * 10])
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', plots.histogram(values, label="x"))]
    counts = np.array(heights) / sum(heights) * len(values)
    assert counts[-1] >= 9  # what lies far beyond the axis is in the last bin
    assert "<rect" in plots.histogram(np.array([2.0, 2.0]), label="all equal")


def test_elements_stand_where_the_periodic_table_has_them():
    places = {s: plots._place(z) for z, s in enumerate(plots.ELEMENTS[:104]) if z}
    expected = {"H": (0, 0), "He": (17, 0), "Li": (0, 1), "B": (12, 1), "Ca": (1, 3), "Sc": (2, 3), "Zn": (11, 3)}
    expected |= {"Kr": (17, 3), "La": (2, 7), "Yb": (15, 7), "Lu": (2, 5), "Hf": (3, 5), "Rn": (17, 5), "U": (5, 8)}
    assert {symbol: places[symbol] for symbol in expected} == expected
    assert len(set(places.values())) == 103


def test_a_drawing_repeats_atoms_on_the_borders():
    picture = draw(CAESIUM, prefix="p")
    assert picture.count("<circle") == 9  # eight corners and the middle
    assert picture.count('class="edge"') == 12
    assert picture.count('class="bond"') == 16  # eight neighbours, two halves each
    assert picture.count("url(#p-55)") == 8 and picture.count("url(#p-17)") == 1


def test_status_prefers_the_first_failure():
    row = SimpleNamespace(outcome="truncated", reason="the sampler reported truncated")
    assert report.status(row) == ("truncated", "the sampler reported truncated")
