"""Tables of crystals: counted, indexed, turned into what others take, and shown."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

import jaxcrystal
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.interface.tables import SHOWN, Relaxations, Relaxed
from jaxcrystal.reader.rows import Row
from jaxcrystal.relaxation.batch import Relaxation, RelaxationStatus

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def crystals():
    alloy = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    return jaxcrystal.read({HOSTILE: SALT, "b": None, "c": alloy, "d": SALT.get_primitive_structure()})


@pytest.fixture
def relaxed():
    sample = Row("a", 0, "ok", "", Crystal.from_structure(SALT), "")
    end = Relaxation(RelaxationStatus.NOT_CONVERGED, "the steps ran out", SALT, -27.0, 5, 0.3, 0.01, -0.02)
    lost = Relaxation(RelaxationStatus.CRASHED, "the process that worked on it died")
    missing = Row(HOSTILE, 2, "missing", "the row has no CIF", None, "")
    return Relaxations([Relaxed.of(sample, end), Relaxed.of(sample, lost), Relaxed.of(missing, None)], "P")


class Cells(HTMLParser):
    """Checks that elements are closed in their order; keeps the texts of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.tags = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def test_rows_are_counted_and_found(crystals):
    assert len(crystals) == 4 and crystals.counts == {"ok": 2, "missing": 1, "disordered": 1}
    assert repr(crystals) == "<Crystals: 4 rows: 2 ok, 1 missing, 1 disordered>"
    assert crystals["d"] is crystals[3] is crystals[-1] is list(crystals)[3]
    assert crystals[1:3].ids == ["b", "c"] and isinstance(crystals[1:3], jaxcrystal.Crystals)
    assert crystals[::-1].ids == crystals.ids[::-1] and crystals.notes == [()] * 4
    with pytest.raises(KeyError, match="nobody"):
        crystals["nobody"]
    with pytest.raises(IndexError):
        crystals[4]


def test_others_get_their_own_kind_row_by_row(crystals):
    structures, atoms = crystals.structures(), crystals.atoms()
    assert [s is None for s in structures] == [a is None for a in atoms] == [False, True, True, False]
    assert structures[0].matches(SALT) and atoms[0].pbc.all()
    np.testing.assert_allclose(atoms[0].get_all_distances(mic=True), structures[0].distance_matrix, atol=1e-6)
    assert atoms[0].get_chemical_symbols() == crystals.crystals[0].to_atoms().get_chemical_symbols()


def test_a_table_is_read_again(crystals, relaxed):
    table = crystals.to_pandas()
    assert list(table["outcome"]) == crystals.outcomes and table["num_atoms"].tolist()[::3] == [8, 2]
    assert table["a"][0] == pytest.approx(5.69, abs=1e-6) and table["volume"][0] == pytest.approx(5.69**3, abs=1e-4)
    again = jaxcrystal.read(table)
    assert again.ids == crystals.ids and again.crystals == crystals.crystals
    ends = relaxed.to_pandas()
    assert list(ends["energy"].fillna(0)) == [-27.0, 0, 0] and list(ends["outcome"]) == relaxed.outcomes
    assert jaxcrystal.read(ends).outcomes == ["ok", "missing", "missing"]


def test_relaxations_keep_what_became_of_each_row(relaxed):
    assert relaxed.outcomes == ["not_converged", "crashed", "missing"] and relaxed.energies == [-27.0, None, None]
    assert relaxed[0].energy_per_atom == -27.0 / 8 and relaxed[1].energy_per_atom is None
    assert relaxed.structures() == [SALT, None, None] and len(relaxed.atoms()[0]) == 8
    assert relaxed[HOSTILE].reason == "the row has no CIF" and relaxed[:1].potential == "P"


def test_a_notebook_shows_the_first_rows_with_pictures(crystals, relaxed):
    shown = crystals._repr_html_()
    cells = Cells(shown).cells
    assert "<script" not in shown and HOSTILE in cells
    assert shown.count("<svg") == 2 and "disordered" in cells and "NaCl" not in cells
    ids = re.findall(r'radialGradient id="(\w+)-', shown)
    assert len(set(ids)) == 2  # two pictures on one page do not share names
    many = jaxcrystal.read([SALT] * (SHOWN + 3))._repr_html_()
    assert many.count("<svg") == SHOWN and "… and 3 more" in many
    large = jaxcrystal.read(SALT * (2, 2, 2))._repr_html_()
    assert "<svg" not in large and "64" in Cells(large).cells
    ends = relaxed._repr_html_()
    assert {"−3.375", "0.010", "−2.0%", "5", "not_converged", "crashed", HOSTILE} <= set(Cells(ends).cells)
    assert ends.count("<svg") == 1 and "<script" not in ends
