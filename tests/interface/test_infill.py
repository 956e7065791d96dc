"""What could stand in the place of an element: asked of crystals from wherever they are, kept, shown, or refused."""

import importlib.util
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from pymatgen.core import Lattice, Structure
from random_models import model_of, without_infilling

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.config import Augment, Recipe, to_dict
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.interface.infilled import Infilled
from jaxcrystal.interface.infilling import infill
from jaxcrystal.sampling.answers import Answers
from jaxcrystal.sampling.infilling import Infiller

SVG = "{http://www.w3.org/2000/svg}"
SYMBOLS = list(ELEMENTS[1:])


def rock_salt(one: str, other: str, edge: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(edge), [one, other], [[0, 0, 0], [0.5, 0.5, 0.5]])


SALT = Structure(Lattice.from_parameters(4.02, 4.02, 4.02, 60, 60, 60), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
MAGNESIA = rock_salt("Mg", "O", 4.24)
#: O stands on two orbits, of one atom and of three.
OXIDE = Structure(
    Lattice.cubic(4.0), ["O", "Ti", "O", "O", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of("symmetry", "compact-symmetry", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampler(model):
    with jaxcrystal.load(model) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def p1(tmp_path_factory):
    with jaxcrystal.load(model_of("p1", "compact", tmp_path_factory.mktemp("model"))) as sampler:
        yield sampler


def test_each_crystal_has_a_row_for_each_element(sampler):
    found = sampler.infill({"a": SALT, "b": rock_salt("Na", "Br", 5.97)}, mask="Na")
    table = found.table
    assert len(found) == 2 and len(table) == 2 * 118 and set(table["element"][:118]) == set(SYMBOLS)
    assert (table["id"].tolist()[::118], table["row"].tolist()[::118]) == (["a", "b"], [0, 1])
    assert (table["formula"].tolist()[::118], table["atoms"].tolist()[::118]) == (["NaCl", "NaBr"], [1, 4])
    assert (table["masked"] == "Na").all() and table["rank"].tolist() == [*range(1, 119)] * 2
    for (_, rows), answer in zip(table.groupby("id"), found.answers, strict=True):
        log_probability = rows["log_probability"].to_numpy()
        assert (np.diff(log_probability) <= 0).all()
        own = answer.log_probabilities[[SYMBOLS.index(symbol) for symbol in rows["element"]]]
        np.testing.assert_array_equal(log_probability, own)
        np.testing.assert_allclose(rows["probability"], np.exp(own) / np.exp(own).sum(), rtol=1e-9)
        assert np.exp(log_probability).sum() + rows["outside"].iloc[0] == pytest.approx(1, abs=1e-5)
    assert found.outside.to_dict() == {"a": found.answers[0].outside, "b": found.answers[1].outside}
    assert found.best(3)["rank"].tolist() == [1, 2, 3] * 2 and found.best(118).equals(table)
    assert found.own["rank"].tolist() == table["rank"][table["element"] == "Na"].tolist()
    assert found["b"].table.equals(found[1].table) and found[-1].table.equals(found[1:].table)
    with pytest.raises(KeyError, match="nobody"):
        found["nobody"]
    with pytest.raises(IndexError):
        found[2]


def test_the_settings_of_a_sampler_are_not_those_of_its_answers(sampler, model):
    with jaxcrystal.load(model, temperature=0.1, top_p=0.1, slots=1) as cold:
        expected = sampler.infill(SALT, mask="Cl").table
        pd.testing.assert_frame_equal(cold.infill(SALT, mask="Cl").table, expected)


@pytest.mark.parametrize("which", ["sampler", "p1"])
def test_a_site_is_an_element_where_it_stands_nowhere_else(which, request, capsys):
    asked = request.getfixturevalue(which)
    for site, element in enumerate(["Na", "Cl"]):
        one, other = asked.infill(SALT, site=site), asked.infill(SALT, mask=element)
        pd.testing.assert_frame_equal(one.table, other.table)
    assert "note" not in capsys.readouterr().err
    for site, atoms in ((0, 1), (2, {"sampler": 3, "p1": 1}[which]), (1, 1)):
        found = asked.infill({"x": OXIDE}, site=site)
        assert set(found.table["atoms"]) == {atoms} and set(found.table["masked"]) == {OXIDE[site].specie.symbol}
        said = capsys.readouterr().err
        assert ("note: x (TiO4): O stands at other sites too" in said) == (site != 1)
    assert str(asked.infill({"x": OXIDE}, site=0)).splitlines()[1].startswith("x (TiO4), O masked at 1 of its sites: ")


def test_answers_are_sought_among_those_allowed(sampler):
    every = sampler.infill(SALT, mask="Na").table.set_index("element")
    some = sampler.infill(SALT, mask="Na", allow=["Rb", "K", "Cs"])
    table = some.table.set_index("element")
    assert set(table.index) == {"K", "Rb", "Cs"} and table["probability"].sum() == pytest.approx(1)
    shares = every.loc[table.index, "probability"]
    np.testing.assert_allclose(table["probability"], shares / shares.sum())
    pd.testing.assert_series_equal(table["log_probability"], every.loc[table.index, "log_probability"])
    assert some.own.empty and "that was there" not in str(some)  # Na is not allowed


@pytest.mark.skipif(importlib.util.find_spec("jaxcrystal.crystals.radii") is None, reason="there are no radii yet")
def test_answers_are_sought_among_ions_of_like_radius(sampler):
    from jaxcrystal.crystals.radii import similar

    near = set(similar("Na", 0.1))
    found = sampler.infill(SALT, mask="Na", similar=0.1)
    assert set(found.table["element"]) == near and 1 < len(near) < 60
    both = sampler.infill(SALT, mask="Na", similar=0.1, allow=[*sorted(near)[:2], *sorted(set(SYMBOLS) - near)])
    assert set(both.table["element"]) == set(sorted(near)[:2])
    with pytest.raises(UserError, match=r"no element that is allowed has an ionic radius within 0\.0 Å of Na's"):
        sampler.infill(SALT, mask="Na", similar=0.0, allow=["F"])


def test_what_is_no_crystal_or_has_not_the_element_is_left_out_and_said(sampler, capsys):
    found = sampler.infill({"a": None, "b": SALT, "c": MAGNESIA, "d": None}, mask="O")
    assert found.table["id"].unique().tolist() == ["c"] and found.table["row"].unique().tolist() == [2]
    said = capsys.readouterr().err
    assert "note: 3 of 4 rows are left out: 2 missing, 1 without O\n" in said


def refusals():
    bare = Structure(Lattice.cubic(30.0), ["Na"] * 30, np.random.default_rng(0).random((30, 3)))
    return [
        (SALT, {}, "an element \\(mask\\) or the number of an atom \\(site\\), one of the two"),
        (SALT, {"mask": "Na", "site": 1}, "one of the two"),
        (SALT, {"mask": "Fe"}, r"0 \(NaCl\) has no Fe; its elements are Cl, Na"),
        ([SALT, MAGNESIA, SALT], {"mask": "Fe"}, r"0 \(NaCl\) has no Fe, nor has any of the 2 others; "),
        (SALT, {"mask": "D"}, "'D' is no chemical element; the isotopes of hydrogen are H"),
        (SALT, {"mask": "T"}, "'T' is no chemical element; the isotopes of hydrogen are H"),
        (SALT, {"mask": "na"}, "'na' is no chemical element$"),
        (SALT, {"mask": "Na", "allow": ["K", "Xx"]}, "'Xx' is no chemical element$"),
        (SALT, {"mask": "Na", "allow": []}, "allow names no element"),
        (SALT, {"mask": "Na", "similar": -0.1}, "similar is -0.1; it must be a difference of radii in Å"),
        (SALT, {"mask": "Na", "similar": float("nan")}, "similar is nan; it must be"),
        (SALT, {"site": 2}, r"0 \(NaCl\) has 2 atoms, numbered from 0 to 1: there is no site 2"),
        (SALT, {"site": -1}, "there is no site -1"),
        (
            [None, None],
            {"mask": "Na"},
            r"holds no crystal; its first row \(0\) is missing: there is no structure",
        ),
        ("nowhere.csv", {"mask": "Na"}, r"nowhere\.csv"),
        ({"x": bare}, {"mask": "Na"}, r"x \(Na\) has a prompt of \d+ tokens and .* context holds 256: leave it out"),
    ]


@pytest.mark.parametrize(("crystals", "wish", "message"), refusals())
def test_what_cannot_be_asked_is_refused_in_one_line(p1, crystals, wish, message):
    with pytest.raises(UserError, match=message) as error:
        p1.infill(crystals, **wish)
    assert "\n" not in str(error.value)


def test_a_crystal_without_a_space_group_is_refused(sampler):
    twice = Structure(Lattice.cubic(4.0), ["Na", "Na"], [[0, 0, 0], [0, 0, 0]])
    for wish in ({"mask": "Na"}, {"site": 0}):
        with pytest.raises(UserError, match="has no space group at any tolerance"):
            sampler.infill(twice, **wish)


def test_a_model_that_was_not_trained_to_infill_says_so(sampler, model, tmp_path):
    sampler.infill(SALT, mask="Na")  # of its training nothing is known
    for share in (0.0, 0.5):
        recipe = Recipe(augment=replace(Augment(translate=False), infill=share))
        (model / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
        try:
            with jaxcrystal.load(model) as trained:
                if share:
                    trained.infill(SALT, mask="Na")
                    continue
                with pytest.raises(
                    UserError, match=r"was not trained to infill \(augment\.infill is 0 in its recipe\)"
                ):
                    trained.infill(SALT, mask="Na")
        finally:
            (model / "recipe.yaml").unlink()


def test_a_closed_sampler_answers_no_more(model):
    sampler = jaxcrystal.load(model)
    sampler.close()
    with pytest.raises(UserError, match="is closed; load the model again"):
        sampler.infill(SALT, mask="Na")


def asked_for(monkeypatch) -> list[int]:
    """How many prompts the model is asked, call by call."""
    counts = []
    plain = Infiller.answers

    def counted(self, prompts):
        prompts = list(prompts)
        counts.append(len(prompts))
        return plain(self, prompts)

    monkeypatch.setattr(Infiller, "answers", counted)
    return counts


def test_a_stopped_run_goes_on_after_the_answers_that_are_there(sampler, p1, tmp_path, monkeypatch):
    crystals = [rock_salt("Na", "Cl", 5.0 + 0.25 * i) for i in range(5)]
    store, counts = tmp_path / "x" / "kept.jsonl", asked_for(monkeypatch)
    expected = sampler.infill(crystals, mask="Na").table
    append = Answers.append

    def interrupted(self, key, answer):
        append(self, key, answer)
        if len(store.read_text().splitlines()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answers, "append", interrupted)
        sampler.infill(crystals, mask="Na", store=store)
    store.write_text(store.read_text() + '{"key": "half a li')
    pd.testing.assert_frame_equal(sampler.infill(crystals, mask="Na", store=store).table, expected)
    assert counts == [5, 5, 2]
    assert [len(json.loads(line)) for line in store.read_text().splitlines() if "half" not in line] == [3] * 5
    sampler.infill(crystals, mask="Na", allow=["K"], store=store)  # the same answers, among others
    sampler.infill(crystals, mask="Cl", store=store)
    p1.infill(crystals, mask="Na", store=store)
    assert counts[3:] == [0, 5, 5]


def test_another_dtype_answers_anew_and_is_the_same_model(sampler, model, tmp_path, monkeypatch):
    store, counts = tmp_path / "kept.jsonl", asked_for(monkeypatch)
    own = sampler.infill([SALT], mask="Na", store=store).answers[0].log_probabilities
    for dtype, asked in (("bfloat16", 1), ("bfloat16", 0), ("float32", 0)):
        with jaxcrystal.load(model, dtype=dtype) as other:
            assert other.fingerprint == sampler.fingerprint
            found = other.infill([SALT], mask="Na", store=store).answers[0].log_probabilities
        assert counts[-1] == asked and (found == own).all() == (dtype == "float32")


def test_equal_prompts_are_asked_once(sampler, monkeypatch):
    counts = asked_for(monkeypatch)
    found = sampler.infill([SALT, MAGNESIA, SALT * (1, 1, 2), SALT], site=0)
    assert counts == [2] and found.table["row"].unique().tolist() == [0, 1, 2, 3]
    assert found[0].table["log_probability"].equals(found[3].table["log_probability"])


def test_where_answers_cannot_be_kept_is_said(sampler, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*kept\.jsonl: .*; choose another output"):
        sampler.infill(SALT, mask="Na", store=tmp_path / "file" / "kept.jsonl")
    found = sampler.infill(SALT, mask="Na")
    with pytest.raises(UserError, match=r"cannot write .*file/below: .*; choose another output"):
        found.write(tmp_path / "file" / "below")


def test_the_periodic_table_is_drawn(sampler, tmp_path):
    found = sampler.infill({"<a>": SALT, "b": MAGNESIA}, site=0, allow=["K", "Rb", "Cl"])
    drawn = ElementTree.parse(found.picture("<a>").write(tmp_path / "a.svg")).getroot()
    texts = list(drawn.itertext())
    assert "<a> (NaCl), Na masked" in texts and set(SYMBOLS) <= set(texts)
    shown = {group.get("data-element") for group in drawn.iter(f"{SVG}g")} - {None}
    assert shown == {"K", "Rb", "Cl"}
    for row in found[0].table.itertuples():
        assert f"{row.element}: {100 * row.probability:.1f} %" in texts
        assert f"{100 * row.probability:.1f}" in texts
    assert "Fe: below 0.1 %, or not allowed" in texts


def test_it_shows_itself(sampler):
    found = sampler.infill({"<a>": SALT, **{str(i): rock_salt("Na", "Cl", 5 + 0.1 * i) for i in range(11)}}, mask="Na")
    shown = found._repr_html_()
    best = found[0].best(2)
    assert "&lt;a&gt;" in shown and "<a>" not in shown.replace("&lt;a&gt;", "") and "… and 2 more" in shown
    assert f"{best['element'][0]} {100 * best['probability'][0]:.1f} %, {best['element'][1]} " in shown
    ranks = found.own["rank"]
    told = f"likeliest in {(ranks == 1).sum()}, among the first 5 in {(ranks <= 5).sum()}"
    assert repr(found) == f"<Infilled: 12 crystals; the element that was there is the {told}>" and told in shown
    lines = str(found).splitlines()
    assert len(lines) == 7 and lines[1].startswith(f"<a> (NaCl), Na masked: {best['element'][0]} ")
    assert lines[1].endswith(f"no element {100 * found.outside.iloc[0]:.1f} %") and lines[-1] == "… and 7 more"


@pytest.mark.parametrize("name", ["folder", "x.csv", "x.parquet"])
def test_the_command_writes_a_table_and_a_page(name, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxcrystal.read([SALT, MAGNESIA]).to_pandas().to_csv("c.csv", index=False)
    typed = ["infill", "c.csv", "--model", str(model), "--site", "1", "--allow", "F,Cl,O,S", "--out", name]
    assert main(typed) == 0
    told = capsys.readouterr().out
    stem, where = ("elements", "folder") if name == "folder" else ("x", ".")
    table = f"{stem}.csv" if name == "x.csv" else f"{stem}.parquet"
    assert told.startswith("2 crystals; ") and told.endswith(f"written to {where}: {table}, {stem}.html\n")
    files = {path.name for path in (tmp_path / where).iterdir() if path.suffix != ".lock"} - {"c.csv"}
    assert files == {table, f"{stem}.html", f"{stem}.jsonl"}
    read = pd.read_csv if name == "x.csv" else pd.read_parquet
    found = read(tmp_path / where / table)
    assert len(found) == 8 and found["masked"].tolist() == ["Cl"] * 4 + ["Mg"] * 4
    page = (tmp_path / where / f"{stem}.html").read_text()
    assert page.startswith("<!doctype html>") and page.count('class="elements"') == 2
    counts = asked_for(monkeypatch)
    again = infill(model, tmp_path / "c.csv", tmp_path / name, site=1, allow=["O"])
    assert counts == [0] and isinstance(again, Infilled) and len(read(tmp_path / where / table)) == 2


def test_the_command_refuses_in_one_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxcrystal.read([SALT]).to_pandas().to_csv("c.csv", index=False)
    for options, message in ((["--mask", "Fe"], "0 (NaCl) has no Fe"), ([], "say what is masked")):
        assert main(["infill", "c.csv", "--model", str(model), "--out", "out", *options]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.splitlines()[-1].startswith(f"jaxcrystal infill: {message}")
        assert not (tmp_path / "out").exists()
    other = str(without_infilling(tmp_path / "other"))
    assert main(["infill", "c.csv", "--model", other, "--mask", "Na", "--out", "out"]) == 1
    assert f"{other} was not trained to infill" in capsys.readouterr().err
    assert main(["infill", "c.csv", "--model", str(model), "--base", str(model), "--mask", "Na", "--out", "out"]) == 1
    assert f"{model} has no adapters on a base, but weights of its own; leave the base" in capsys.readouterr().err
