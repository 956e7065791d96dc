"""How probable a model finds crystals: against brute force and what the sampler records; kept, shown, or refused."""

import json
from collections import Counter
from functools import cache
from xml.etree import ElementTree

import jax
import numpy as np
import pandas as pd
import pytest
import yaml
from pymatgen.core import Lattice, Structure
from random_models import model_of
from symmetric_crystals import random_symmetric

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.config import Augment, Recipe, TextFormat, to_dict
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.errors import UserError
from jaxcrystal.interface.scored import quantiles
from jaxcrystal.sampling.answers import Answers
from jaxcrystal.scoring.descriptions import Ways
from jaxcrystal.scoring.likelihood import Likelihood, Text
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.prompts import generation_prompt


def rock_salt(one: str, other: str, edge: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), [one, other], [[0, 0, 0], [0.5, 0.5, 0.5]])


SALT = Structure(Lattice.from_parameters(4.02, 4.02, 4.02, 60, 60, 60), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
MANY = {f"{edge:g}": rock_salt("Na", "Cl", edge) for edge in (5.0, 5.25, 5.5, 5.75, 6.0)}
#: Body-centred: of one description alone.
SODIUM = Structure(Lattice.cubic(4.2), ["Na", "Na"], [[0, 0, 0], [0.5, 0.5, 0.5]])
TWICE = Structure(Lattice.cubic(4.0), ["Na", "Na"], [[0, 0, 0], [0, 0, 0]])
BARE = Structure(Lattice.cubic(30.0), ["Na"] * 30, np.random.default_rng(0).random((30, 3)))


def recipe(model, **augment) -> None:
    (model / "recipe.yaml").write_text(yaml.safe_dump(to_dict(Recipe(augment=Augment(**augment)))))


@pytest.fixture(scope="module")
def by_symmetry(tmp_path_factory):
    """Trained, it says, on all descriptions, of salts."""
    model = model_of("symmetry", "compact-symmetry", tmp_path_factory.mktemp("symmetry"))
    recipe(model, translate=False, descriptions=True)
    (model / "formulas.txt").write_text("ClNa\nBrNa\nMgO\nLiO2Ti\n")
    return model


@pytest.fixture(scope="module")
def symmetry(by_symmetry):
    with jaxcrystal.load(by_symmetry) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def p1(tmp_path_factory):
    with jaxcrystal.load(model_of("p1", "compact", tmp_path_factory.mktemp("p1"))) as sampler:
        yield sampler


@cache
def _logs(sampler):
    """Of a row of 256 tokens, all at once, from all of its logits."""
    module, at = sampler.model.module, np.arange(256)[None]
    return jax.jit(lambda variables, row: jax.nn.log_softmax(module.apply(variables, row, at)[0])[0])


def by_force(sampler, text: str, conditions=None) -> float:
    """log p of a text and its end by itself."""
    prompt = sampler._encoded(generation_prompt(sampler.form, conditions or {}))
    tokens = [*sampler._encoded(generation_prompt(sampler.form, conditions or {}) + text), sampler.tokenizer.eos_id]
    logs = np.asarray(_logs(sampler)(sampler.model.variables, np.array([tokens + [0] * (256 - len(tokens))])))
    return float(sum(logs[at - 1, tokens[at]] for at in range(len(prompt), len(tokens))))


def test_by_symmetry_it_is_the_probability_of_all_descriptions(symmetry):
    """Σ p over every distinct text, each by itself: within 1e-4 nats."""
    crystals = {str(number): random_symmetric(number, 0).to_crystal() for number in (2, 47)}
    crystals["sodium"] = jaxcrystal.read(SODIUM).crystals[0]
    found = symmetry.score(crystals).table
    for row, crystal in zip(found.itertuples(), crystals.values(), strict=True):
        descriptions = symmetrize(crystal).descriptions
        texts = set(symmetry.form.described(crystal))
        logs = np.array([by_force(symmetry, text) for text in texts])
        assert row.texts == len(texts) <= len(descriptions)
        assert row.log_probability == pytest.approx(np.log(np.exp(logs - logs.max()).sum()) + logs.max(), abs=1e-4)
        assert row.mean_log_probability == pytest.approx(logs.mean(), abs=1e-4)
        assert np.isnan(row.log_probability_low) and np.isnan(row.log_probability_high)
    assert found["texts"].max() > 2 and found["texts"].min() == 1
    own = symmetry.score(crystals, draws=0).table
    assert (own["texts"] == 1).all()
    for value, crystal in zip(own["log_probability"], crystals.values(), strict=True):
        assert value == pytest.approx(by_force(symmetry, symmetry.form.write(crystal)), abs=1e-4)


def test_in_p1_it_is_the_mean_probability_of_what_is_drawn(p1):
    """log of the mean of p over the texts of the same draws, each by itself; the mean of log p beside it."""
    found = p1.score({"a": SALT}, draws=6, seed=2).table.iloc[0]
    (crystal,) = jaxcrystal.read(SALT).crystals
    logs = np.array([by_force(p1, text) for text in Ways(p1.form, ("translations",), False, 6, 2).texts(crystal)])
    assert found["texts"] == 6
    assert found["log_probability"] == pytest.approx(np.log(np.exp(logs - logs.max()).mean()) + logs.max(), abs=1e-4)
    assert found["mean_log_probability"] == pytest.approx(logs.mean(), abs=1e-4)
    assert logs.min() < found["log_probability_low"] < found["log_probability"] < found["log_probability_high"]
    assert found["log_probability_per_token"] == found["log_probability"] / found["tokens"]
    assert found["log_probability_per_atom"] == found["log_probability"] / 2
    assert p1.score({"a": SALT}, draws=6, seed=3).table["log_probability"][0] != found["log_probability"]


def test_it_is_what_the_sampler_records_of_the_same_text(p1):
    """Of P1 texts, which a crystal's own text repeats: within 1e-4 nats a token."""
    with jaxcrystal.load(p1.name, temperature=1.0, top_p=1.0, max_new_tokens=160) as sampler:
        attempts = sampler.sample(6, seed=1, num_atoms=2)
        found = sampler.score(attempts, draws=0).table
    assert attempts.counts == {"ok": 6} and found["tokens"].tolist() == [row.tokens for row in attempts]
    recorded = np.array([row.log_probability for row in attempts])
    assert np.abs((found["log_probability"] - recorded) / found["tokens"]).max() < 1e-4 < recorded.std()
    assert found["id"].tolist() == attempts.ids


def test_so_it_is_of_texts_by_symmetry(symmetry):
    """Texts that are drawn are seldom canonical: each is read as it is, behind its prompt; within 1e-4 nats a token."""
    attempts = symmetry.sample(3, seed=1, num_atoms=(1, 4))
    assert attempts.counts == {"ok": 3}
    begun, end = [symmetry._encoded(row.prompt + row.text) for row in attempts], symmetry.tokenizer.eos_id
    texts = [Text([*tokens, end], row.tokens) for tokens, row in zip(begun, attempts, strict=True)]
    reader = Likelihood(symmetry.model, symmetry.mesh, 1)
    for row, (_, found) in zip(attempts, reader.read((None, [text]) for text in texts), strict=True):
        assert found[0] == pytest.approx(row.log_probability, abs=1e-4 * row.tokens)


def test_a_prompt_may_state_conditions(p1):
    (crystal,) = jaxcrystal.read(SALT).crystals
    found = p1.score(SALT, draws=0, conditions={"band_gap": 5.0, "formula": "ClNa"}).table["log_probability"][0]
    wanted = by_force(p1, p1.form.write(crystal), {"band_gap": 5.0, "pretty_formula": "NaCl"})
    assert found == pytest.approx(wanted, abs=1e-4) != p1.score(SALT, draws=0).table["log_probability"][0]


def test_neither_settings_nor_batches_nor_processes_change_it(symmetry, by_symmetry):
    expected = symmetry.score(MANY).table
    with jaxcrystal.load(by_symmetry, temperature=0.1, slots=1, tensor=1) as cold:
        for options in ({"at_once": 1}, {"workers": 1}):
            pd.testing.assert_frame_equal(cold.score(MANY, **options).table, expected, atol=1e-4)


def test_every_row_has_an_outcome(symmetry, p1):
    """What cannot be read, written or held by the context, or has an element that training never had."""
    rows = {"none": None, "salt": SALT, "twice": TWICE, "strange": rock_salt("U", "S", 5.5), "also": SALT}
    table = symmetry.score(rows).table.set_index("id")
    assert table["outcome"].to_dict() == {
        "none": "missing", "salt": "ok", "twice": "unwritten", "strange": "unseen_element", "also": "ok",
    }  # fmt: skip
    assert table["reason"]["twice"] == "Na has no space group at any tolerance: its atoms lie on each other"
    assert table["reason"]["strange"] == "no training crystal has S, U" and table["log_probability"]["strange"] < 0
    assert table["rank"].tolist() == [pd.NA, 1, pd.NA, pd.NA, 2] and table["row"].tolist() == list(range(5))
    assert table["known_formula"].fillna(False).tolist() == [False, True, False, False, True]
    assert table["log_probability"]["salt"] == table["log_probability"]["also"]
    found = p1.score({"bare": BARE, "salt": SALT}, draws=1)
    assert found.counts == {"too_long": 1, "ok": 1} and found.table["known_formula"].isna().all()
    assert "behind a prompt of" in found.table["reason"][0] and found.table["reason"][0].endswith("context holds 256")
    assert np.isnan(found.table["log_probability"][0])


def test_crystals_lie_beside_others(symmetry):
    others = [rock_salt("Na", "Br", 5 + 0.01 * i) for i in range(12)]
    found = symmetry.score({**MANY, "strange": rock_salt("U", "S", 5.5)}, beside=others)
    theirs = -symmetry.score(others).table["log_probability_per_token"]
    table = found.table
    assert found.beside.tolist() == sorted(theirs) and np.isnan(table["quantile"][5])
    for row in table[:5].itertuples():
        assert row.quantile == pytest.approx((theirs < -row.log_probability_per_token).mean(), abs=1e-12)
        assert row.flag == {0.0: "remembered", 1.0: "unlike"}.get(row.quantile, "")
    assert found.table["flag"].isin(["remembered", "unlike"]).any() and table["flag"][5] == ""
    told = f"beside 12 others {(table['flag'] == 'remembered').sum()} remembered"
    assert told in str(found) and "beside" not in str(symmetry.score(MANY))
    with pytest.raises(UserError, match=r"none of its 1 rows is ok"):
        symmetry.score(SALT, beside=[TWICE])


def test_what_is_new_is_not_remembered(p1):
    """Where it is not known what training had, nothing is."""
    found = p1.score({"salt": SALT}, draws=0, beside=list(MANY.values())).table
    assert found["quantile"][0] == 0 and found["flag"][0] == ""


def test_quantiles():
    assert quantiles(np.array([0, 1, 2, 2.5, 9]), np.array([1.0, 2.0, 2.0, 3.0])).tolist() == [0, 0.125, 0.5, 0.75, 1]


class Toy:
    """A model that gives every text a perplexity by what stands at one place in it."""

    def __init__(self, monkeypatch, line: int, word: int, perplexities: dict[str, float]) -> None:
        def read(reader, groups):
            for item, texts in groups:
                own = [reader.model.tokenizer.decode(text.tokens[-text.answer : -1]) for text in texts]
                here = [perplexities[text.split("\n")[line].split()[word]] for text in own]
                yield item, -np.array([text.answer for text in texts]) * np.log(here)

        monkeypatch.setattr(Likelihood, "read", read)


def test_ipt_of_a_toy_is_known(p1, monkeypatch):
    """Perplexity 1 + 3d by the first decimal d of the first coordinate: mean over the digits drawn, less the least."""
    places = {f"0.{digit}{rest}": 1.0 + 3 * digit for digit in range(10) for rest in range(10)}
    Toy(monkeypatch, 3, 0, places)
    (crystal,) = jaxcrystal.read(SALT).crystals
    texts = Ways(p1.form, ("translations",), False, 50, 0).texts(crystal)
    digits = np.array([int(text.split("\n")[3][2]) for text in texts])
    found = p1.ipt({"a": SALT}, draws=50)
    assert found.table["ipt"][0] == pytest.approx(3 * (digits.mean() - digits.min()), abs=1e-5)
    assert found.table["perplexity"][0] == pytest.approx(1 + 3 * digits.mean(), abs=1e-5)
    assert abs(found.mean - 3 * 4.5) < 5  # of ten digits alike, and 50 of them


def test_ipt_over_orders_of_a_toy_is_known(p1, monkeypatch):
    """Perplexity 2 if Na comes first and 5 if Cl does: 3 x the share of Cl."""
    Toy(monkeypatch, 2, 0, {"Na": 2.0, "Cl": 5.0})
    (crystal,) = jaxcrystal.read(SALT).crystals
    first = Counter(text.split("\n")[2] for text in Ways(p1.form, ("orders",), False, 20, 0).texts(crystal))
    found = p1.ipt({"a": SALT}, over="orders")
    assert 0 < first["Cl"] < 20 and found.mean == pytest.approx(3 * first["Cl"] / 20, abs=1e-5)
    assert p1.ipt({"a": SALT}, over="translations").mean == pytest.approx(0, abs=1e-5)


def test_ipt_of_descriptions_of_a_toy_is_known(symmetry, monkeypatch):
    """Perplexity by the letter of the first orbit, over all descriptions: without draws, exactly."""
    crystal = random_symmetric(47, 0).to_crystal()
    letters = [text.split("\n")[2].split()[1] for text in symmetry.form.described(crystal)]
    assert len(set(letters)) > 1
    values = {letter: 2.0 + i for i, letter in enumerate(sorted(set(letters)))}
    Toy(monkeypatch, 2, 1, values)
    found = symmetry.ipt({"a": crystal, "sodium": SODIUM})
    wanted = np.array([values[letter] for letter in letters])
    assert found.table["ipt"][0] == pytest.approx(wanted.mean() - wanted.min(), abs=1e-5)
    assert found.table["texts"].tolist() == [len(letters), 1] and "1 have one text alone, and so 0" in str(found)


@pytest.mark.parametrize("over", ["translations", "orders", "cells"])
def test_a_model_to_which_all_tokens_are_alike_has_an_ipt_of_0(over, tmp_path):
    """A real one: each token has one of the vocabulary's probability, and all texts of a crystal as many tokens."""
    with jaxcrystal.load(model_of("p1", "compact", tmp_path / "model")) as sampler:
        scale = sampler.model.params["norm"]["scale"]
        sampler.model.params["norm"]["scale"] = scale * 0
        found = sampler.ipt({"a": SALT, "none": None}, over=over, draws=5)
    assert found.table["perplexity"][0] == pytest.approx(sampler.model.config.vocab_size, rel=1e-5)
    assert found.mean == pytest.approx(0, abs=1e-3) and found.counts == {"ok": 1, "missing": 1}


def test_ipt_is_of_the_texts_themselves(p1):
    """Against perplexities one by one: 1e-4 of each."""
    (crystal,) = jaxcrystal.read(SALT).crystals
    for over in ("translations", "cells"):
        found = p1.ipt({"a": SALT}, over=over, draws=4, seed=1).table.iloc[0]
        texts = Ways(p1.form, (over,), False, 4, 1).texts(crystal)
        tokens = [len(p1.tokenizer.encode("\n" + text)) - len(p1.tokenizer.encode("\n")) + 1 for text in texts]
        each = np.exp([-by_force(p1, text) / count for text, count in zip(texts, tokens, strict=True)])
        assert found["perplexity"] == pytest.approx(each.mean(), rel=1e-4)
        assert found["least_perplexity"] == pytest.approx(each.min(), rel=1e-4)
        assert found["ipt"] == pytest.approx(each.mean() - each.min(), abs=2e-4 * each.mean())


REFUSALS = [
    ("score", {"draws": -1}, "draws is -1; it must be at least 0"),
    ("score", {"seed": -1}, "seed is -1; it must be at least 0"),
    ("score", {"at_once": 0}, "at_once is 0; it must be at least 1"),
    ("score", {"crystals": "nowhere.csv"}, "nowhere.csv does not exist"),
    ("score", {"beside": "nowhere.csv"}, "nowhere.csv does not exist"),
    ("score", {"crystals": [None, None]}, r"holds no crystal; its first row \(0\) is missing"),
    ("score", {"conditions": {"band_gap": (1, 2)}}, "a prompt states one value of band_gap, not a range"),
    ("score", {"conditions": {"colour": 1}}, "unknown condition 'colour'"),
    ("ipt", {"draws": 1}, "draws is 1; IPT compares at least 2 texts"),
    ("ipt", {"over": "descriptions"}, "texts of the p1 form have no descriptions"),
    ("ipt", {"crystals": "nowhere.csv"}, "nowhere.csv does not exist"),
]


@pytest.mark.parametrize(("verb", "wish", "message"), REFUSALS)
def test_what_cannot_be_asked_is_refused_in_one_line(p1, verb, wish, message):
    with pytest.raises(UserError, match=message) as error:
        getattr(p1, verb)(**{"crystals": SALT} | wish)
    assert "\n" not in str(error.value)


def test_a_closed_sampler_says_no_more(tmp_path):
    sampler = jaxcrystal.load(model_of("p1", "compact", tmp_path / "model"))
    sampler.close()
    for verb in (sampler.score, sampler.ipt):
        with pytest.raises(UserError, match="is closed; load the model again"):
            verb(SALT)


def texts_read(monkeypatch) -> list[int]:
    """How many crystals the model reads, call by call."""
    counts, plain = [], Likelihood.read

    def counted(self, groups):
        groups = list(groups)
        counts.append(len(groups))
        return plain(self, groups)

    monkeypatch.setattr(Likelihood, "read", counted)
    return counts


def test_a_stopped_run_goes_on_after_what_is_there(p1, tmp_path, monkeypatch):
    store, counts = tmp_path / "x" / "kept.jsonl", texts_read(monkeypatch)
    expected = p1.score(MANY, draws=3).table
    append = Answers.append

    def interrupted(self, key, answer):
        append(self, key, answer)
        if len(store.read_text().splitlines()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answers, "append", interrupted)
        p1.score(MANY, draws=3, store=store)
    store.write_bytes(store.read_bytes() + b'{"key": "\xff"}\n{"key": "half a li')
    pd.testing.assert_frame_equal(p1.score(MANY, draws=3, store=store).table, expected, atol=1e-4)
    assert counts == [5, 5, 2]
    lines = [line for line in store.read_bytes().splitlines() if b"half" not in line and b"\xff" not in line]
    assert [len(json.loads(line)) for line in lines] == [5] * 5
    p1.score([*MANY.values(), None], draws=3, store=store)  # as another source
    p1.score(MANY, draws=4, store=store)
    p1.score(MANY, draws=3, seed=1, store=store)
    p1.score(MANY, draws=3, conditions={"band_gap": 1}, store=store)
    p1.ipt(MANY, draws=3, over="cells", store=store)
    p1.ipt(MANY, draws=3, store=store)  # of the same texts
    assert counts[3:] == [0, 5, 5, 5, 5, 0]


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_the_commands_write_tables(name, by_symmetry, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxcrystal.read({**MANY, "none": None}).to_pandas().to_csv("c.csv", index=False)
    typed = ["c.csv", "--model", str(by_symmetry), "--out", name, "--workers", "0"]
    assert main(["score", *typed, "--beside", "c.csv"]) == 0
    told = capsys.readouterr().out
    read = pd.read_csv if name == "x.csv" else pd.read_parquet
    table = read(name)
    assert told.startswith("6 rows: 5 ok, 1 missing; ") and f"{-table['log_probability'].mean():.4g} (" in told
    best = table.sort_values("rank").iloc[0]
    assert told.splitlines()[1].split()[:3] == ["1", best["id"], "NaCl"]
    assert table["outcome"].tolist() == ["ok"] * 5 + ["missing"] and table["rank"].tolist()[:5] != [1, 2, 3, 4, 5]
    assert table["quantile"][:5].tolist() == ((table["rank"][:5] - 0.5) / 5).tolist()
    assert main(["ipt", *typed, "--draws", "4"]) == 0
    told = capsys.readouterr().out
    table = read(name)
    assert table["texts"].tolist() == [2] * 5 + [0] and f"IPT {table['ipt'].mean():.4g} (" in told
    assert "over descriptions; " in told and told.endswith(f"written to .: {name}, x.svg\n")
    assert ElementTree.parse("x.svg").getroot().tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"c.csv", name, "x.jsonl", "x.svg"}


@pytest.mark.parametrize("verb", ["score", "ipt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "nowhere is not a model directory"),
        ({"--out": "x.txt"}, "cannot write x.txt: give a name that ends in .parquet or .csv"),
        ({"CRYSTALS": "nowhere.csv"}, "nowhere.csv does not exist"),
    ],
)
def test_bad_input_is_one_line(verb, change, message, by_symmetry, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxcrystal.read(SALT).to_pandas().to_csv("c.csv", index=False)
    words = {"CRYSTALS": "c.csv", "--model": str(by_symmetry), "--out": "x.csv", "--workers": "0"} | change
    typed = [verb, words.pop("CRYSTALS"), *(word for pair in words.items() for word in pair)]
    assert main(typed) == 1
    told = capsys.readouterr().err
    assert message in told and told.count(f"jaxcrystal {verb}: ") == 1 and not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("verb", ["score", "ipt", "infill"])
@pytest.mark.parametrize(("crystals", "out"), [("c.csv", "c.csv"), ("c.jsonl", "c.csv"), ("c.parquet", "./c.parquet")])
def test_what_is_read_is_not_written_over(verb, crystals, out, by_symmetry, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / crystals).write_bytes(b"crystals")
    assert main([verb, crystals, "--model", str(by_symmetry), "--out", out]) == 1
    assert f"{crystals} is read, and" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"crystals"]


def test_it_shows_itself(symmetry):
    found = symmetry.score({"<a>": SALT, **{str(i): rock_salt("Na", "Cl", 5 + 0.1 * i) for i in range(12)}, "n": None})
    lines = str(found).splitlines()
    assert len(lines) == 12 and lines[6] == "  …" and lines[-1].split()[0] == "13"
    shown = found._repr_html_()
    assert "&lt;a&gt;" in shown and "<a>" not in shown.replace("&lt;a&gt;", "") and "… and 4 more" in shown
    assert repr(found) == f"<Scored: {lines[0]}>" and lines[0].startswith("14 rows: 13 ok, 1 missing; ")
    best = found.best(3)
    assert best["rank"].tolist() == [1, 2, 3] and len(found.best(99)) == 13 == len(found) - 1
    assert (np.diff(found.best(99)["log_probability_per_token"]) <= 0).all()
    copy = found.to_pandas()
    copy.loc[0, "id"] = "changed"
    assert found.table["id"][0] == "<a>"


def test_ipt_shows_itself(p1):
    found = p1.ipt({"a": SALT, **MANY}, draws=3)
    low, high = found.interval
    assert low <= found.mean <= high and found.mean == found.table["ipt"].mean() > 0
    assert f"IPT {found.mean:.4g} ({low:.4g} to {high:.4g}) over translations" in str(found)
    texts = list(ElementTree.fromstring(found.picture().svg).itertext())
    assert f"mean {found.mean:.3g}" in texts and "increase in perplexity over translations" in texts
    assert found.picture().svg in found._repr_html_() and repr(found) == f"<Transformed: {found}>"
    nothing = p1.ipt({"bare": BARE}, draws=2)
    assert np.isnan(nothing.mean) and nothing.counts == {"too_long": 1} and "svg" in nothing.picture().svg


def test_forms_have_what_they_are_read_over():
    assert form_of(TextFormat()).transformations == ("translations", "orders", "cells")
    assert form_of(TextFormat(form="symmetry")).transformations == ("descriptions",)
