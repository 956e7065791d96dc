"""The grammar inside the engine: random weights write crystals, and what it takes from a model is accounted for."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Composition

from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.sampling.decoding import TOKENS_PER_SLOT
from jaxcrystal.sampling.engine import Draw, Ending, Engine, Task
from jaxcrystal.sampling.methods import Greedy, Temperature, TopP
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Grammar, Limits, form_of
from jaxcrystal.texts.p1.tables import build
from jaxcrystal.texts.p1.text import parse
from jaxcrystal.texts.sentence_pieces import COMPACT
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import SavedModel, describe

TOKENIZER = load_tokenizer("compact")
PROMPT = [*TOKENIZER.begin, *TOKENIZER.encode("Below:\n")]
LIMIT = 96


def config_of(vocab: int, **options) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(
        vocab_size=vocab, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, **sizes, **options
    )


def random_model(path: Path = COMPACT, mesh=None, **options) -> SavedModel:
    """Weights so wide that every token leaves its mark, and tokens differ in probability by many orders."""
    config = config_of(load_tokenizer(path).vocab_size, **options)
    variables = initialize(Llama(config), jax.random.key(0), mesh or make_mesh(MeshConfig(1, 1, 1)))
    params = jax.tree.map(lambda x: 4 * x, variables["params"])
    return SavedModel(config, None, TextFormat(), params, None, load_tokenizer(path), 0)


@pytest.fixture(scope="module")
def model() -> SavedModel:
    return random_model()


def grammar_of(model: SavedModel, limit: int = LIMIT) -> Grammar:
    form = form_of(model.text)
    return form.grammar(form.tables(model.tokenizer), limit)


def engine_of(model: SavedModel, limit: int = LIMIT, **options) -> Engine:
    defaults = {"methods": (Temperature(0.9), TopP(0.9)), "slots": 64, "max_new_tokens": limit}
    return Engine(model, **{"end_id": 2, "grammar": grammar_of(model, limit), **defaults, **options})


def limits_of(model: SavedModel, limit: int = LIMIT, **constraints) -> Limits:
    return grammar_of(model, limit).limits(Constraints(**constraints))


def crystal_of(draw: Draw, tokenizer=TOKENIZER):
    assert draw.ending is Ending.FINISHED
    return parse(tokenizer.decode(draw.tokens[:-1]))


def test_two_thousand_of_two_thousand_texts_are_crystals(model):
    assert load_tokenizer("compact").eos_id == 2
    draws = list(engine_of(model, slots=256).draw(PROMPT, 0, range(2000)))
    found = [crystal_of(draw) for draw in draws]
    assert len(found) == 2000 and len({crystal.formula for crystal in found}) > 50
    # The model alone would never have written one of them.
    assert max(draw.grammar_log_probability for draw in draws) < -20


FORMULAS = ("Si", "NaCl", "MgO2", "LiFeO2", "SrTiO3", "Fe2O3", "CaCO3", "LaNiO3", "Cu2ZnSnS4", "LiFePO4")


def test_ten_formulas_in_one_run(model):
    """Each slot is kept to what its own crystal was asked for, whatever its neighbours and its forerunner were."""
    limits = [limits_of(model, 176, formula=formula) for formula in FORMULAS]
    tasks = [Task(number, index) for index in range(20) for number in range(10)]
    engine = engine_of(model, 176, slots=32)
    sizes = set()
    for draw in engine.draw_all([PROMPT] * 10, 0, tasks, limits):
        unit = Composition(FORMULAS[draw.prompt])
        crystal = crystal_of(draw)
        found = Composition("".join(crystal.symbols))
        assert found.reduced_formula == unit.reduced_formula
        sizes.add((draw.prompt, found.num_atoms // unit.num_atoms))
    assert len({number for number, _ in sizes}) == 10 and len(sizes) > 12


def test_random_masks_of_elements_in_one_run(model):
    random = np.random.default_rng(0)
    masks = [tuple(random.choice(ELEMENTS[1:95], 20, replace=False).tolist()) for _ in range(8)]
    engine = engine_of(model)
    for name, fits in (("forbidden", lambda mask, x: not mask & x), ("allowed", lambda mask, x: x <= mask)):
        limits = [limits_of(model, **{name: mask}) for mask in masks]
        tasks = [Task(number, index) for index in range(25) for number in range(8)]
        drawn = list(engine.draw_all([PROMPT] * 8, 1, tasks, limits))
        assert all(fits(set(masks[draw.prompt]), set(crystal_of(draw).symbols)) for draw in drawn)
    assert engine._run._cache_size() == engine._read_prompt._cache_size() == 1  # whatever the constraints


def test_llama2s_vocabulary_with_columns_that_hold_no_piece(shared):
    path = shared / "tokenizer/llama2/tokenizer.model"
    model = random_model(path, vocab_multiple=128)
    tokenizer = load_tokenizer(path)
    engine = engine_of(model, methods=(Temperature(0.9),), slots=16)
    draws = engine.draw(PROMPT, 0, range(48), limits_of(model, num_atoms=(2, 3)))
    found = [crystal_of(draw, tokenizer) for draw in draws]
    assert {len(crystal) for crystal in found} == {2, 3}
    tables = build(tokenizer)
    assert any((tables.elements[z] >= 0).sum() > 1 for crystal in found for z in crystal.species)


def test_what_grammar_removed_is_what_the_model_gave_to_other_tokens(model):
    """In float64, from the uncached model's logits and the grammar's own answers along each text."""
    grammar, limits = grammar_of(model), limits_of(model, formula="LiO")
    draws = list(engine_of(model, slots=7).draw(PROMPT, 3, range(20), limits))
    tokens = np.zeros((20, len(PROMPT) + LIMIT), np.int32)
    for row, draw in zip(tokens, draws, strict=True):
        row[: len(PROMPT) + len(draw.tokens)] = [*PROMPT, *draw.tokens]
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits = np.asarray(model.module.apply(model.variables, tokens, places)[0], np.float64)
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    answer, advance = jax.jit(grammar.allowed), jax.jit(grammar.advance)
    state, kept = grammar.start(jax.tree.map(lambda x: np.stack([x] * 20), limits)), np.zeros(20)
    letter = {int(token): number for number, token in enumerate(grammar.tokens)}
    for t in range(len(PROMPT), tokens.shape[1]):
        allowed = np.asarray(answer(state))
        running = t - len(PROMPT) < np.array([len(draw.tokens) for draw in draws])
        with np.errstate(divide="ignore"):
            kept += np.where(running, np.log((probability[:, t - 1][:, grammar.tokens] * allowed).sum(-1)), 0)
        state = advance(state, np.array([letter.get(int(token), 0) for token in tokens[:, t]]))
    np.testing.assert_allclose([draw.grammar_log_probability for draw in draws], kept, atol=2e-3)
    for draw in draws:
        assert draw.log_probability < draw.grammar_log_probability < 0


@pytest.mark.parametrize("methods", [(Temperature(0.9), TopP(0.9)), (Greedy(),)], ids=["sampled", "greedy"])
@pytest.mark.parametrize("jump", [2, 4, 7])
def test_forced_tokens_that_share_a_step_give_the_same_texts(model, methods, jump):
    """As a step for each: texts, both log-probabilities, whatever the formulas; fewer steps are taken."""
    limits = [limits_of(model), limits_of(model, formula="LiO"), limits_of(model, num_atoms=(1, 1))]
    tasks = [Task(number, index) for number in range(3) for index in range(8)]

    def drawn(jump: int) -> list[Draw]:
        return list(engine_of(model, slots=7, methods=methods, jump=jump).draw_all([PROMPT] * 3, 5, tasks, limits))

    for one, several in zip(drawn(1), drawn(jump), strict=True):
        assert several.tokens.tolist() == one.tokens.tolist() and several.ending == one.ending
        for name in ("log_probability", "grammar_log_probability"):
            assert getattr(several, name) == pytest.approx(getattr(one, name), rel=1e-5, abs=1e-4)


def test_half_of_a_text_is_forced(model):
    """Counted by the grammar itself along random texts: what the engine saves is not small."""
    grammar, forced, total = grammar_of(model), 0, 0
    letter = {int(token): number for number, token in enumerate(grammar.tokens)}
    allowed, advance = jax.jit(grammar.allowed), jax.jit(grammar.advance)
    draws = list(engine_of(model).draw(PROMPT, 0, range(16)))
    state = grammar.start(jax.tree.map(lambda x: np.stack([x] * 16), grammar.limits()))
    for t in range(max(len(draw.tokens) for draw in draws)):
        running = np.array([t < len(draw.tokens) for draw in draws])
        forced += (np.asarray(allowed(state)).sum(1) == 1)[running].sum()
        total += running.sum()
        state = advance(state, np.array([letter[int(draw.tokens[t])] if t < len(draw.tokens) else 0 for draw in draws]))
    assert 0.3 < forced / total < 0.7


@pytest.fixture(scope="module")
def usual(model):
    return [told(draw) for draw in engine_of(model, slots=1).draw(PROMPT, 7, range(12))]


def told(draw: Draw):
    sums = (pytest.approx(x, abs=1e-2) for x in (draw.log_probability, draw.grammar_log_probability))
    return draw.index, draw.tokens.tolist(), draw.ending, *sums


def test_a_crystal_does_not_depend_on_slots_or_order(model, usual):
    order = np.random.default_rng(0).permutation(12).tolist()
    engine = engine_of(model, slots=5)
    assert [told(draw) for draw in engine.draw(PROMPT, 7, order)] == [usual[i] for i in order]


def test_a_crystal_does_not_depend_on_devices(usual):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    engine = engine_of(random_model(mesh=mesh), slots=8, mesh=mesh)
    assert [told(draw) for draw in engine.draw(PROMPT, 7, range(12))] == usual


def test_the_vocabulary_stays_divided():
    """Logits are summed up, and letters picked, where their columns lie: no device holds those of all."""
    mesh = make_mesh(MeshConfig(1, 1, 2))
    model = random_model(mesh=mesh)
    engine = engine_of(model, methods=(Temperature(0.9),), slots=16, mesh=mesh)
    text = engine.compile_decode(8).as_text()
    vocab = model.config.padded_vocab_size
    tokens = 16 * TOKENS_PER_SLOT
    assert re.search(rf"\[{tokens},(1,)?{vocab // 2}\]", text) and not re.search(rf"\[{tokens},(1,)?{vocab}\]", text)


def test_logits_that_are_no_numbers_end_a_text_as_before(model):
    params = jax.tree.map(lambda x: x, model.params)
    point = int(build(TOKENIZER).point)
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"].at[point].set(jnp.nan)
    broken = SavedModel(**{**vars(model), "params": params})
    for draw in engine_of(broken, slots=2).draw(PROMPT, 0, range(4)):
        assert draw.ending is Ending.NAN_LOGITS and draw.tokens[-1] == point
        assert np.isnan(draw.grammar_log_probability) and np.isnan(draw.log_probability)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("random") / "model"
    config = config_of(TOKENIZER.vocab_size)
    describe(out, config, None, TextFormat(), load_tokenizer("compact"))
    with ocp.CheckpointManager((out / "checkpoints").resolve()) as manager:
        weights = initialize(Llama(config), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
        manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(weights)))
    return out


def rows_of(model_dir, out, **options):
    sample(model_dir, 24, out, slots=24, max_new_tokens=120, **options)
    return pq.read_table(out).to_pylist()


def test_a_formula_is_stated_and_kept(model_dir, tmp_path):
    rows = rows_of(model_dir, tmp_path / "s.parquet", conditions={"pretty_formula": "NaCl"})
    for row in rows:
        assert "The chemical formula is NaCl." in row["prompt"]
        assert (row["status"], row["formula"]) == ("ok", "ClNa")
        assert row["log_probability"] < row["grammar_log_probability"] < 0
    assert len({row["tokens"] for row in rows}) > 2  # one formula unit or more


def test_a_formula_that_training_never_stated_is_only_kept(model_dir, tmp_path):
    recipe = model_dir / "recipe.yaml"
    recipe.write_text("augment: {attributes: [band_gap]}\n")
    try:
        rows = rows_of(model_dir, tmp_path / "s.parquet", conditions={"pretty_formula": "NaCl", "band_gap": 1.0})
    finally:
        recipe.unlink()
    assert all(row["formula"] == "ClNa" and "formula is" not in row["prompt"] for row in rows)
    assert all("The band gap is 1.0000." in row["prompt"] and "NaCl" not in row["conditions"] for row in rows)


def test_elements_are_stated_and_kept(model_dir, tmp_path):
    constraints = Constraints(num_atoms=(3, 4))
    conditions = {"elements": ["Li", "O"]}
    for row in rows_of(model_dir, tmp_path / "s.parquet", conditions=conditions, constraints=constraints):
        symbols = row["text"].split("\n")[2::2]
        assert set(symbols) == {"Li", "O"} and len(symbols) in (3, 4)
        assert "The elements are Li, O." in row["prompt"]


def test_without_grammar_the_model_writes_what_it_likes(model_dir, tmp_path):
    rows = rows_of(model_dir, tmp_path / "s.parquet", conditions={"pretty_formula": "NaCl"}, grammar=False)
    assert "ok" not in {row["status"] for row in rows}
    assert {row["grammar_log_probability"] for row in rows} == {None}
    with pytest.raises(UserError, match="without the grammar there is nothing to keep the constraints"):
        sample(model_dir, 1, tmp_path / "t.parquet", grammar=False, constraints=Constraints(forbidden=("U",)))


def test_constraints_are_part_of_the_ledgers_identity(model_dir, tmp_path):
    out = tmp_path / "s.parquet"
    sample(model_dir, 2, out, constraints=Constraints(num_atoms=(2, 2)))
    (kept,) = json.loads((tmp_path / "s.parquet.json").read_text())["request"]["grammar"]
    assert json.loads(kept)["num_atoms"] == [2, 2]
    assert sample(model_dir, 2, out, constraints=Constraints(num_atoms=(2, 2))).resumed == 2
    for other in ({"constraints": Constraints(num_atoms=(2, 3))}, {"grammar": False}):
        with pytest.raises(UserError, match="belongs to another run: grammar was"):
            sample(model_dir, 2, out, **other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conditions": {"pretty_formula": "NaXx"}}, "'Xx' of the formula 'NaXx' is no chemical element"),
        ({"conditions": {"pretty_formula": "Mg(Al(OH)2)12"}}, r"61 atoms of MgAl12\(HO\)24 can take"),
        (
            {"conditions": {"pretty_formula": "NaCl", "elements": ["Na", "K"]}},
            "Cl is in NaCl, but it is not among those allowed: K, Na",
        ),
        (
            {"conditions": {"elements": ["Na", "K"]}, "constraints": Constraints(forbidden=("K",))},
            "K is required, but it is forbidden",
        ),
        (
            {"conditions": {"pretty_formula": "LiFePO4"}, "constraints": Constraints(num_atoms=(8, 8))},
            "num_atoms is 8, but LiFePO4 has 7 atoms",
        ),
        ({"max_new_tokens": 40}, "a crystal of one atom can take 47 tokens, but max_new_tokens is 40"),
    ],
)
def test_contradictions_are_refused_before_anything_is_compiled(model_dir, tmp_path, monkeypatch, options, match):
    monkeypatch.setattr("jaxcrystal.sampling.sampler.Engine", lambda *_, **__: sys.exit("an engine was made"))
    with pytest.raises(UserError, match=match):
        sample(model_dir, 1, tmp_path / "s.parquet", **options)
    assert not list(tmp_path.iterdir())
