"""What was asked, judged: by hand, against a plain loop on random tables, and from a ledger to its page."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, Lattice, Structure

import jaxcrystal
from jaxcrystal.config import TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.conditions import TOLERANCE, met, unjudged
from jaxcrystal.evaluation.intervals import bootstrap_mean, wilson
from jaxcrystal.evaluation.results import read
from jaxcrystal.sampling.attempt import Attempt, judge
from jaxcrystal.texts.forms import form_of

COLUMNS = ("formula", "chemical_system", "num_atoms", "spacegroup", "spacegroup_relaxed", "e_above_hull")
#: What is no crystal has nothing; the last was not relaxed.
ROWS = [
    ("NaCl", "Cl-Na", 2, 225, 225, 0.0),
    ("NaCl", "Cl-Na", 8, 221, 225, -0.02),
    ("Na", "Na", 1, 229, 229, 0.08),
    (None, None, None, None, None, None),
    ("NaCl", "Cl-Na", 2, 225, None, None),
]


def table_of(asked: list[dict], forced: list[list] | None = None, rows: list[tuple] = ROWS) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS)
    table = table.astype(dict.fromkeys(("num_atoms", "spacegroup", "spacegroup_relaxed"), "Int64"))
    table["e_above_hull"] = table["e_above_hull"].astype(float)
    table["asked"] = [json.dumps(wanted) for wanted in asked]
    table["forced"] = [json.dumps(names) for names in forced or [[]] * len(asked)]
    return table


def numbers(table, unconditional=None) -> dict[str, float]:
    return {name: value for found, _ in met(table, unconditional) for name, value in found.items()}


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"pretty_formula": "NaCl"}, {"formula.formula": 3}),
        ({"elements": ["Na", "Cl"]}, {"elements.elements": 3}),
        ({"elements": ["Na"]}, {"elements.elements": 1}),
        ({"num_atoms": [2, 8]}, {"num_atoms.num_atoms": 3}),
        ({"num_atoms": [3, None]}, {"num_atoms.num_atoms": 1}),
        ({"spacegroup.number": 225}, {"spacegroup.spacegroup": 2, "spacegroup.spacegroup_relaxed": 2}),
        ({"spacegroup.number": [222, 230]}, {"spacegroup.spacegroup": 3, "spacegroup.spacegroup_relaxed": 3}),
        ({"e_above_hull": 0.0}, {"e_above_hull.e_above_hull": 2}),  # below the hull is on it
        ({"e_above_hull": 0.1}, {"e_above_hull.e_above_hull": 1}),
        ({"e_above_hull": [None, 0.0]}, {"e_above_hull.e_above_hull": 2}),
        ({"e_above_hull": [0.05, 0.1]}, {"e_above_hull.e_above_hull": 1}),
        ({"formation_energy_per_atom": -1.0}, {}),  # this table has none
        ({"band_gap": 1.0}, {}),
        (
            {"pretty_formula": "NaCl", "spacegroup.number": 225},
            {
                "formula+spacegroup.formula": 3,
                "formula+spacegroup.spacegroup": 2,
                "formula+spacegroup.spacegroup_relaxed": 2,
                "formula+spacegroup.all": 2,
            },
        ),
        ({"pretty_formula": "NaCl", "band_gap": 1.0}, {"formula+band_gap.formula": 3}),
    ],
)
def test_by_hand(wanted, told):
    found = numbers(table_of([wanted] * 5))
    assert found == {f"conditions.{name}.met_rate": count / 5 for name, count in told.items()}


def test_groups_and_what_the_grammar_saw_to():
    asked = [
        {"pretty_formula": "NaCl"},
        {"pretty_formula": "Na"},
        {},
        {"spacegroup.number": 225},
        {"num_atoms": [2, 2]},
    ]
    forced = [["pretty_formula"], ["pretty_formula"], [], [], ["num_atoms"]]
    table = table_of(asked, forced)
    pairs = list(met(table))
    found = {name: value for values, _ in pairs for name, value in values.items()}
    assert found == {
        "conditions.formula.formula.forced_rate": 0.5,
        "conditions.spacegroup.spacegroup.met_rate": 0.0,
        "conditions.spacegroup.spacegroup_relaxed.met_rate": 0.0,
        "conditions.num_atoms.num_atoms.forced_rate": 1.0,
    }
    assert pairs[0][1] == {"conditions.formula.formula.forced_rate": wilson(1, 2)}
    some = table_of(
        [{"pretty_formula": "NaCl"}] * 5, [["pretty_formula"]] * 4 + [[]]
    )  # of one the model was asked alone
    assert set(numbers(some)) == {"conditions.formula.formula.met_rate"}
    both = table_of([{"pretty_formula": "NaCl", "num_atoms": [2, 2]}] * 5, [["pretty_formula", "num_atoms"]] * 5)
    assert numbers(both)["conditions.formula+num_atoms.all.forced_rate"] == 0.4
    turned = {"num_atoms": [2, 2], "pretty_formula": "NaCl"}  # the same wish
    assert set(numbers(table_of([{"pretty_formula": "NaCl", "num_atoms": [2, 2]}] * 4 + [turned]))) == {
        f"conditions.formula+num_atoms.{what}.met_rate" for what in ("formula", "num_atoms", "all")
    }
    assert unjudged(table_of([{"band_gap": 1.0}, {"formation_energy_per_atom": 0.1}, {}, {"band_gap": 2.0}, {}])) == {
        "band_gap": 2,
        "formation_energy": 1,
    }


def test_a_base_rate_is_over_the_same_wishes():
    asked = [{"spacegroup.number": 225}] * 3 + [{"spacegroup.number": [228, 230]}] * 2
    rows = [("X", "X", 1, number, None, 0.3) for number in (225, 229, 1, 225)]
    pairs = list(met(table_of(asked), table_of([{}] * 4, rows=rows)))
    share = np.array([3, 2, 0, 3]) / 5
    assert pairs[0][0]["conditions.spacegroup.spacegroup.base_rate"] == pytest.approx(share.mean(), abs=1e-12)
    assert pairs[0][1]["conditions.spacegroup.spacegroup.base_rate"] == pytest.approx(bootstrap_mean(share))


ENDS = st.one_of(st.none(), st.floats(-1, 1))
WISH = st.fixed_dictionaries(
    {},
    optional={
        "pretty_formula": st.sampled_from(["NaCl", "Na", "SiO2"]),
        "elements": st.sampled_from([["Cl", "Na"], ["Na"]]),
        "num_atoms": st.tuples(st.integers(1, 4), st.integers(4, 9)).map(list),
        "spacegroup.number": st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 2), st.integers(2, 5)).map(list)),
        "e_above_hull": st.one_of(st.floats(0, 1), st.tuples(ENDS, ENDS).map(list)),
    },
)
CRYSTAL = st.one_of(
    st.just((None,) * 6),
    st.tuples(
        st.sampled_from([("NaCl", "Cl-Na"), ("Na", "Na"), ("SiO2", "O-Si")]),
        st.integers(1, 9),
        st.integers(1, 5),
        st.integers(1, 5),
        st.floats(-1, 1),
    ).map(lambda x: (*x[0], *x[1:])),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WISH, CRYSTAL), min_size=1, max_size=8), st.lists(CRYSTAL, min_size=1, max_size=5))
def test_against_a_plain_loop(attempts, others):
    def meets(name, wanted, row) -> bool:
        formula, system, atoms, group, _, hull = row
        if formula is None:
            return False
        low, high = wanted if isinstance(wanted, list) and not isinstance(wanted[0], str) else (wanted, wanted)
        if name == "e_above_hull":
            margin = 0 if isinstance(wanted, list) else TOLERANCE
            hull = max(hull, 0.0)
            return (low is None or hull >= low - margin) and (high is None or hull <= high + margin)
        if name in ("num_atoms", "spacegroup.number"):
            return low <= (atoms if name == "num_atoms" else group) <= high
        return wanted == formula if name == "pretty_formula" else "-".join(wanted) == system

    names = {"pretty_formula": "formula", "spacegroup.number": "spacegroup"}
    found = numbers(
        table_of([wish for wish, _ in attempts], rows=[row for _, row in attempts]),
        table_of([{}] * len(others), rows=others),
    )
    order = ["pretty_formula", "elements", "spacegroup.number", "e_above_hull", "num_atoms"]
    for attributes in {tuple(sorted(wish, key=order.index)) for wish, _ in attempts if wish}:
        mine = [(wish, row) for wish, row in attempts if set(wish) == set(attributes)]
        place = "conditions." + "+".join(names.get(name, name) for name in attributes)
        each = {name: [meets(name, wish[name], row) for wish, row in mine] for name in attributes}
        base = {
            name: np.mean([[meets(name, wish[name], row) for wish, _ in mine] for row in others]) for name in attributes
        }
        for name in attributes:
            assert found[f"{place}.{names.get(name, name)}.met_rate"] == np.mean(each[name])
            assert found[f"{place}.{names.get(name, name)}.base_rate"] == pytest.approx(base[name], abs=1e-12)
        if len(attributes) > 1:
            assert found[f"{place}.all.met_rate"] == np.mean(np.all(list(each.values()), axis=0))


def test_formulas_are_spelled_alike():
    """As prompts state them, and as the table has them: both by pymatgen."""
    from jaxcrystal.texts.conditions import BY_ATTRIBUTE

    rng = np.random.default_rng(0)
    for _ in range(300):
        symbols = rng.choice(["H", "Li", "C", "N", "O", "F", "Na", "S", "Cl", "Fe", "Cs"], rng.integers(1, 5), False)
        composition = Composition({str(symbol): int(rng.integers(1, 7)) for symbol in symbols})
        asked = BY_ATTRIBUTE["pretty_formula"].check(composition.formula.replace(" ", ""))
        assert asked == composition.reduced_formula


def ledger_of(asked: list[dict], forced: list[str]) -> pd.DataFrame:
    """Rows of a ledger: rock salt, CsCl, and what did not end."""
    form = form_of(TextFormat())
    salt = "5.7 5.7 5.7\n90 90 90\n" + "\n".join(
        f"{symbol}\n{x:.2f} {y:.2f} {z:.2f}"
        for symbol, shift in (("Na", 0.0), ("Cl", 0.5))
        for x, y, z in ((shift, 0, 0), ((shift + 0.5) % 1, 0.5, 0), ((shift + 0.5) % 1, 0, 0.5), (shift, 0.5, 0.5))
    )
    texts = [salt, "4.1 4.1 4.1\n90 90 90\nCs\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50", "4.1 4.1"]
    rows = []
    for index, wanted in enumerate(asked):
        text = texts[index % 3]
        status, crystal = judge(text, form)
        cif = None if crystal is None else crystal.to_cif()
        said = {"asked": json.dumps(wanted), "forced": json.dumps(forced)}
        rows.append(
            Attempt(index, index, 0, "", json.dumps(wanted), text, status, -1.0, -1.0, 9, None, cif, None, None, **said)
        )
    return pd.DataFrame([{k: v for k, v in vars(row).items() if k != "form"} for row in rows])


def test_from_a_ledger_to_the_page(tmp_path):
    wish = {"spacegroup.number": 225, "band_gap": [1.0, None]}
    found = jaxcrystal.evaluate(ledger_of([wish] * 6, []), tmp_path / "a")
    told = found.metrics["conditions"]["spacegroup+band_gap"]
    assert told == {"spacegroup": {"met_rate": pytest.approx(1 / 3)}}
    assert found.metrics["counts"]["not_judged"] == {"band_gap": 6}
    assert "conditions.spacegroup+band_gap.spacegroup.met_rate" in str(found)
    assert "6 asked for band_gap, which nothing judged" in str(found)
    assert "spacegroup, where spacegroup, band gap was asked" in (tmp_path / "a/report.html").read_text()
    plain = jaxcrystal.evaluate(ledger_of([{}] * 3, []), tmp_path / "plain")
    assert "conditions" not in plain.metrics and "asked" not in plain.table
    beside = jaxcrystal.evaluate(ledger_of([wish] * 6, []), tmp_path / "b", unconditional=plain)
    told = beside.metrics["conditions"]["spacegroup+band_gap"]["spacegroup"]
    assert told["base_rate"] == pytest.approx(1 / 3)
    from jaxcrystal.evaluation.metrics import metrics_from_table
    from jaxcrystal.evaluation.table import read_table

    table, provenance = read_table(tmp_path / "b/structures.parquet")
    base, _ = read_table(tmp_path / "b/unconditional.parquet")
    assert metrics_from_table(table, provenance, None, base) == read(tmp_path / "b").metrics
    jaxcrystal.evaluate(ledger_of([wish] * 6, []), tmp_path / "b")
    assert not (tmp_path / "b/unconditional.parquet").exists()


def test_the_tolerance_of_space_groups(tmp_path):
    """Rock salt whose cell is 0.05 Å off: cubic within 0.1 Å, tetragonal within 0.01."""
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.7), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    structure.apply_strain([0, 0, 0.009])
    groups = [
        list(jaxcrystal.evaluate(structure, tmp_path / str(symprec), symprec=symprec).table["spacegroup"])
        for symprec in (0.1, 0.01)
    ]
    assert groups == [[225], [139]]


def volume(structure) -> float:
    return structure.volume


def density(structure) -> float:
    return float(structure.density)


def test_what_cannot_be_compared(tmp_path):
    wish = {"spacegroup.number": 225}
    asked, plain = ledger_of([wish] * 3, []), ledger_of([{}] * 3, [])
    jaxcrystal.evaluate(plain, tmp_path / "plain")
    jaxcrystal.evaluate(asked, tmp_path / "asked")
    with pytest.raises(UserError, match="nothing was asked for these samples"):
        jaxcrystal.evaluate(plain, tmp_path / "x", unconditional=tmp_path / "plain")
    with pytest.raises(UserError, match="has attempts for which something was asked"):
        jaxcrystal.evaluate(asked, tmp_path / "x", unconditional=tmp_path / "asked")
    with pytest.raises(UserError, match=r"space groups of the unconditional samples: within 0\.1 Å; of these: within"):
        jaxcrystal.evaluate(asked, tmp_path / "x", unconditional=tmp_path / "plain", symprec=0.01)
    jaxcrystal.evaluate(plain, tmp_path / "judged", judges={"v": volume})
    with pytest.raises(UserError, match=r"judge of v of the unconditional samples: .*:volume; of these: .*:density"):
        jaxcrystal.evaluate(asked, tmp_path / "x", unconditional=tmp_path / "judged", judges={"v": density})
    with pytest.raises(UserError, match=r"cannot read .*none.*metrics\.json"):
        jaxcrystal.evaluate(asked, tmp_path / "x", unconditional=tmp_path / "none")
