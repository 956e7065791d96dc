"""Ranges: read, refused where nothing is in them, and each crystal's own value drawn from what training had."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.crystals import training_labels
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.sampling.conditions import read
from jaxcrystal.sampling.ranges import Values
from jaxcrystal.sampling.sampler import Sampler, SamplerSettings
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.conditions import BY_ATTRIBUTE, Range, checked
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import describe

NAN = np.nan
#: Of six crystals; the last has no known band gap.
LABELS = {
    "spacegroup.number": np.array([225.0, 221, 194, 2, 216, 225]),
    "formation_energy_per_atom": np.array([-2.0, -1.5, 0.25, -3, -1, -2]),
    "band_gap": np.array([0.0, 1.5, 1.0, 2.0, 5.25, NAN]),
    "e_above_hull": np.array([0.0, 0.02, 0.06, 0.05, 0.0, 0.01]),
}


@pytest.mark.parametrize(
    ("text", "ends"), [("1:2", (1, 2)), (":0.05", (None, 0.05)), ("195:", (195, None)), (":", (None, None))]
)
def test_a_range_is_typed_or_a_pair(text, ends):
    energy, group = BY_ATTRIBUTE["e_above_hull"], BY_ATTRIBUTE["spacegroup.number"]
    for known in (energy, group) if text != "1:2" and "0" not in text[:2] else (energy,):
        asked = known.read(text)
        assert asked.ends == ends and known.check(ends) == known.check(list(ends)) == known.check(asked) == asked
        assert known.read(str(asked)) == asked


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("band_gap", (2, 1), "band_gap from 2 to 1 is an empty range"),
        ("band_gap", (1, NAN), "is no value of band_gap"),
        ("band_gap", (1, 2, 3), "is no value of band_gap"),
        ("band_gap", ("wide", 2), "is no value of band_gap"),
        ("spacegroup.number", (195, 231), "space group 231 does not exist"),
        ("spacegroup.number", (0, 5), "space group 0 does not exist"),
        ("spacegroup.number", (1.5, 5), "is no value of spacegroup.number"),
        ("pretty_formula", (1, 2), "cannot be read|is no value of pretty_formula"),
        ("elements", (1, 2), "1 is no chemical element"),
    ],
)
def test_what_is_no_range(name, value, message):
    with pytest.raises(UserError, match=message):
        checked({name: value})


@pytest.mark.parametrize("text", ["1:2:3", "a:2", "1:b", "nan:1", "1:nan", "inf:5", "5:-inf"])
def test_what_is_typed_as_no_range(text):
    with pytest.raises(UserError, match="is no value of band_gap"):
        BY_ATTRIBUTE["band_gap"].read(text)


def test_ranges_in_a_csv(tmp_path):
    (tmp_path / "x.csv").write_text("band_gap,spacegroup.number\n1:2,\n,195:230\n:0.5,1\n")
    found = read(tmp_path / "x.csv")
    assert found[0] == {"band_gap": Range(1, 2)} and found[1] == {"spacegroup.number": Range(195, 230)}
    assert found[2] == {"band_gap": Range(-np.inf, 0.5), "spacegroup.number": 1}


BOUNDS = st.tuples(st.floats(-4, 6), st.floats(-4, 6)).map(lambda ends: Range(min(ends), max(ends)))


@settings(max_examples=200, deadline=None)
@given(gap=BOUNDS, hull=BOUNDS, seed=st.integers(0, 2**32 - 1), index=st.integers(0, 10**6))
def test_values_are_those_of_one_training_crystal(gap, hull, seed, index):
    wanted = {"pretty_formula": "NaCl", "band_gap": gap, "e_above_hull": hull}
    meets = [
        (x, y)
        for x, y in zip(LABELS["band_gap"], LABELS["e_above_hull"], strict=True)
        if gap.low <= x <= gap.high and hull.low <= y <= hull.high
    ]
    if not meets:
        with pytest.raises(UserError, match="no training crystal has"):
            Values.within(wanted, LABELS)
        return
    values = Values.within(wanted, LABELS)
    drawn = values.draw(seed, index)
    assert (drawn["band_gap"], drawn["e_above_hull"]) in meets
    assert drawn == Values.within(dict(wanted), LABELS).draw(seed, index)


def test_every_crystal_in_the_range_is_as_likely():
    values = Values.within({"band_gap": Range(0, 2)}, LABELS)
    drawn = [values.draw(7, index)["band_gap"] for index in range(4000)]
    counts = {gap: drawn.count(gap) for gap in (0.0, 1.5, 1.0, 2.0)}
    assert sum(counts.values()) == 4000 and all(abs(n - 1000) < 5 * np.sqrt(750) for n in counts.values())
    other = Values.within({"band_gap": Range(0, 2.5)}, LABELS)  # another wish, other draws
    assert [other.draw(7, index)["band_gap"] for index in range(50)] != drawn[:50]
    assert [values.draw(8, index)["band_gap"] for index in range(50)] != drawn[:50]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"band_gap": Range(6, 9)}, "no training crystal has band_gap from 6 to 9; theirs go from 0 to 5.25"),
        ({"band_gap": Range(6, np.inf)}, "has band_gap of at least 6; theirs"),
        ({"band_gap": Range(-np.inf, -1)}, "has band_gap up to -1; theirs"),
        (
            {"band_gap": Range(5, 6), "spacegroup.number": Range(1, 3)},
            r"all of these together: band_gap from 5 to 6 \(1\), spacegroup.number from 1 to 3 \(1\); ask for wider",
        ),
    ],
)
def test_an_empty_range_says_what_the_data_hold(wanted, message):
    with pytest.raises(UserError, match=message):
        Values.within(wanted, LABELS)
    unknown = LABELS | {"band_gap": np.full(6, NAN)}
    with pytest.raises(UserError, match=r"no training crystal has band_gap; none is known"):
        Values.within({"band_gap": Range(-np.inf, np.inf)}, unknown)


def test_labels_are_kept_beside_a_model(tmp_path):
    rows = [{name: float(v[i]) for name, v in LABELS.items() if np.isfinite(v[i])} for i in range(6)]
    rows.append({"pretty_formula": "NaCl", "elements": ["Cl", "Na"], "band_gap": 1.23456, "e_above_hull": -0.0})
    training_labels.store(rows, tmp_path)
    found = training_labels.load(tmp_path)
    for name, values in LABELS.items():
        np.testing.assert_array_equal(found[name][:6], values)
    assert found["band_gap"][6] == 1.2346 and np.signbit(found["e_above_hull"][6]) == 0
    assert np.isnan(found["spacegroup.number"][6])
    (tmp_path / "labels.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"labels\.parquet cannot be read .*; train again"):
        training_labels.load(tmp_path)
    (tmp_path / "labels.parquet").unlink()
    with pytest.raises(UserError, match=r"it has no labels\.parquet, which `train` writes"):
        training_labels.load(tmp_path)


def model_of(directory, form: str):
    """Random weights; `labels.parquet` beside them."""
    tokenizer = load_tokenizer({"symmetry": "compact-symmetry", "p1": "compact"}[form])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, **sizes
    )
    params = initialize(Llama(config), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))["params"]
    describe(directory, config, None, TextFormat(form=form, length_decimals=2), tokenizer)
    with ocp.CheckpointManager((directory / "checkpoints").resolve()) as checkpoints:
        checkpoints.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave({"params": params})))
    rows = [{name: float(v[i]) for name, v in LABELS.items() if np.isfinite(v[i])} for i in range(6)]
    training_labels.store(rows, directory)
    return directory


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("symmetry") / "model", "symmetry")


LIMITS = {"max_new_tokens": 120, "slots": 4, "num_atoms": (1, 6)}


def test_each_crystal_states_a_value(symmetric, tmp_path):
    wish = {"band_gap": (0, 2), "e_above_hull": (None, 0.05)}
    sample(symmetric, 12, tmp_path / "x.parquet", conditions=wish, seed=3, **LIMITS)
    table = pd.read_parquet(tmp_path / "x.parquet")
    stated = [json.loads(text) for text in table["conditions"]]
    assert {(each["band_gap"], each["e_above_hull"]) for each in stated} == {(0.0, 0.0), (1.5, 0.02), (2.0, 0.05)}
    with Sampler(symmetric, SamplerSettings(max_new_tokens=120, slots=4)) as sampler:
        prompts = [generation_prompt(sampler.form, each) for each in stated]
        alone = {}
        for each in {json.dumps(each): each for each in stated}.values():  # as if its value had been asked for
            for row in sampler.stream(12, conditions=each, num_atoms=(1, 6), seed=3):
                alone[row.prompt, row.draw] = row.text
    assert list(table["prompt"]) == prompts
    assert [alone[prompt, draw] for prompt, draw in zip(prompts, table["draw"], strict=True)] == list(table["text"])
    assert set(table["asked"]) == {'{"band_gap": [0.0, 2.0], "e_above_hull": [null, 0.05], "num_atoms": [1, 6]}'}
    assert set(table["forced"]) == {'["num_atoms"]'}


def test_a_longer_run_goes_on_and_another_range_is_another_run(symmetric, tmp_path):
    out, wish = tmp_path / "x.parquet", {"band_gap": (0, 2)}
    sample(symmetric, 8, tmp_path / "whole.parquet", conditions=wish, **LIMITS)
    sample(symmetric, 5, out, conditions=wish, **LIMITS)
    report = sample(symmetric, 8, out, conditions=wish, **LIMITS)
    assert report.resumed == 5
    pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(tmp_path / "whole.parquet"))
    with pytest.raises(UserError, match="belongs to another run: conditions was"):
        sample(symmetric, 8, out, conditions={"band_gap": (0, 1)}, **LIMITS)
    with pytest.raises(UserError, match="resample weighs the attempts of one prompt"):
        sample(symmetric, 8, tmp_path / "y.parquet", conditions=wish, resample=2, temperature=1.0, top_p=1.0)


def test_a_group_of_a_range_is_one_that_the_formula_can_have(symmetric, tmp_path):
    """Two atoms: there is no position of one atom in group 194, which training had too."""
    wish = {"spacegroup": (190, 230), "formula": "NaCl"}
    sample(symmetric, 10, tmp_path / "x.parquet", conditions=wish, **(LIMITS | {"num_atoms": (2, 2)}))
    table = pd.read_parquet(tmp_path / "x.parquet")
    stated = [json.loads(text)["spacegroup.number"] for text in table["conditions"]]
    assert set(stated) == {225, 221, 216} and list(table["written_group"]) == stated
    assert {tuple(json.loads(text)) for text in table["forced"]} == {
        ("num_atoms", "spacegroup.number", "pretty_formula")
    }
    with pytest.raises(UserError, match=r"no space group of the range will do: .*194"):
        wish = {"spacegroup": (190, 200), "formula": "NaCl"}
        sample(symmetric, 2, tmp_path / "y.parquet", conditions=wish, **(LIMITS | {"num_atoms": (2, 2)}))
    with pytest.raises(
        UserError, match=r"no training crystal has spacegroup\.number from 3 to 10; theirs go from 2 to 225"
    ):
        sample(symmetric, 2, tmp_path / "y.parquet", conditions={"spacegroup": (3, 10)}, **LIMITS)
    assert not (tmp_path / "y.parquet").exists()


def test_many_wishes_and_the_other_form(tmp_path):
    model = model_of(tmp_path / "model", "p1")
    wishes = [{"band_gap": (0, 2)}, {"band_gap": 1.5}, {"spacegroup": (200, 230)}, {}]
    with Sampler(model, SamplerSettings(max_new_tokens=160, slots=4)) as sampler:
        rows = list(sampler.stream(3, conditions=wishes, num_atoms=(1, 3), seed=1))
    assert [row.index for row in rows] == list(range(12)) and [row.draw for row in rows] == [0, 1, 2] * 4
    stated = [json.loads(row.conditions) for row in rows]
    assert all(0 <= each["band_gap"] <= 2 for each in stated[:3]) and stated[3:6] == [{"band_gap": 1.5}] * 3
    assert all(each["spacegroup.number"] in (216, 221, 225) for each in stated[6:9]) and stated[9:] == [{}] * 3
    assert {row.forced for row in rows} == {'["num_atoms"]'}  # this grammar knows no groups
    (model / "labels.parquet").unlink()
    with pytest.raises(UserError, match=r"it has no labels\.parquet, which `train` writes, .*; ask for one value"):
        sample(model, 2, tmp_path / "x.parquet", conditions={"band_gap": (0, 2)})
