"""The likeliest share: exactly that, of each prompt, however the rows came together; nothing of the others is lost."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import model_of

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import wilson
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.attempts_table import read_table
from jaxcrystal.sampling.keeping import KEEP_BY, PER, check, left_out, restored
from jaxcrystal.sampling.ledger import Ledger, Part, Request, finished, join
from jaxcrystal.sampling.sampling import sample

NUM, PROMPTS = 9, 3
CRYSTALS = [entry.crystal for entry in embedded()][: NUM * PROMPTS]
REQUEST = Request(
    model="abc",
    prompts=["a", "b", "c"],
    conditions=["{}"] * 3,
    grammar=None,
    guidance=None,
    methods=[],
    cache="float32",
    symprec=0.1,
    max_new_tokens=40,
    seed=3,
    num=NUM,
)


def attempts(num=NUM):
    """Of three prompts; every fourth failed."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(PROMPTS * num):
        crystal, ok = CRYSTALS[index % len(CRYSTALS)], index % 4 != 1
        log, tokens = float(-draw.integers(1, 40)), int(draw.integers(5, 30))
        cif = crystal.to_cif() if ok else None
        status, prompt = "ok" if ok else "truncated", "abc"[index // num]
        made.append(
            Attempt(index, index % num, 3, prompt, "{}", str(index), status, log, None, tokens, None, cif, None, None)
        )
    return made


def written(out, request, rows, stop=None):
    """What a ledger holds that was closed after `stop` rows, and opened again."""
    ledger = Ledger(out, request)
    for number, row in enumerate(rows):
        if number == stop:
            ledger = Ledger(out, request)
        ledger.append(row)
    ledger.finish()
    return ledger, pq.read_table(out).to_pylist()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["ok", "truncated"]), st.integers(-4, 0), st.integers(1, 4)), max_size=24),
    st.integers(1, 100),
)
def test_a_share_is_kept_exactly_and_of_the_likeliest(rows, percent):
    rows = [{"status": s, "log_probability": float(log), "tokens": n} for s, log, n in rows]
    for num in (1, 4, 24):
        gone = left_out(rows, num, percent / 100, "token")
        for first in range(0, len(rows), num):
            ok = [i for i in range(first, min(first + num, len(rows))) if rows[i]["status"] == "ok"]
            kept = [i for i in ok if i not in gone]
            assert len(kept) == math.ceil(Fraction(percent, 100) * len(ok))
            worth = {i: Fraction(int(rows[i]["log_probability"]), rows[i]["tokens"]) for i in ok}
            assert all((worth[i], -i) > (worth[j], -j) for i in kept for j in set(ok) - set(kept))
        assert all(rows[i]["status"] == "ok" for i in gone)


def test_by_what_log_p_is_divided():
    row = {"tokens": 7}
    assert [PER[by](row | {"cif": one.to_cif()}) for by in ("total", "token") for one in CRYSTALS[:1]] == [1, 7]
    assert [PER["atom"]({"cif": one.to_cif()}) for one in CRYSTALS] == [len(one) for one in CRYSTALS]
    for keep_by in PER:
        made = attempts()
        rows = [dataclasses.asdict(row) for row in made]
        gone = left_out(rows, NUM, 0.5, keep_by)
        sizes = {"total": [1] * len(rows), "token": [row["tokens"] for row in rows], "atom": list(map(len, CRYSTALS))}
        for first in range(0, len(rows), NUM):
            ok = [i for i in range(first, first + NUM) if rows[i]["status"] == "ok"]
            order = sorted((-rows[i]["log_probability"] / sizes[keep_by][i], i) for i in ok)
            assert gone & set(ok) == {i for _, i in order[math.ceil(len(ok) / 2) :]}


@pytest.mark.parametrize("name", ["s.parquet", "s.csv"])
def test_a_ledger_says_which_and_keeps_what_is_known_of_the_others(tmp_path, name):
    request = dataclasses.replace(REQUEST, keep=0.5, keep_by="token")
    _, rows = written(tmp_path / "plain.parquet", REQUEST, attempts())
    ledger, found = written(tmp_path / "whole.parquet", request, attempts())
    gone = left_out(rows, NUM, 0.5, "token")
    assert found == [row | ({"status": "left_out"} if i in gone else {}) for i, row in enumerate(rows)]
    assert ledger.counts["left_out"] == len(gone) and ledger.counts.total() == len(rows)
    assert finished(tmp_path / "whole.parquet", request) == ledger.counts
    assert json.loads((tmp_path / "whole.parquet.json").read_text())["counts"]["left_out"] == len(gone)
    for stop in (1, 13, 26):
        assert written(tmp_path / f"{stop}.parquet", request, attempts(), stop)[1] == found

    # Another share, and none, of the rows that are there; and more rows.
    out = tmp_path / name
    first = Ledger(out, request)
    for row in attempts():
        first.append(row)
    first.finish()
    for other in (
        dataclasses.replace(request, keep=0.2),
        dataclasses.replace(request, keep=0.2, keep_by="atom"),
        REQUEST,
        dataclasses.replace(request, num=NUM + 2),
    ):
        assert finished(out, other) is None
        again = Ledger(out, other)
        rows = attempts(other.num)
        missing = {index: rows[index] for index in again.missing}
        assert len(missing) == PROMPTS * (other.num - NUM)
        for row in missing.values():
            again.append(row)
        again.finish()
        rows = list(read_table(out))
        gone = {place for place, row in enumerate(rows) if row["status"] == "left_out"}
        drawn = list(map(restored, rows))
        assert gone == (set() if other.keep is None else left_out(drawn, other.num, other.keep, other.keep_by))
        assert again.counts["left_out"] == len(gone) and all(row["cif"] for row in rows if row["status"] == "left_out")
        assert drawn[0]["cif"] == attempts()[0].cif and drawn[0]["status"] == "ok"


def test_processes_that_share_a_run_leave_out_the_same(tmp_path):
    request = dataclasses.replace(REQUEST, keep=0.4, keep_by="total")
    _, expected = written(tmp_path / "one.parquet", request, attempts())
    for number in range(4):
        ledger = Ledger(tmp_path / "s.parquet", request, Part(number, 4))
        for index in ledger.missing:
            ledger.append(attempts()[index])
        ledger.finish()
    counts = join(tmp_path / "s.parquet", request)
    assert pq.read_table(tmp_path / "s.parquet").to_pylist() == expected
    assert counts == finished(tmp_path / "s.parquet", request) and counts["left_out"] > 0


def test_rates_say_of_what_they_are(tmp_path):
    request = dataclasses.replace(REQUEST, keep=0.5, keep_by="token")
    written(tmp_path / "s.parquet", request, attempts())
    found = jaxcrystal.evaluate(tmp_path / "s.parquet", tmp_path / "out")
    outcomes = found.metrics["counts"]["outcomes"]
    valid, kept = found.metrics["counts"]["valid"], outcomes["ok"]
    assert sum(outcomes.values()) == NUM * PROMPTS and outcomes["left_out"] > 5
    assert found.metrics["validity"]["both"] == valid / (NUM * PROMPTS)
    assert found.metrics["validity"]["both_of_kept"] == valid / kept
    assert found.metrics["confidence_95"]["validity.both_of_kept"] == list(wilson(valid, kept))
    assert "Valid, of kept" in found._repr_html_()
    written(tmp_path / "all.parquet", REQUEST, attempts())
    everything = jaxcrystal.evaluate(tmp_path / "all.parquet", tmp_path / "all").metrics
    assert not [name for name in everything["confidence_95"] if name.endswith("_of_kept")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "keep is 0.0; it is a share, above 0 and at most 1"),
        (["--keep", "1.5"], "keep is 1.5; it is a share"),
        (["--keep", "nan"], "keep is nan; it is a share"),
        (["--keep-by", "atom"], "keep_by says by what the likeliest are found: say which share"),
        (["--keep", "0.5", "--num-valid", "1"], "leave num_valid and resample out"),
    ],
)
def test_what_is_no_share(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--model", "mini", "--num", "4", "--out", "s.parquet", *words]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.glob("s*"))
    with pytest.raises(UserError, match="keep_by is 'beauty'; it is total, token, atom"):
        check(0.5, "beauty")


@pytest.mark.slow
def test_a_file_and_a_living_sampler_keep_the_same(tmp_path):
    model = model_of("p1", "compact", tmp_path / "model")
    options = {"conditions": [{"elements": ["Na", "Cl"]}, {"elements": ["Mg", "O"]}], "num_atoms": (2, 4), "seed": 1}
    sample(model, 6, tmp_path / "few.parquet", slots=3, keep=0.5, **options)
    sample(model, 6, tmp_path / "many.parquet", slots=12, keep=0.5, keep_by=KEEP_BY, **options)
    few, many = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("few", "many"))
    assert list(few["status"]) == list(many["status"]) and (few["status"] == "left_out").sum() >= 4
    with jaxcrystal.load(model, slots=3) as sampler:
        assert list(sampler.sample(6, keep=0.5, **options).to_pandas()["status"]) == list(few["status"])
