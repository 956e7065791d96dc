"""A sampler is loaded once: its rows are those of a run, request after request, until it is closed."""

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow.parquet as pq
import pytest

import jaxcrystal
from jaxcrystal.config import Augment, LlamaConfig, MeshConfig, Recipe, TextFormat, to_dict
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.sampler import Sampler, SamplerSettings
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import describe, save_weights

CONFIG = LlamaConfig(
    vocab_size=load_tokenizer("compact").vocab_size,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)
SETTINGS = {"max_new_tokens": 96, "slots": 8}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Random weights."""
    out = tmp_path_factory.mktemp("random") / "model"
    describe(out, CONFIG, None, TextFormat(), load_tokenizer("compact"))
    save_weights(out, initialize(Llama(CONFIG), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1))))
    return out


@pytest.fixture(scope="module")
def sampler(model_dir):
    with Sampler(model_dir, SamplerSettings(**SETTINGS)) as sampler:
        yield sampler


def test_a_stream_is_what_a_run_writes(sampler, model_dir, tmp_path):
    conditions = [{"pretty_formula": "NaCl"}, {"elements": ["O", "Li"], "band_gap": 1.0}]
    sample(model_dir, 5, tmp_path / "s.parquet", conditions=conditions, seed=3, symprec=0.2, **SETTINGS)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [asdict(row) for row in sampler.stream(5, conditions=conditions, seed=3, symprec=0.2)] == rows
    assert {row["formula"] for row in rows[:5]} == {"ClNa"} and {row["formula"] for row in rows[5:]} != {"ClNa"}


def compiled_by(work) -> list[str]:
    """Names of what JAX traces and compiles meanwhile."""
    events = []

    def listen(name, *_, **__):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        work()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return [name for name in events if "compile" in name]


def test_no_request_compiles_again_whatever_it_states(sampler):
    def request(num, **stated):
        return lambda: list(sampler.stream(num, **stated))

    request(8, formula="NaCl")()
    assert compiled_by(request(8, formula="NaCl", seed=5)) == []
    assert compiled_by(request(7, formula="LiFe", band_gap=1.0, num_atoms=2)) == []
    assert compiled_by(request(5, elements=["O", "H"], constraints=Constraints(lengths=(3, 9)))) == []
    two = [{"formula": "NaCl"}, {"formula": "MgO", "spacegroup": 225}]
    assert compiled_by(request(4, conditions=two)) == []
    many = [{"band_gap": float(x)} for x in range(30)]
    assert compiled_by(request(1, conditions=many)) == []


def test_an_abandoned_stream_leaves_the_sampler_usable(sampler):
    whole = list(sampler.stream(20, seed=1))
    waiting = sampler.stream(20, seed=1)
    assert list(islice(waiting, 3)) == whole[:3]
    waiting.close()

    def interrupted():
        for row in sampler.stream(20, seed=1):
            if row.index == 2:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        list(interrupted())
    assert list(sampler.stream(20, seed=1)) == whole


def test_streams_may_be_read_in_turn(sampler):
    alone = [list(sampler.stream(9, seed=seed)) for seed in (1, 2)]
    together = zip(sampler.stream(9, seed=1), sampler.stream(9, seed=2), strict=True)
    assert [list(rows) for rows in zip(*together, strict=True)] == alone


def test_a_closed_sampler_has_given_its_memory_back_and_says_so(model_dir):
    before = sum(array.nbytes for array in jax.live_arrays())
    sampler = Sampler(model_dir, SamplerSettings(**SETTINGS))
    waiting = sampler.stream(20)
    next(waiting)
    assert sum(array.nbytes for array in jax.live_arrays()) > before
    sampler.close()
    with pytest.raises(UserError, match=r"the sampler of .*model is closed; load the model again"):
        list(waiting)
    with pytest.raises(UserError, match="is closed"):
        sampler.stream(1)
    sampler.close()
    del waiting
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_wrong_requests_are_refused_at_once(sampler):
    for request, match in (
        ({"formla": "NaCl"}, "unknown condition 'formla'; did you mean 'formula'"),
        ({"formula": "NaCl", "conditions": {}}, "as keywords or as `conditions`, not as both"),
        ({"band_gap": float("nan")}, "nan is no value of band_gap"),
        ({"symprec": 0.0}, "symprec is 0.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": -1, "band_gap": (0, 2)}, "seed -1"),
        ({"exact_symmetry": True}, "writes the p1 form, which states none"),
        ({"constraints": Constraints(num_atoms=(99, 99))}, "99 atoms can take"),
    ):
        with pytest.raises(UserError, match=match):
            sampler.stream(1, **request)
    with pytest.raises(UserError, match="num is 0"):
        sampler.stream(0)


@pytest.fixture
def trained_dir(model_dir, tmp_path):
    """A model whose training texts stated band gaps alone."""
    out = tmp_path / "trained"
    out.mkdir()
    for path in model_dir.iterdir():
        (out / path.name).symlink_to(path)
    recipe = Recipe(augment=Augment(attributes=("band_gap",)))
    (out / "recipe.yaml").write_text(json.dumps(to_dict(recipe)))
    return out


def test_what_training_never_stated_is_said_or_refused(trained_dir, capsys, tmp_path):
    with Sampler(trained_dir, SamplerSettings(**SETTINGS)) as sampler:
        (row,) = sampler.stream(1, formula="Na2Cl2", band_gap=1.0)
        assert json.loads(row.conditions) == {"band_gap": 1.0} and row.formula == "ClNa"
        (line,) = capsys.readouterr().err.splitlines()
        assert "not trained on pretty_formula" in line and "the grammar alone keeps to it" in line
        with pytest.raises(UserError, match="not trained on e_above_hull; attributes that it knows: band_gap"):
            sampler.stream(1, e_above_hull=0.0)
    with pytest.raises(UserError, match=r"not trained on spacegroup\.number"):
        sample(trained_dir, 1, tmp_path / "s.csv", conditions={"spacegroup": 225})
    sample(trained_dir, 1, tmp_path / "s.csv", conditions={"formula": "NaCl"}, **SETTINGS)
    assert "not trained on pretty_formula" in capsys.readouterr().err


def test_cells_are_as_large_as_in_training(model_dir, tmp_path, capsys):
    out = tmp_path / "model"
    out.mkdir()
    for path in model_dir.iterdir():
        (out / path.name).symlink_to(path)
    (out / "num_atoms.json").write_text('{"3": [3, 3], "2": [2, 2]}')
    with Sampler(out, SamplerSettings(max_new_tokens=160, slots=8)) as sampler:

        def sizes(**request):
            return {len(row.crystal) for row in sampler.stream(8, **request)}

        assert sizes(formula="H2O") == {3} and sizes(formula="NaCl") == {2}
        (line,) = capsys.readouterr().err.splitlines()  # the second says nothing new
        assert "(H2O: 3 to 3)" in line
        assert sizes(formula="H2O", num_atoms=6) == {6}
        assert max(sizes(formula="H2O", num_atoms="any")) > 3 and len(sizes()) > 1
        assert capsys.readouterr().err == ""
    sample(out, 2, tmp_path / "s.csv", conditions={"formula": "H2O"}, max_new_tokens=160)
    assert "(H2O: 3 to 3)" in capsys.readouterr().err
    (kept,) = json.loads((tmp_path / "s.csv.json").read_text())["request"]["grammar"]
    assert json.loads(kept)["num_atoms"] == [3, 3]  # recorded


def test_settings_out_of_range_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="cache_dtype is 'foo'; it must be float32, bfloat16 or int8"):
        jaxcrystal.load(tmp_path, cache_dtype="foo")
    for settings in ({"slots": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 2.0}, {"guidance": -1.0}):
        with pytest.raises(UserError, match=f"{next(iter(settings)).replace('_', '.')[:5]}"):
            jaxcrystal.load(tmp_path, **settings)


def test_attempts_are_resampled_prompt_by_prompt(model_dir):
    with jaxcrystal.load(model_dir, temperature=1.0, top_p=1.0, slots=1, max_new_tokens=96) as sampler:
        found = sampler.sample(8, conditions=[{"formula": "NaCl"}, {"formula": "MgO"}])
    chosen = found.resample(3)
    assert [row.formula for row in chosen] == ["ClNa"] * 3 + ["MgO"] * 3 and 2 <= found.effective_number <= 16
    likeliest = max(found[:8], key=lambda row: row.grammar_log_probability)
    assert likeliest in chosen.rows and found[8:].resample(2).counts == {"ok": 2}
    with pytest.raises(UserError, match="these have no settings"):
        jaxcrystal.Attempts(found).resample(1)
    with pytest.raises(UserError, match="exact at temperature 1"):
        jaxcrystal.Attempts(found, SamplerSettings()).resample(1)


def test_what_resampling_cannot_weigh_is_refused_and_wishes_are_told_apart():
    """By their draws: two wishes may have one prompt, and within a range each draw has its own."""

    def drawn(prompt: str, asked: str, count: int = 4, **others: Any) -> list[Attempt]:
        cell = {"log_probability": -9.0, "grammar_log_probability": -1.0, "tokens": 9, "formula": None, "cif": None}
        rest = {"space_group": None, "symmetrized_cif": None, "asked": asked, "seed": 0, "conditions": "{}", **others}
        return [Attempt(i, i, prompt=prompt, text="", **{"status": "ok"} | cell | rest) for i in range(count)]

    def resampled(rows: list[Attempt]) -> Counter[str]:
        exact = SamplerSettings(temperature=1.0, top_p=1.0)
        return Counter(row.asked for row in jaxcrystal.Attempts(rows, exact).resample(3))

    assert resampled(drawn("x", "2") + drawn("x", "5")) == {"2": 3, "5": 3}
    assert resampled(drawn("x", "2") * 2) == {"2": 6}  # drawn twice, of another seed
    assert resampled(drawn("x", "2")[:2] + drawn("x", "5")[2:]) == {"2": 3, "5": 3}  # parts of a table
    assert resampled(drawn("x", "2", 1) + drawn("y", "5", 1)) == {"2": 3, "5": 3}
    of_range = [replace(row, prompt=f"{row.index}") for row in drawn("x", "[0, 2]")]
    with pytest.raises(UserError, match="within a range each has its own"):
        resampled(of_range)
    with pytest.raises(UserError, match="`keep` left some of these out"):
        resampled(drawn("x", "2") + drawn("x", "2", status="left_out"))


def test_a_loaded_model_gives_tables(model_dir):
    with jaxcrystal.load(model_dir, max_new_tokens=96) as sampler:
        found = sampler.sample(6, formula="NaCl", seed=2)
        assert isinstance(found, jaxcrystal.Attempts) and len(found) == 6 and found.counts == {"ok": 6}
        assert found.ids == list("012345") and [c.formula for c in found.crystals] == ["ClNa"] * 6
        assert [s.composition.reduced_formula for s in found.structures()] == ["NaCl"] * 6
        assert list(found.to_pandas()["text"]) == [row.text for row in found] == [row.text for row in found[:6]]
        read = jaxcrystal.read(found)
        assert read.ids == found.ids and [row.crystal for row in read] == found.crystals
        shown = found._repr_html_()
        assert "Attempts: 6 rows: 6 ok" in shown and shown.count("<svg") == 6
        assert "closed" not in repr(sampler)
    assert "closed" in repr(sampler)
    assert jnp.zeros(1).sum() == 0  # the device is there for others
