"""Structure prediction: what is asked, how it is ranked, what is written; and that `evaluate --truth` reads it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition, Lattice, Structure
from random_models import model_of

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals import dataset
from jaxcrystal.errors import UserError
from jaxcrystal.interface.asked import asked, wishes
from jaxcrystal.interface.predicted import Ranking
from jaxcrystal.interface.predicting import predict
from jaxcrystal.relaxation.batch import Relaxation, RelaxationStatus
from jaxcrystal.sampling.attempt import Attempt

#: Two ids ask for the same; Na N is no missing value.
ASKED = "Material_ID,Formula,num_atoms\na,ClNa,2\nb,NaN,\nc,Na2Cl2,2\nd,NaCl,4\n"
SMALL = {"temperature": 1.0, "top_p": 1.0, "slots": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of("symmetry", "compact-symmetry", tmp_path_factory.mktemp("model"))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text(ASKED)
    return path


def test_what_a_table_asks_for(table, tmp_path):
    found = asked(table)
    assert [(one.id, one.formula, one.num_atoms) for one in found] == [
        ("a", "NaCl", 2), ("b", "NaN", None), ("c", "NaCl", 2), ("d", "NaCl", 4)
    ]  # fmt: skip
    assert [one.id for one in wishes(found).values()] == ["a", "b", "d"]
    frame = pd.read_csv(table, keep_default_na=False, dtype=str).astype({"num_atoms": "string"})
    frame.loc[1, "num_atoms"] = pd.NA
    frame["num_atoms"] = frame["num_atoms"].astype("Int64")
    frame.to_parquet(tmp_path / "asked.parquet")
    for source in (frame, tmp_path / "asked.parquet", str(table)):
        assert [one.condition for one in asked(source)] == [one.condition for one in found]
    assert [one.num_atoms for one in asked(frame.assign(num_atoms=[2.0, np.nan, 2.0, 4.0]))] == [2, None, 2, 4]
    assert [one.num_atoms for one in asked(table, num_atoms=False, limit=2)] == [None, None]
    typed = asked(["SrTiO3", "LiO"])
    assert [(one.id, one.formula, one.num_atoms) for one in typed] == [
        ("SrTiO3",) * 2 + (None,),
        ("LiO", "Li2O2", None),
    ]
    assert asked({"x": "SrTiO3"})[0].id == "x" and asked("SrTiO3")[0].formula == "SrTiO3"


def test_a_set_of_the_package_is_asked_for_as_it_is():
    crystals = dataset.load("mp20-test")
    for i, one in enumerate(asked("mp20-test", limit=5)):
        assert (one.id, one.num_atoms) == (crystals.ids[i], len(crystals.crystal(i)))
        assert one.formula == crystals.attributes(i)["pretty_formula"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,composition\na,NaCl\n", r"x\.csv has no column `formula`; its columns are id, composition"),
        ("formula\n", r"x\.csv has no row: there is nothing to predict"),
        ("formula\nNaCl\nXx2\n", r"x\.csv, row 1: 'Xx' of the formula 'Xx2' is no chemical element"),
        ("formula\nNaCl\n\"\"\n", r"x\.csv, row 1: the formula '' is empty"),
        ("formula,num_atoms\nNaCl,3\n", r"x\.csv, row 0: a cell of NaCl cannot have 3 atoms; .* have 2, 4, …"),
        ("formula,num_atoms\nNaCl,0\n", r"x\.csv, row 0: a cell of NaCl cannot have 0 atoms"),
        ("formula,num_atoms\nNaCl,two\n", r"x\.csv, row 0: the number of atoms is 'two'; give a whole number"),
        ("formula\nNaCl\nNaCl\n", r"x\.csv, row 1: 'NaCl' is there before, in .*x\.csv, row 0; give each"),
    ],
)  # fmt: skip
def test_tables_that_ask_for_nothing(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        asked(tmp_path / "x.csv")


def attempt(index, text, status, log_probability):
    return Attempt(index, index, 0, "p", "{}", text, status, log_probability, None, 9, None, None, None, None)


ATTEMPTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["ok", "truncated"]), st.integers(-9, 0)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(ATTEMPTS)
def test_each_rank_is_the_best_of_what_is_left(rows):
    """Against a choice one by one: of those that are crystals and new, else crystals, else all, the likeliest."""
    # A text has one probability.
    logs = {text: float(log) for text, _, log in rows}
    attempts = [attempt(i, text, status, logs[text]) for i, (text, status, _) in enumerate(rows)]
    found = list(Ranking().ranked(asked({"x": "NaCl", "y": "NaCl"}), attempts))
    assert [(one.id, one.rank) for one in found] == [(i, n) for i in "xy" for n in range(1, len(rows) + 1)]
    left, there = list(attempts), set()
    for one in found[: len(rows)]:
        good = [a for a in left if a.status == "ok"]
        new = [a for a in good if a.text not in there]
        best = max(new or good or left, key=lambda a: (a.log_probability, -a.index))
        if not good:  # of what failed only that it is last
            assert one.attempt.status != "ok"
        else:
            assert one.attempt == best
        there.add(one.attempt.text)
        left.remove(one.attempt)
    assert [one.attempt for one in found[len(rows) :]] == [one.attempt for one in found[: len(rows)]]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """Three attempts at each crystal of the table, and the folder of the files."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "asked.csv").write_text(ASKED)
    return predict(folder / "asked.csv", model, folder / "p.parquet", attempts=3, **SMALL), folder


def test_each_crystal_has_its_attempts(made):
    found, folder = made
    rows = pd.read_parquet(folder / "p.parquet")
    assert list(rows["material_id"]) == [name for name in "abcd" for _ in range(3)]
    assert list(rows["rank"]) == [1, 2, 3] * 4 and list(rows["text"]) == [row.attempt.text for row in found]
    assert len(pd.read_parquet(folder / "p.drawn.parquet")) == 9  # a and c share theirs
    wanted = {"a": "NaCl", "b": "NaN", "c": "NaCl", "d": "NaCl"}
    assert found.counts["ok"] > 6
    for one in found:
        if one.crystal is not None:
            assert Composition(one.crystal.formula).reduced_formula == wanted[one.id]
            assert one.id == "b" or len(one.crystal) == {"a": 2, "c": 2, "d": 4}[one.id]
    assert len(found.first()) == 4 and str(found).count("\n") == 4 and "log p" in found._repr_html_()


def test_what_was_drawn_is_ranked_by_energy(made, model, tmp_path, monkeypatch):
    shutil.copytree(made[1], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("jaxcrystal.relaxation.relaxations.potential_card", lambda name, workers: name)
    monkeypatch.setattr("jaxcrystal.relaxation.relaxations.relax_all", relax_all)
    drawn = (tmp_path / "p.drawn.parquet").read_bytes()
    options = {"attempts": 3, "rank_by": "energy", "potential": "P"} | SMALL
    ranked = predict(tmp_path / "asked.csv", model, tmp_path / "p.parquet", **options)
    assert (tmp_path / "p.drawn.parquet").read_bytes() == drawn
    rows = pd.read_parquet(tmp_path / "p.parquet")
    for _, one in rows.groupby("material_id"):
        new = one[~one["text"].duplicated() & one["energy_per_atom"].notna()]
        assert new["energy_per_atom"].is_monotonic_increasing and list(new.index) == list(one.index[: len(new)])
    assert (rows["relaxation"] == "converged").sum() == rows["relaxed_cif"].notna().sum() == ranked.counts["ok"]


def relax_all(structures, *_, **__):
    """An energy that is that of no potential."""
    return [Relaxation(RelaxationStatus.CONVERGED, "", one, -one.volume, 1) for one in structures]


@pytest.mark.slow
def test_a_living_sampler_says_the_same_and_more_is_drawn_behind_it(made, model, tmp_path):
    found, folder = made
    with jaxcrystal.load(model, **SMALL) as sampler:
        assert sampler.predict(folder / "asked.csv", 3).to_pandas().equals(found.to_pandas())
        same = sampler.predict(["NaCl"], 3, num_atoms=2)
        assert [row.attempt.text for row in same] == [row.attempt.text for row in found.rows[:3]]
        with pytest.raises(UserError, match="rank_by energy needs a potential"):
            sampler.predict("NaCl", 1, rank_by="energy")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    more = predict(tmp_path / "asked.csv", model, tmp_path / "p.parquet", attempts=4, **SMALL)
    texts = {row.attempt.text for row in found if row.id == "d"}
    assert texts <= {row.attempt.text for row in more if row.id == "d"} and len(more) == 16


def test_evaluate_reads_what_was_predicted(made, tmp_path):
    def pair(anion, atoms=2):
        """Of sodium, as many atoms as it takes."""
        coords = [[i / atoms, 0.5 * (i % 2), 0.5 * (i % 2)] for i in range(atoms)]
        return Structure(Lattice.orthorhombic(2.8 * atoms, 4, 4), ["Na", anion] * (atoms // 2), coords)

    truth = {"a": pair("Cl"), "b": pair("N"), "c": pair("Cl"), "d": pair("Cl", 4), "e": pair("Br")}
    found = jaxcrystal.evaluate(made[1] / "p.parquet", tmp_path / "out", truth=truth)
    counted = found.metrics["counts"]
    assert counted["truth"] == {"crystals": 4, "fewest_predictions": 3, "most_predictions": 3}
    assert found.metrics["inputs"]["truth"]["left_out"] == {"no_sample": 1}
    assert "match_rate_at_1" in found.metrics["prediction"] and list(found.table["rank"]) == [1, 2, 3] * 4
    assert (
        jaxcrystal.evaluate(made[0], tmp_path / "again", truth=truth).metrics["prediction"]
        == found.metrics["prediction"]
    )
    crossed = truth | {"b": pair("Cl")}
    with pytest.raises(
        UserError, match=r"p\.parquet, row 3: NaN was asked for 'b', whose true crystal in truth \(row 1\) is"
    ):
        jaxcrystal.evaluate(made[1] / "p.parquet", tmp_path / "out", truth=crossed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attempts": 0}, "num is 0; it must be at least 1"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"rank_by": "beauty"}, "rank_by is 'beauty'; it is log_probability or energy"),
        ({"potential": "chgnet"}, "a potential is for rank_by energy"),
        ({"out": "p.txt"}, r"cannot write p\.txt: give a name that ends in \.parquet or \.csv"),
        ({"formulas": "nowhere.csv"}, r"cannot read nowhere\.csv as a table: No such file"),
        ({"formulas": {"a": "NaCl", "b": "MgO"}, "num_atoms": 3}, r"the formulas, row 0: .*3"),
    ],
)
def test_what_cannot_be_predicted(model, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        predict(**({"formulas": "NaCl", "model_dir": model, "out": Path("p.parquet")} | change))
    assert not Path("p.parquet").exists()


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    """mini, of three formulas that everybody knows."""
    monkeypatch.chdir(tmp_path)
    Path("f.csv").write_text("material_id,formula,num_atoms\nsalt,NaCl,2\npericlase,MgO,2\nperovskite,SrTiO3,5\n")
    assert main(["predict", "f.csv", "--model", "mini", "--attempts", "2", "--out", "p.parquet"]) == 0
    told = capsys.readouterr().out
    assert "Predictions: 6 rows" in told and "  salt: NaCl, 2 atoms, space group" in told
    rows = pd.read_parquet("p.parquet")
    assert list(rows["rank"]) == [1, 2] * 3 and list(rows["material_id"].unique()) == [
        "salt",
        "periclase",
        "perovskite",
    ]
    logs = rows["log_probability"].to_numpy().reshape(3, 2)
    repeated = rows["text"].to_numpy().reshape(3, 2)
    assert all(a >= b for (a, b), (s, t) in zip(logs, repeated, strict=True) if s != t)
    assert json.loads(Path("p.drawn.parquet.json").read_text())["request"]["num"] == 2
