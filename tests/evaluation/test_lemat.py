"""LeMat-GenBench's rules against loops over all there is; its known defects are not ours."""

import itertools
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.bond_valence import BVAnalyzer
from pymatgen.analysis.hhi import HHIModel
from pymatgen.core import Composition, Element, Lattice, Structure
from smact.metallicity import metallicity_score

import jaxcrystal
from jaxcrystal.crystals.crystal import Crystal, reduced_composition
from jaxcrystal.evaluation import lemat
from jaxcrystal.evaluation.lemat import charges, distances, hhi, judged, packing, plausibility
from jaxcrystal.evaluation.protocols import PROTOCOLS, protocol_named
from jaxcrystal.evaluation.table import describe
from jaxcrystal.evaluation.validity import chemistry
from jaxcrystal.reader.reading import read
from jaxcrystal.report import report
from jaxcrystal.workers import Lost

STATES = "smact-icsd24"
SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def of(formula, edge=8.0):
    """A structure of that formula, its atoms on a grid."""
    symbols = [element.symbol for element, n in Composition(formula).items() for _ in range(int(n))]
    side = int(np.ceil(len(symbols) ** (1 / 3)))
    places = itertools.islice(itertools.product(np.arange(side) / side, repeat=3), len(symbols))
    return Structure(Lattice.cubic(edge), symbols, list(places))


def by_all_choices(counts):
    """The composition's part, one state for every single atom after another."""

    def choices(states, atoms):
        every = itertools.combinations_with_replacement(sorted(set(states)), atoms)
        return {sum(one) for one in every if one[-1] - one[0] <= 1}

    def balance(of_each):
        return any(sum(one) == 0 for one in itertools.product(*of_each))

    symbols = [symbol for symbol, _ in counts]
    formers = "H B C Si N P As Sb O S Se Te F Cl Br I".split()
    if len(symbols) == 1 or not set(formers) & set(symbols) or metallicity_score(Composition(dict(counts))) > 0.7:
        return True
    if balance([choices(chemistry(symbol, STATES).states, n) for symbol, n in counts]):
        return True
    known = [(Element(s).oxidation_states, Element(s).X, n) for s, n in counts]
    cations = itertools.product([True, False], repeat=len(known))
    for is_cation in cations:
        pairs = [(x, y) for (_, x, _), c in zip(known, is_cation, strict=True) if c
                 for (_, y, _), d in zip(known, is_cation, strict=True) if not d]  # fmt: skip
        kept = [
            [s for s in states if s == 0 or (s > 0) == c] for (states, _, _), c in zip(known, is_cation, strict=True)
        ]
        if not any(x > y for x, y in pairs) and balance(
            [choices(states, n) for states, (_, _, n) in zip(kept, known, strict=True)]
        ):
            return True
    return False


def test_charges_balance_as_trying_every_atoms_state_says():
    generator = np.random.default_rng(3)
    pool = "H Li B C N O F Na Mg Al Si P S Cl K Ti Mn Fe Cu Zn Ga As Br Sr Ag Sb Te I Cs Ba La Pt Pb".split()
    verdicts = []
    for _ in range(400):
        chosen = generator.choice(pool, generator.integers(1, 4), replace=False)
        counts = tuple(sorted((str(symbol), int(generator.integers(1, 5))) for symbol in chosen))
        counts = reduced_composition([symbol for symbol, n in counts for _ in range(n)])
        assert lemat._balances(counts, STATES) == by_all_choices(counts), counts
        verdicts.append(lemat._balances(counts, STATES))
    assert 10 < verdicts.count(False) < 200


@pytest.mark.parametrize(
    ("formula", "neutral"),
    [
        ("NaCl", True),
        ("NaCl3", False),
        ("Fe3O4", True),  # two of three of one state, one of the next
        ("CuSi", True),  # equal electronegativities: a NaN there
        ("Mn40Si41", True),  # all choices for 40 atoms of seven states would not end there
        ("Cu50Si49O30", True),
        ("C60H1", False),
        ("C60", True),
        ("Al12Mg17", True),
        ("RfO2", False),  # smact does not know it
        ("HeO", False),
    ],
)
def test_what_is_neutral(formula, neutral):
    counts = reduced_composition(site.specie.symbol for site in of(formula))
    assert lemat._balances(counts, STATES) is neutral


def test_bond_valences_are_asked_where_the_composition_does_not_say(monkeypatch):
    monkeypatch.setattr(lemat, "_balances", lambda counts, states_set: False)
    assert charges(SALT, STATES, bonds=True).valid and sum(BVAnalyzer().get_valences(SALT)) == 0
    for other in (of("NaCl3"), of("CuSi"), of("LrO")):  # it finds none, it has no table
        with pytest.raises((ValueError, KeyError)):
            BVAnalyzer().get_valences(other)
        assert charges(other, STATES, bonds=True).reason == "no metal, and no oxidation states balance"

    # Of atoms on top of each other there would be neighbours by the million.
    monkeypatch.setattr(lemat, "_bonds_balance", lambda structure: pytest.fail("bonds are looked at"))
    needle = Crystal([0.05, 0.05, 0.05], [90, 90, 90], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert not judged(needle, needle.to_structure(), STATES).charges.valid


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_distances_equal_a_loop_over_pairs(seed):
    generator = np.random.default_rng(seed)
    symbols = generator.choice(["H", "O", "Cs", "Fe", "He", "Lr"], generator.integers(1, 6))
    structure = Structure(Lattice.cubic(generator.uniform(2, 7)), symbols, generator.random((len(symbols), 3)))
    valid = True
    for i, j in itertools.combinations(range(len(structure)), 2):
        radii = sum(float(structure[k].specie.atomic_radius or 1.0) for k in (i, j))
        valid &= bool(structure.get_distance(i, j) >= 0.5 * (0.7 + radii))
    verdict = distances(structure)
    assert verdict.valid is valid and bool(verdict.reason) is not valid


def cell(symbol="Fe", lengths=(3, 3, 3), atoms=1):
    return Structure(Lattice.from_parameters(*lengths, 90, 90, 90), [symbol] * atoms, np.zeros((atoms, 3)))


@pytest.mark.parametrize(
    ("structure", "group", "reason"),
    [
        (cell(), 221, ""),
        (cell(), None, "no space group is found within 0.01 Å"),
        (cell(lengths=(0.99, 9, 9)), 123, "the cell's edges are 0.99 to 9 Å, beyond 1 to 100"),
        (cell(lengths=(3, 3, 101)), 123, "the cell's edges are 3 to 101 Å, beyond 1 to 100"),
        (cell(lengths=(1, 1, 1)), 221, "the cell's volume is 1 Å³, not above 1"),
        (cell("Os", lengths=(2, 2, 2)), 221, "the density is 39.5 g/cm³, beyond 0.01 to 25"),
        (cell("H", lengths=(99, 99, 99)), 221, "the density is 1.72e-06 g/cm³, beyond 0.01 to 25"),
        (cell("H", lengths=(2, 2, 2), atoms=5), 221, "0.625 atoms fill an Å³, beyond 0.00001 to 0.5"),
    ],
)
def test_what_is_plausible(structure, group, reason):
    verdict = plausibility(structure, group)
    assert (verdict.valid, verdict.reason) == (not reason, reason)


def test_supply_and_packing_by_hand():
    table = HHIModel().symbol_hhip_hhir
    production, reserve = hhi((("Fe", 2), ("Nd", 1)))
    assert production == pytest.approx((2 * table["Fe"][0] + table["Nd"][0]) / 3000)
    assert reserve == pytest.approx((2 * table["Fe"][1] + table["Nd"][1]) / 3000)
    production, reserve = hhi((("H", 1), ("Li", 1)))  # of hydrogen nothing is known: the largest, 10
    assert production == pytest.approx(5 + table["Li"][0] / 2000)
    assert reserve == pytest.approx(5 + table["Li"][1] / 2000)
    assert packing(SALT) == pytest.approx(4 * 4 / 3 * np.pi * (1.66**3 + 1.02**3) / 5.69**3)
    assert packing(cell("Fe", (1.5, 1.5, 1.5))) == 1.0 and packing(cell("Lr")) is None


def test_crystals_near_the_hull_are_valid():
    """All of MP-20 lie within 0.08 eV/atom of the hull; the original's rules refuse a tenth of such crystals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [judged(row.crystal, row.crystal.to_structure(), STATES) for row in read("mp20-test", limit=100).rows]
    assert all(one.distances.valid and one.plausibility.valid for one in found)
    assert sum(one.charges.valid for one in found) >= 0.97 * len(found)


def test_a_row_has_what_the_rules_found_whatever_became_of_it(monkeypatch):
    crystals = [SALT, of("NaCl3"), cell("Fe", (3, 3, 120)), None]
    table = describe(read(crystals).rows, PROTOCOLS["lemat"])
    assert list(table["structural_valid"]) == [True, True, False, False]
    assert list(table["compositional_valid"]) == [True, False, True, False]
    assert list(table["distances_valid"]) == [True, True, True, False] and table["distances_valid"].dtype == bool
    assert list(table["plausible"]) == [True, True, False, False]
    assert table["spacegroup_lemat"].tolist()[0] == 225 and pd.isna(table["spacegroup_lemat"][3])
    assert table["hhi_production"].isna().tolist() == [False, False, False, True]
    assert table["invalid_because"][2] == "the cell's edges are 3 to 120 Å, beyond 1 to 100"
    others = describe(read(crystals).rows, PROTOCOLS["cdvae"])
    assert {"plausible", "packing", "hhi_reserve"} & set(others) == set()

    def lose(function, items, workers, label, lost):
        return [lost(item, Lost.CRASHED) for item in items]

    monkeypatch.setattr("jaxcrystal.evaluation.table.each", lose)
    lost = describe(read(crystals).rows, PROTOCOLS["lemat"])
    assert list(lost) == list(table) and set(lost["outcome"]) == {"crashed"} and not lost["plausible"].any()


def test_other_oxidation_states_are_another_protocol():
    other = protocol_named("lemat+smact14")
    assert (other.name, other.rules, other.oxidation_states) == ("lemat+smact14", "lemat", "smact14")
    table = describe(read([of("CuSi")]).rows, other)
    assert table["compositional_valid"][0] == lemat._balances((("Cu", 1), ("Si", 1)), "smact14")


def test_an_evaluation_by_these_rules(tmp_path):
    samples = [SALT, SALT.copy(), of("NaCl3"), of("CuSi"), None]
    found = jaxcrystal.evaluate(samples, tmp_path / "report", protocol="lemat", train=[of("CuSi")])
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["validity"] == {
        "structural": 0.8, "compositional": 0.6, "both": 0.6, "distances": 0.8, "plausibility": 0.8
    }  # fmt: skip
    assert metrics["uniqueness"] == {"rate": 0.6, "rate_of_valid": 2 / 3}
    assert metrics["novelty"] == {"by_matching": 0.6, "by_matching_of_valid": 2 / 3}
    assert metrics["diversity"]["element_coverage"] == 4 / 118
    assert set(metrics["hhi"]) == {"production", "reserve", "combined"}
    note = PROTOCOLS["lemat"].note
    assert note in str(found) and note in (tmp_path / "report" / "report.html").read_text()
    assert "hhi.production" in str(found) and "%" not in next(
        line for line in str(found).splitlines() if "hhi.production" in line
    ).replace("95 %", "")
    again = report.write(tmp_path / "report").read_text()
    assert again == (tmp_path / "report" / "report.html").read_text()
    plain = jaxcrystal.evaluate(samples)
    assert "LeMat" not in str(plain) and "hhi" not in plain.metrics


def test_the_crystal_is_the_structure():
    crystal = Crystal.from_structure(SALT)
    found = judged(crystal, crystal.to_structure(), STATES)
    assert found.spacegroup == 225 and found.charges.valid and found.packing == pytest.approx(packing(SALT))
