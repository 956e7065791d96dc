"""Energies of another unit, functional or correction are refused in one line that says what they look like."""

import json

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Composition
from pymatgen.entries.computed_entries import ComputedEntry

from jaxcrystal.errors import UserError
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull
from jaxcrystal.hull.scale import ELEMENT_TOLERANCE, known_compounds, known_elements
from jaxcrystal.hull.sources import build, known_hull

KNOWN = known_compounds()
REFERENCES = ElementReferences(dict(known_elements()))


def table(path, energies):
    rows = [{"formula": formula, "formation_energy_per_atom": energy} for formula, energy in energies.items()]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def true_total(compound):
    return compound.energy + sum(n * known_elements()[s] for s, n in compound.counts.items()) / compound.atoms


#: What a wrong table holds for a compound, and what the refusal says.
LIES = {
    "kJ/mol": (lambda c: c.energy * 96.485, "as in kJ/mol an atom"),
    "kJ/mol of formula": (lambda c: c.energy * 96.485 * c.atoms, "as in kJ/mol a formula unit"),
    "Hartree": (lambda c: c.energy / 27.2114, "as in Hartree an atom"),
    "formula unit": (lambda c: c.energy * c.atoms, "as in eV a formula unit"),
    "flipped": (lambda c: -c.energy, "as in eV an atom, with the sign changed"),
    "uncorrected": (lambda c: c.energy - c.correction, "as without the MP2020 corrections"),
    "total": (true_total, "as total energies: subtract"),
}


def test_the_tables_are_wide():
    """Oxides, halides, chalcogenides and the rest; a third are intermetallics and others without a correction."""
    assert len(known_elements()) == 89 and len(KNOWN) > 600
    assert len({symbol for compound in KNOWN for symbol in compound.counts}) > 75
    for anion, least in {"O": 80, "F": 25, "Cl": 20, "Br": 10, "I": 10, "S": 40, "Se": 20, "Te": 20, "N": 20}.items():
        assert sum(anion in compound.counts for compound in KNOWN) >= least, anion
    assert sum(not compound.correction for compound in KNOWN) > 200
    assert all(Composition(c.formula).as_dict() == c.counts for c in KNOWN)


def test_a_hull_of_known_compounds_is_as_it_should_be(tmp_path):
    hull = Hull.from_table(table(tmp_path / "t.csv", {c.formula: c.energy for c in KNOWN}), REFERENCES)
    assert hull.scale.startswith(f"checked: {len(KNOWN)} compounds") and "error 0.000 eV/atom" in hull.scale


def test_polymorphs_and_a_few_odd_rows_do_not_matter(tmp_path):
    """The lowest phase is compared, and the median; another formula of the same composition is the same compound."""
    energies = {c.formula: c.energy + (0.5 if row % 3 == 0 else 0.01) for row, c in enumerate(KNOWN)}
    path = table(tmp_path / "t.csv", energies)
    with path.open("a") as file:
        file.write("Na4Cl4,-2.03\nNaCl,-1.5\n")
    hull = Hull.from_table(path, REFERENCES)
    assert "at most 0.500" in hull.scale
    (alone,) = [Hull.from_table(table(tmp_path / "a.csv", {"Na4Cl4": -2.03, "NaCl": 3.0}), REFERENCES).scale]
    assert alone.startswith("checked: 1 compounds")


@pytest.mark.parametrize("lie", LIES)
def test_a_hull_of_another_scale_is_refused_and_named(tmp_path, lie):
    wrong, words = LIES[lie]
    path = table(tmp_path / "t.csv", {c.formula: wrong(c) for c in KNOWN})
    with pytest.raises(UserError, match=rf"t\.csv: formation energies of .* are off by .*known.*{words}") as error:
        Hull.from_table(path, REFERENCES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lie", LIES)
def test_a_small_chemical_system_is_enough(tmp_path, lie):
    """Two known compounds among others; uncorrected oxides beside intermetallics, which have no correction."""
    wrong, words = LIES[lie]
    small = [c for c in KNOWN if {"Al", "Ni", "O"}.issuperset(c.counts)]
    assert len(small) == 5
    known = {c.formula: c.energy for c in small} | {"Al5Ni2O9": -2.0}
    assert Hull.from_table(table(tmp_path / "right.csv", known), REFERENCES).scale.startswith("checked: 5 compounds")
    with pytest.raises(UserError, match=words):
        Hull.from_table(table(tmp_path / "t.csv", known | {c.formula: wrong(c) for c in small}), REFERENCES)


def test_a_hull_without_a_known_compound_says_so(tmp_path):
    hull = Hull.from_table(table(tmp_path / "t.csv", {"AcPm3": 5.0, "Tc7Np": -300.0}), REFERENCES)
    assert hull.scale == f"not checked: it holds none of {len(KNOWN)} compounds of known formation energy"
    hull.write(tmp_path / "h.parquet")
    assert Hull.from_file(tmp_path / "h.parquet").scale == hull.scale


def test_a_hull_that_an_older_version_wrote_is_checked_when_it_is_read(tmp_path, monkeypatch):
    path = table(tmp_path / "t.csv", {c.formula: -c.energy for c in KNOWN})
    with monkeypatch.context() as patch:
        patch.setattr("jaxcrystal.hull.hull.compared_with_known", lambda *_: "")
        Hull.from_table(path, REFERENCES).write(tmp_path / "h.parquet")
    with pytest.raises(UserError, match=r"h\.parquet is not to be used: t\.csv: .*with the sign changed"):
        Hull.from_file(tmp_path / "h.parquet")


def reference_file(path, energies):
    path.write_text(json.dumps({s: ComputedEntry(s, e).as_dict() for s, e in energies.items()}))
    return path


@pytest.mark.parametrize("symbol", sorted(known_elements()))
def test_a_reference_that_is_shifted_is_named(tmp_path, symbol):
    """0.6 eV on any element; CuSi was all that was looked at."""
    for shift in (0.6, -0.6):
        wrong = dict(known_elements()) | {symbol: known_elements()[symbol] + shift}
        with pytest.raises(UserError, match=rf"r\.json is of another .*: {symbol} has .* eV/atom, there .*uncorrected"):
            ElementReferences.from_file(reference_file(tmp_path / "r.json", wrong))


@pytest.mark.parametrize("factor", [96.485, 1 / 27.2114, -1.0, 2.0])
def test_references_of_another_unit_are_refused(tmp_path, factor):
    path = reference_file(tmp_path / "r.json", {s: factor * e for s, e in known_elements().items()})
    with pytest.raises(UserError, match=r"r\.json is of another functional or scale .*, and \d+ more; element ref"):
        ElementReferences.from_file(path)


def test_references_that_differ_by_little_are_taken(tmp_path):
    wrong = {s: e + 0.9 * ELEMENT_TOLERANCE for s, e in known_elements().items()} | {"Po": 4.0}
    assert ElementReferences.from_file(reference_file(tmp_path / "r.json", wrong)).energies == pytest.approx(wrong)


def test_uncorrected_entries_that_say_they_are_corrected(tmp_path):
    """A phase diagram's entries are taken at their word; their energies are not."""
    from monty.serialization import dumpfn
    from pymatgen.analysis.phase_diagram import PDEntry

    some = [c for c in KNOWN if {"Li", "Fe", "O", "P", "Ti"}.issuperset(c.counts)]
    elements = [PDEntry(symbol, known_elements()[symbol]) for symbol in ("Li", "Fe", "O", "P", "Ti")]
    for corrected in (True, False):
        entries = [PDEntry(c.formula, c.atoms * (true_total(c) - (0 if corrected else c.correction))) for c in some]
        dumpfn([*elements, *entries], tmp_path / "e.json")
        if corrected:
            assert build([tmp_path / "e.json"], tmp_path / "h.parquet").scale.startswith(f"checked: {len(some)} comp")
        else:
            with pytest.raises(UserError, match=r"e\.json: .*as without the MP2020 corrections: add these"):
                build([tmp_path / "e.json"], tmp_path / "h.parquet")


@pytest.mark.slow
def test_the_real_hulls_and_references_pass(shared, tmp_path):
    """All sources; MP-20's crystals alone; each fifth of them, in which ground states are missing."""
    references = shared / "data/hull/mp_elemental_reference_entries.json.gz"
    whole = known_hull([shared / "data/hull/mp_formation_energies.parquet"], references)
    assert whole.scale.startswith(f"checked: {len(KNOWN)} compounds")
    rows = pd.concat([pd.read_parquet(shared / f"data/mp20/{name}.parquet") for name in ("train", "val", "test")])
    rows = rows[rows["formation_energy_per_atom"].notna()].rename(columns={"pretty_formula": "formula"})
    parts = [rows, *(rows.iloc[part] for part in np.array_split(np.random.default_rng(0).permutation(len(rows)), 5))]
    for part in parts:
        part[["formula", "formation_energy_per_atom"]].to_csv(tmp_path / "t.csv", index=False)
        scale = known_hull([tmp_path / "t.csv"], references).scale
        print(len(part), scale)
        assert scale.startswith("checked: ")
