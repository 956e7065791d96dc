"""`jaxcrystal.templates`: what it makes is written, read again and judged as any other set."""

import json

import pandas as pd
import pytest

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError

CUBE = [[0, 0, 0], [0.5, 0.5, 0.5]]
SET = {
    "salt": Crystal([4.0] * 3, [90] * 3, [11, 17], CUBE),
    "magnesia": Crystal([2.6] * 3, [90] * 3, [12, 8], CUBE),
    "helium": Crystal([4.0] * 3, [90] * 3, [2, 8], CUBE),
    "nothing": None,
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "set.csv"
    jaxcrystal.read(SET).to_pandas().to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_what_is_written_is_read_again(tmp_path, source, kind, capsys):
    path = tmp_path / f"made.{kind}"
    made = jaxcrystal.templates(source, 30, path, seed=3)
    assert f"note: 1 of 4 rows of {source} are no crystal, and no template" in capsys.readouterr().err
    assert set(made.counts) == {"ok", "no_swap"} and "nothing" not in {row.template for row in made}
    for again in (jaxcrystal.read(path), jaxcrystal.read(made), jaxcrystal.read(made.to_pandas())):
        assert again.ids == made.ids == [str(i) for i in range(30)]
        assert again.outcomes == made.outcomes and again.crystals == made.crystals
        assert not again.source.ignored_columns
    table = pd.read_parquet(path) if kind == "parquet" else pd.read_csv(path)
    assert list(table.columns) == ["index", "seed", "template", "swaps", "status", "formula", "cif", "redraws"]
    for row, swaps, formula in zip(made, table["swaps"], table["formula"], strict=True):
        assert row.swaps is None if pd.isna(swaps) else json.loads(swaps) == row.swaps
        assert row.crystal is None if pd.isna(formula) else row.crystal.formula == formula


def test_failures_alone_are_a_table_too(tmp_path):
    path = tmp_path / "made.parquet"
    jaxcrystal.templates({"helium": SET["helium"]}, 3, path)
    assert jaxcrystal.read(path).outcomes == ["no_swap"] * 3


def test_processes_change_nothing(source):
    assert jaxcrystal.templates(source, 20).rows == jaxcrystal.templates(source, 20, workers=2).rows


def test_it_is_judged_as_any_other_set(tmp_path, source, capsys):
    path = tmp_path / "made.parquet"
    assert main(["templates", str(source), "--num", "20", "--out", str(path), "--new", "--workers", "0"]) == 0
    made = jaxcrystal.templates(source, 20, new=True)
    ok, told = made.counts["ok"], capsys.readouterr().out
    shares = ", ".join(f"{count} {status}" for status, count in made.counts.items())
    assert told.startswith(f"20 attempts in {path}: {shares}; judge them with `jaxcrystal evaluate {path}`\n")
    redraws = sum(row.redraws for row in made)
    assert f"drawn again, for {source} had their formula: {redraws} (column `redraws`)" in told
    found = jaxcrystal.evaluate(path, tmp_path / "report")
    assert found.metrics["counts"]["attempts"] == 20 and found.metrics["counts"]["outcomes"] == made.counts
    assert found.metrics["validity"]["structural"] == ok / 20


def test_options_change_what_is_made(source):
    plain = jaxcrystal.templates(source, 40)
    assert plain.rows == jaxcrystal.templates(source, 40).rows
    for options in ({"swaps": 1}, {"tolerance": 0.3}, {"seed": 1}, {"new": True}):
        assert jaxcrystal.templates(source, 40, **options).rows != plain.rows, options
    assert {len(row.swaps) for row in jaxcrystal.templates(source, 40, swaps=1) if row.swaps} == {1}


def test_a_notebook_shows_it():
    made = jaxcrystal.templates({"<b>salt": SET["salt"]}, 2)
    html = made._repr_html_()
    assert "&lt;b&gt;salt" in html and "Cl → S, Na → " in html
    assert repr(made[:1]) == "<Substitutions: 1 rows: 1 ok>" and len(made.structures()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num is 0; it must be at least 1"),
        ({"swaps": 0}, "swaps is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"tolerance": -0.1}, "the tolerance is -0.1 Å; it must be at least 0"),
        ({"out": "made.json"}, "cannot write made.json: give a name that ends in .parquet or .csv"),
        ({"source": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"source": [None, None]}, "templates holds no crystal: its first row is missing"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        jaxcrystal.templates(**({"source": "prototypes", "num": 1} | options))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path, source):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        jaxcrystal.templates(source, 1, tmp_path / "file" / "made.parquet")
