"""A property of one's own, all the way: from CIFs and a table to a model that is asked for it, and judged."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.config import Augment, Property, TextFormat, from_dict, to_dict
from jaxcrystal.crystals import dataset, training_labels
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.own_judges import load
from jaxcrystal.reader.own_labels import OwnLabels
from jaxcrystal.reader.sources import open_source
from jaxcrystal.texts import prompts
from jaxcrystal.texts.conditions import condition, known, sentence
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.texts.writer import Examples, Writer, sentence_tokens

VOLUME = Property("volume_per_atom", 1, unit="Å³")
METHOD = Property("method", None, subject="It was made by")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "band_gap"}, "name is 'band_gap', which prompts state anyway"),
        ({"name": "a=b"}, "name is 'a=b'; it must be a column's name"),
        ({"name": " "}, "must be a column's name"),
        ({"name": "x", "subject": "9 is"}, "subject is '9 is'; it must be words"),
        ({"name": "x", "decimals": 7}, "decimals is 7; it must lie between 0 and 6"),
    ],
)
def test_names_that_do_not_do(keys, message):
    with pytest.raises(UserError, match=message):
        from_dict(Property, keys)


def test_a_property_is_part_of_the_text_format():
    text = from_dict(TextFormat, {"properties": [{"name": "volume_per_atom"}, {"name": "method", "decimals": None}]})
    assert text.properties == (Property("volume_per_atom"), Property("method", None))
    assert from_dict(TextFormat, to_dict(text)) == text and text.attributes[-2:] == ("volume_per_atom", "method")
    with pytest.raises(UserError, match="properties has 'x' twice"):
        from_dict(TextFormat, {"properties": [{"name": "x"}, {"name": "x", "decimals": 1}]})
    with pytest.raises(UserError, match="paper_compat out"):
        from_dict(TextFormat, {"properties": [{"name": "x"}], "paper_compat": True})
    with pytest.raises(UserError, match="'formula' is called as a condition"):
        known((Property("formula", None),))


def test_sentences():
    own = (VOLUME, METHOD)
    assert sentence("volume_per_atom", 12.345, properties=own) == " The volume per atom is 12.3."
    assert sentence("method", "sol-gel", properties=own) == " It was made by sol-gel."
    assert condition("volume_per_atom", own).read("10:12").ends == (10, 12)
    for name, value in (("volume_per_atom", "wide"), ("method", ""), ("method", "a\nb"), ("method", 3)):
        with pytest.raises(UserError, match=f"is no value of {name}"):
            condition(name, own).check(value)
    with pytest.raises(UserError, match="unknown condition 'volume_per_atoms'; did you mean 'volume_per_atom'"):
        condition("volume_per_atoms", own)


def crystals_with_labels() -> CrystalSet:
    """The validation side of the embedded set; two thirds have a volume, a half a method."""
    plain = dataset.load("prototypes:validation").first(60)
    labels = []
    for i in range(len(plain)):
        label = plain.attributes(i)
        if i % 3:
            crystal = plain.crystal(i)
            label["volume_per_atom"] = crystal.volume / len(crystal)
        if i % 2:
            label["method"] = ("by hand", "CVD at 700 °C", "sol-gel")[i % 5 % 3]
        labels.append(label)
    return CrystalSet.from_crystals(plain.ids, [plain.crystal(i) for i in range(len(plain))], labels)


@pytest.mark.parametrize(("form", "name"), [("p1", "compact"), ("symmetry", "compact-symmetry")])
def test_texts_on_the_device_are_the_tokenizers(form, name):
    tokenizer, data = load_tokenizer(name), crystals_with_labels()
    text = TextFormat(form=form, length_decimals=2, properties=(VOLUME, METHOD))
    augment = Augment(translate=False, infill=0.0, attribute_probability=0.6)
    writer = Writer.of(tokenizer, text, augment)
    arrays = writer.form.arrays(data)
    labels = writer.form.stated(data, arrays)
    examples = Examples(arrays, sentence_tokens(tokenizer, labels, text), np.arange(len(data), dtype=np.int32))
    longest = int(writer.bounds(examples)[1].max())

    @jax.jit
    def written(examples):
        draws = writer.draw(jax.random.key(3), examples)
        return draws, writer.lengths(examples, draws), writer.write(examples, draws, longest)

    draws, lengths, rows = jax.device_get(written(jax.tree.map(lambda x: x[:, None], examples)))
    stated = set()
    for i in range(len(data)):
        names = [text.attributes[n] for n in draws.stated[i, 0] if n != EMPTY]
        stated |= set(names)
        prompt = prompts.generation_prompt(form_of(text), {name: labels[i][name] for name in names})
        expected = [*tokenizer.begin, *tokenizer.encode(prompt)]
        assert rows.tokens[i, : len(expected)].tolist() == expected
        assert rows.tokens[i, lengths[i, 0] - 1] == tokenizer.eos_id
    assert {"volume_per_atom", "method"} < stated


def test_labels_are_kept_by_data_sets(tmp_path):
    data = crystals_with_labels()
    dataset.store(data, tmp_path / "x.parquet", {})
    found = dataset.load(tmp_path / "x.parquet")
    assert [found.attributes(i) for i in range(60)] == [data.attributes(i) for i in range(60)]
    assert found.first(5).attributes(4) == data.attributes(4)
    training_labels.store([data.attributes(i) for i in range(60)], tmp_path)
    volumes = training_labels.load(tmp_path)["volume_per_atom"]
    assert np.isnan(volumes[::3]).all() and volumes[1] == round(data.attributes(1)["volume_per_atom"], 6)
    assert "method" not in training_labels.load(tmp_path)


def test_a_table_of_labels(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("ID,bulk modulus,method,band_gap,cif\na,24.3,by hand,1.5,data_\nb,,,,\nc, 1e2 ,7,,\n")
    found = OwnLabels.read(path)
    assert found.of["a"] == {"bulk modulus": 24.3, "method": "by hand", "band_gap": 1.5}
    assert found.of["b"] == {} and found.of["c"] == {"bulk modulus": 100.0, "method": "7"}
    assert found.columns == {"bulk modulus": 2, "method": 2}
    pd.DataFrame({"material_id": [1.0, 2.0], "x": [0.5, None]}).to_parquet(tmp_path / "x.parquet")
    assert OwnLabels.read(tmp_path / "x.parquet").of == {"1": {"x": 0.5}, "2": {}}
    whole = pd.DataFrame({"material_id": ["a", "b"], "x": pd.array([1, None], "Int64")})
    whole.to_parquet(tmp_path / "whole.parquet")
    assert OwnLabels.read(tmp_path / "whole.parquet").of == {"a": {"x": 1.0}, "b": {}}
    whole.to_csv(tmp_path / "nan.csv", index=False, na_rep="NaN")
    assert OwnLabels.read(tmp_path / "nan.csv").of == {"a": {"x": 1.0}, "b": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n", "has no column of ids that crystals are joined by; call it material_id"),
        ("id\n1\n", "has no column but id"),
        ("id,x\n1,2\n1,3\n", "has the id '1' twice"),
        ("id,species\n1,2\n", "a column 'species', as data sets have for the crystals"),
        ("", "cannot read the labels"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        OwnLabels.read(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"cannot read the labels .*none"):
        OwnLabels.read(tmp_path / "none.csv")


def test_labels_of_other_crystals(tmp_path):
    (tmp_path / "x.csv").write_text("id,x\na,2\n")
    labels = OwnLabels.read(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"has no id of prototypes: '.*' is one there, 'a' here"):
        labels.joined(open_source("prototypes"))
    (tmp_path / "y.csv").write_text("cif\ndata_\n")
    with pytest.raises(UserError, match="does not name its crystals"):
        labels.joined(open_source(tmp_path / "y.csv"))


PAGE = Path(__file__).parents[1] / "docs/properties.md"


@pytest.mark.slow
def test_the_page_that_shows_it_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = crystals_with_labels()
    Path("cifs").mkdir()
    lines = ["material_id,volume_per_atom,method"]
    for i in range(30):
        Path(f"cifs/c{i}.cif").write_text(data.crystal(i).to_cif())
        label = data.attributes(i)
        lines.append(f"c{i},{label.get('volume_per_atom', '')},{label.get('method', '')}")
    Path("labels.csv").write_text("\n".join(lines))

    def typed(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return "".join(capsys.readouterr())

    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "yaml", "bash", "bash", "python", "bash"]
    told = ""
    for kind, text in blocks:
        if kind != "bash":
            Path({"yaml": "recipe.yaml", "python": "judges.py"}[kind]).write_text(text)
        for line in text.splitlines() if kind == "bash" else ():
            program, *arguments = shlex.split(line)
            assert program == "jaxcrystal"
            told += typed(*arguments, *(["--workers", 0] if arguments[0] == "evaluate" else []))
    assert "30 kept" in told and "method: known of 15 crystals" in told
    assert "volume_per_atom: known of 20 crystals, its sentence takes " in told
    account = json.loads(Path("data/report.json").read_text())
    assert account["parts"][0]["missing"]["volume_per_atom"] == 10 and account["settings"]["labels"] == "labels.csv"

    table = pd.read_parquet("samples.parquet")
    volumes = [round(data.attributes(i).get("volume_per_atom", np.nan), 6) for i in range(30)]
    stated = [json.loads(text)["volume_per_atom"] for text in table["conditions"]]
    assert set(stated) <= set(volumes) and all(12 <= x <= 16 for x in stated) and len(set(stated)) > 1
    assert table["prompt"][0].count(f"The volume per atom is {stated[0]:.1f}.") == 1
    assert "The volume per atom is 14.0. It was made by sol-gel." in pd.read_parquet("both.parquet")["prompt"][0]

    def meets(folder: str) -> pd.Series:
        rows = pd.read_parquet(f"{folder}/structures.parquet")
        found = rows["property.volume_per_atom"].between(12, 16)
        assert list(found) == list((rows["volume"] / rows["num_atoms"]).between(12, 16))
        return found

    metrics = json.loads(Path("report/metrics.json").read_text())
    assert metrics["conditions"]["volume_per_atom"]["volume_per_atom"] == {
        "met_rate": meets("report").mean(),
        "base_rate": pytest.approx(meets("plain").mean()),
    }
    typed("evaluate", "samples.parquet", "--out", "blind", "--workers", 0)
    assert json.loads(Path("blind/metrics.json").read_text())["counts"]["not_judged"] == {"volume_per_atom": 24}
    Path("wishes.csv").write_text("method,volume_per_atom\nby hand,\n,1:100\n")
    typed("sample", "--model", "run", "--num", 2, "--conditions", "wishes.csv", "--out", "many.parquet")
    assert len(pd.read_parquet("many.parquet")) == 4

    stated = {}
    for value in (13, 30):
        typed(
            "score",
            "samples.parquet",
            "--model",
            "run",
            "--out",
            f"{value}.csv",
            "--property",
            f"volume_per_atom={value}",
        )
        stated[value] = pd.read_csv(f"{value}.csv")["log_probability"].sum()
    assert stated[13] != stated[30]
    assert "the model has volume_per_atom, method" in refused(
        "score", "samples.parquet", "--model", "run", "--out", "y.csv", "--property", "colour=red"
    )

    for option, message in (
        ("colour=red", "--property colour=red: the model has volume_per_atom, method"),
        ("volume_per_atom", "write NAME=VALUE, or NAME=LOW:HIGH"),
        ("volume_per_atom=wide", "'wide' is no value of volume_per_atom"),
        ("volume_per_atom=900:999", "no training crystal has volume_per_atom from 900 to 999; theirs go from"),
    ):
        asked = ("--model", "run", "--num", 2, "--property", option)
        assert message in refused("sample", *asked, "--out", "x.parquet")
    for option, message in (
        ("x=judges.py", "write NAME=MODULE:FUNCTION, or NAME=FILE.py:FUNCTION"),
        ("x=none.py:f", "cannot import none.py: FileNotFoundError"),
        ("x=no.such:f", "cannot import no.such: ModuleNotFoundError"),
        ("x=judges.py:nothing", "judges.py has no function nothing"),
    ):
        assert message in refused("evaluate", "samples.parquet", "--out", "x", "--judge", option)
    for change, message in (
        ("{name: colour}", "names 'colour', which the data set does not have; its own labels: volume_per_atom, method"),
        ("{name: method}", r"'method' is text in the data set \('.*' of crystal c1\); set its decimals to null"),
        ("{name: volume_per_atom, decimals: null}", "'volume_per_atom' is a number in the data set"),
    ):
        with pytest.raises(UserError, match=message):
            jaxcrystal.train("recipe.yaml", [f"text.properties=[{change}]", "out=other"])


def test_judges_that_cannot_say(tmp_path, capsys):
    data = crystals_with_labels()
    crystals = [data.crystal(i) for i in range(3)]

    def some(structure):
        return None if len(structure) == len(crystals[0]) else structure.volume

    def fails(structure):
        raise ValueError("no table for it")

    found = jaxcrystal.evaluate([*crystals, None], tmp_path / "a", judges={"v": some})
    values = found.table["property.v"]
    assert values.isna()[0] and values.isna()[3]
    silent = int(values[:3].isna().sum())  # the fourth is no crystal
    assert found.metrics["counts"]["judge_could_not_say"] == {"v": silent}
    assert f"{silent} of which the judge of v could not say anything" in str(found)
    assert [v for v in values if v == v] == pytest.approx([c.volume for c in crystals if len(c) != len(crystals[0])])
    calls = iter([None, 2.0, 3.0])

    def sometimes(structure):
        return next(calls) + 1  # a TypeError of the first

    found = jaxcrystal.evaluate(crystals, tmp_path / "d", judges={"v": sometimes})
    assert found.metrics["counts"]["judge_could_not_say"] == {"v": 1}
    assert "note: the judge of v failed for 1 crystal, first with TypeError" in capsys.readouterr().err
    with pytest.raises(UserError, match="the judge of v can say nothing of any crystal: ValueError: no table for it"):
        jaxcrystal.evaluate(crystals, tmp_path / "b", judges={"v": fails})
    with pytest.raises(UserError, match="says numbers of some crystals and words of others"):
        mixed = iter([1.0, "two", 3.0])
        jaxcrystal.evaluate(crystals, tmp_path / "c", judges={"v": lambda structure: next(mixed)})
    name, judge = load("n=math:isfinite")
    assert name == "n" and judge(1.0)
