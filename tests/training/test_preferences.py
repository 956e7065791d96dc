"""Pairs against torch, and as far as they are a run: the same on every mesh, however packed, killed or gone on."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import torch
import transformers
from flax import struct
from small import SMALL, crystal_set, losses

from jaxcrystal.config import (
    ATTRIBUTES,
    Augment,
    DataConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    Recipe,
    TextFormat,
)
from jaxcrystal.crystals.dataset import load
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, initialize, param_shardings
from jaxcrystal.model.lora import merge
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.texts.writer import Rows, Writer
from jaxcrystal.training import pairs
from jaxcrystal.training.loop import train
from jaxcrystal.training.packing import Feed
from jaxcrystal.training.preferences import PreferenceTrainer
from jaxcrystal.weights.checkpoint_map import load_hf

PAIRS = 10
LORA = LoraConfig(rank=4, dropout=0.0, targets=("q_proj", "o_proj", "down_proj"))
CONDITIONS = [{}, {"band_gap": 1.5, "formula": "SrTiO3"}, {"spacegroup.number": 225}]


def stated(pair: int) -> dict:
    """By attribute, in the order of the table."""
    found = {{"formula": "pretty_formula"}.get(name, name): value for name, value in CONDITIONS[pair % 3].items()}
    return {name: found[name] for name in ATTRIBUTES if name in found}


def table(path: Path) -> Path:
    """Pairs of the stored training set, with prompts of several lengths; a crystal may be in several."""
    rng = np.random.default_rng(0)
    chosen = [rng.choice(60, 2, replace=False) for _ in range(PAIRS)]
    rows = [(f"crystal-{a}", f"crystal-{b}", json.dumps(CONDITIONS[i % 3])) for i, (a, b) in enumerate(chosen)]
    pd.DataFrame(rows, columns=["preferred", "dispreferred", "conditions"]).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def recipe(files, tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("pairs")
    return Recipe(
        out=str(folder / "run"),
        model=SMALL,
        augment=Augment(translate=False),
        preferences=PreferenceConfig(str(table(folder / "pairs.parquet")), likelihood=0.0),
        data=DataConfig(**files, tokens_per_row=512, rows_per_batch=8, validation_rows=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        mesh=MeshConfig(1, 1, 1),
        steps=6, checkpoint_every=2, validate_every=6, log_every=1, keep_checkpoints=9,
    )  # fmt: skip


@struct.dataclass
class Written:
    """Examples that are rows already."""

    index: jax.Array
    rows: Rows


class Ready:
    """A writer with nothing left to write: writing takes most of a compilation's time."""

    def draw(self, key, examples):
        return None

    def write(self, examples, draws, length):
        return examples.rows


def written(feed: Feed) -> Written:
    """The first batch of the first epoch, in which all pairs are, as the writer of pairs writes it."""
    (crystals,), writer = feed.epoch(0), feed.writer
    write = jax.jit(lambda key, examples: writer.write(examples, writer.draw(key, examples), feed.row_length))
    return Written(crystals, jax.device_get(write(feed.key(0), feed.batch(crystals))))


@pytest.fixture(scope="module")
def batch(recipe, tokenizer) -> Written:
    return written(feed_of(recipe, tokenizer))


def feed_of(recipe: Recipe, tokenizer) -> Feed:
    writer = Writer.of(tokenizer, recipe.text, recipe.augment)
    return pairs.feed(recipe, load(recipe.data.train), tokenizer, writer)


def gradients() -> optax.GradientTransformation:
    """An optimizer that moves nothing, and whose state are the gradients."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda found, *_: (zeros(found), found))


def trainer_of(settings: PreferenceConfig, lora=None, mesh=(1, 1, 1), config=SMALL, **options) -> PreferenceTrainer:
    model, mesh = Llama(config, lora), make_mesh(MeshConfig(*mesh))
    options = {"row_length": 512, "pair_writer": Ready(), "preferences": settings} | options
    return PreferenceTrainer(model, None, gradients(), mesh, **options)


def first_values(lora=None) -> dict:
    """On the host, of one seed; adapters add nothing, as when a run starts."""
    return jax.device_get(initialize(Llama(SMALL, lora), jax.random.key(7), make_mesh(MeshConfig(1, 1, 1))))


def later_values(lora=None) -> dict:
    """The same after something has moved of what is trained."""
    keys = iter(jax.random.split(jax.random.key(8), 99))
    moved = lambda x: np.asarray(x + 0.1 * jax.random.normal(next(keys), x.shape))  # noqa: E731
    variables, trained = first_values(lora), "lora" if lora else "params"
    return variables | {trained: jax.tree.map(moved, variables[trained])}


def one_step(trainer: PreferenceTrainer, batch: Written, variables: dict, trained=None):
    """Metrics and gradients of a step; `trained` in the place of what was there at the start."""
    state = trainer.start(jax.device_put(variables, param_shardings(trainer.model, trainer.mesh)))
    if trained is not None:
        state = state.replace(
            trained=jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), trained, state.trained)
        )
    examples = jax.device_put(batch, batch_sharding(trainer.mesh))
    state, metrics = trainer.compile_train(state, examples)(state, examples, jax.random.key(0))
    return jax.device_get(metrics), jax.device_get(state.optimizer)


def close(ours: dict, theirs: dict, tolerance: float) -> None:
    """Every array, by its norm."""
    for path, a in jax.tree_util.tree_leaves_with_path(ours):
        b = theirs
        for key in path:
            b = b[key.key]
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b) > 0, path


def torch_model(seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings",
    )  # fmt: skip
    sizes = {name: getattr(SMALL, name) for name in names}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.15))


def log_p(model, tokenizer, prompt: str, text: str) -> torch.Tensor:
    """Of each token behind the prompt, the end included."""
    before = [*tokenizer.begin, *tokenizer.encode(prompt)]
    whole = [*tokenizer.begin, *tokenizer.encode(prompt + text), tokenizer.eos_id]
    logits = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    return logits[torch.arange(len(whole) - 1), torch.tensor(whole[1:])][len(before) - 1 :]


@pytest.mark.parametrize("likelihood", [0.0, 0.7])
def test_loss_and_gradients_are_those_of_torch(likelihood, recipe, batch, tokenizer, tmp_path):
    """Texts and prompts are made on the host, one by one; eq. 7 of arXiv 2305.18290 is written out."""
    settings = replace(recipe.preferences, beta=0.3, likelihood=likelihood)
    model, reference = torch_model(0), torch_model(1)
    model.save_pretrained(tmp_path / "model")
    reference.save_pretrained(tmp_path / "reference")
    mesh = make_mesh(MeshConfig(1, 1, 1))
    (_, trained), (config, start) = (load_hf(tmp_path / name, mesh) for name in ("model", "reference"))
    metrics, found = one_step(trainer_of(settings, config=config), batch, {"params": start}, trained)

    crystals, form = load(recipe.data.train), form_of(recipe.text)
    chosen = pd.read_parquet(recipe.preferences.pairs)
    terms, margins, gains = [], [], []
    for row, pair in chosen.iterrows():
        prompt = generation_prompt(form, stated(row))
        gained = []
        for name in (pair["preferred"], pair["dispreferred"]):
            text = form.write(crystals.crystal(crystals.ids.index(name)))
            ours = log_p(model, tokenizer, prompt, text)
            with torch.no_grad():
                theirs = log_p(reference, tokenizer, prompt, text)
            gained.append(ours.sum() - theirs.sum())
            if not gained[1:]:
                a_token = -ours.mean()
        margins.append(settings.beta * (gained[0] - gained[1]))
        gains.append(gained[0].item())
        terms.append(-torch.log(torch.sigmoid(margins[-1])) + likelihood * a_token)
    loss = torch.stack(terms).mean()
    loss.backward()
    assert metrics.pairs == PAIRS and metrics.crystals == 2 * PAIRS
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert metrics.margin == pytest.approx(torch.stack(margins).mean().item(), rel=1e-5)
    assert metrics.preferred == pytest.approx(np.mean(gains), rel=1e-5)
    assert metrics.accuracy == pytest.approx(np.mean([m.item() > 0 for m in margins])) and 0 < metrics.accuracy < 1
    with torch.no_grad():
        for weight in model.parameters():  # gradients in our layout: a checkpoint that holds them
            weight.copy_(weight.grad)
    model.save_pretrained(tmp_path / "gradients")
    close(found, jax.device_get(load_hf(tmp_path / "gradients", mesh)[1]), 1e-5)


@pytest.mark.parametrize("lora", [None, replace(LORA, dropout=0.5)], ids=["full", "lora"])
def test_at_the_start_nothing_is_preferred(lora, recipe, batch):
    metrics, found = one_step(trainer_of(recipe.preferences, lora), batch, first_values(lora))
    # Two programs of the same sums: of some 100 nats, the rounding.
    assert abs(metrics.margin) < 1e-5 and abs(metrics.preferred) < 1e-4
    assert metrics.loss == pytest.approx(math.log(2), rel=0, abs=2e-6)
    assert metrics.grad_norm > 0 and any(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


def test_a_model_without_its_adapters_is_the_frozen_copy(recipe, batch):
    """All weights, those of the adapters merged in and the base as reference, give the same; so do the gradients, by
    the chain rule: of W = W₀ + s a b, s G bᵀ for a and s aᵀ G for b, where G is W's."""
    settings, variables = replace(recipe.preferences, beta=0.5, likelihood=0.5), later_values(LORA)
    adapted, found = one_step(trainer_of(settings, LORA), batch, variables)
    merged = merge(variables["params"], variables["lora"], LORA)
    whole, of_kernels = one_step(trainer_of(settings), batch, {"params": variables["params"]}, merged)
    for name in ("loss", "margin", "preferred", "accuracy"):
        assert getattr(adapted, name) == pytest.approx(getattr(whole, name), rel=1e-5), name
    assert adapted.margin != 0
    scale = LORA.alpha / LORA.rank
    for block, kernel in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj")):
        adapter, gradient = (tree["layers"][block][kernel] for tree in (variables["lora"], of_kernels))
        of_kernel = gradient["kernel"]
        expected = {
            "a": scale * of_kernel @ np.swapaxes(adapter["b"], 1, 2),
            "b": scale * np.swapaxes(adapter["a"], 1, 2) @ of_kernel,
        }
        close(found["layers"][block][kernel], expected, 1e-4)


@pytest.fixture(scope="module")
def one_device(recipe, batch):
    """Metrics and gradients of a later step with each setting of adapters, on one device."""
    return cache(lambda lora: later_step(recipe, lora, batch))


def later_step(recipe: Recipe, lora, batch: Written, mesh=(1, 1, 1), **options):
    settings = replace(recipe.preferences, beta=1.0, likelihood=0.5)
    trainer, later = trainer_of(settings, lora, mesh, **options), later_values(lora)
    return one_step(trainer, batch, first_values(lora), later[trainer.collection])


@pytest.mark.parametrize(
    ("mesh", "lora", "options"),
    [
        ((2, 2, 2), None, {}),
        ((1, 8, 1), LORA, {}),
        ((1, 2, 2), LORA, {"accumulate": 2, "loss_block": 100}),
    ],
    ids=lambda value: "full" if value is None else "lora" if value is LORA else str(value),
)
def test_a_mesh_and_micro_batches_give_the_same(mesh, lora, options, recipe, batch, one_device):
    same(later_step(recipe, lora, batch, mesh, **options), one_device(lora))


def same(ours: tuple, theirs: tuple) -> None:
    """Metrics and gradients."""
    # Of differences of log-probabilities that are some 500 nats each, in float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), ours[0], theirs[0])
    assert abs(theirs[0].margin) > 0.1
    close(ours[1], theirs[1], 1e-4)


def test_packing_changes_nothing(recipe, batch, one_device, tokenizer):
    """A pair's crystals stand side by side, whatever row they are in; longer rows hold more pairs."""
    data = replace(recipe.data, tokens_per_row=2048, rows_per_batch=3)
    longer = written(feed_of(replace(recipe, data=data), tokenizer))
    assert batch.index.shape[0] == 8 > longer.index.shape[0] == 3
    for crystals in (batch.index, longer.index):
        first, second = crystals[:, ::2], crystals[:, 1::2]
        assert sorted(first[first >= 0]) == list(range(0, 2 * PAIRS, 2))
        np.testing.assert_array_equal(np.where(first >= 0, first + 1, -1), second)
    same(later_step(recipe, LORA, longer, row_length=2048), one_device(LORA))


@pytest.mark.parametrize("form", ["p1", "symmetry"])
def test_both_texts_follow_the_same_prompt(form, recipe):
    """What the device writes is read: the pair's prompt, and behind it each crystal, with draws of its own."""
    text, augment = TextFormat(form=form), Augment(translate=form == "p1")
    recipe = replace(recipe, text=text, augment=augment, data=replace(recipe.data, tokens_per_row=1024))
    tokenizer = load_tokenizer("compact" if form == "p1" else "compact-symmetry")
    writer = Writer.of(tokenizer, text, augment)
    feed = pairs.feed(recipe, crystal_set(60), tokenizer, writer)
    batch = written(feed)
    read = {}
    for row, crystals in enumerate(batch.index):
        for slot, crystal in enumerate(crystals[crystals >= 0]):
            inside = batch.rows.segments[row] == slot + 1
            tokens, counted = batch.rows.tokens[row][inside], batch.rows.loss_mask[row][inside]
            before = int(np.argmax(counted))
            assert tokens[-1] == tokenizer.eos_id and counted[before:].all()
            assert tuple(tokens[: len(tokenizer.begin)]) == tokenizer.begin
            parts = tokens[len(tokenizer.begin) : before], tokens[before:-1]
            read[int(crystal)] = [tokenizer.decode(part.tolist()) for part in parts]
    assert sorted(read) == list(range(2 * PAIRS))
    for number, (prompt, text) in read.items():
        assert prompt == generation_prompt(writer.form, stated(number // 2))
        assert Counter(writer.form.parse(text).symbols) == Counter(feed_symbols(feed, number))
    if form == "p1":
        shifts = feed.writer.draw(feed.key(0), feed.batch(np.arange(4)[None])).body.translation
        assert len({tuple(x) for x in np.asarray(shifts)[0].tolist()}) == 4


def feed_symbols(feed: Feed, number: int) -> list[str]:
    crystals = crystal_set(60)
    return crystals.crystal(crystals.ids.index(feed.ids[number])).symbols


def told(out: str, name: str) -> list[float]:
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if line["event"] == "train"]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_its_pairs_and_goes_on_where_it_was_killed(lora, recipe, tmp_path, monkeypatch):
    """From the checkpoint before: bit for bit, with the reference that the run had from its start."""
    recipe = replace(recipe, lora=lora, out=str(tmp_path / "run"))
    if lora:
        base = replace(recipe, lora=None, preferences=None, steps=1, out=str(tmp_path / "base"))
        train(base)
        Path(base.out, "formulas.txt").write_text("ClNa\n")  # all that the base knows
        rate = replace(recipe.optimizer, learning_rate=3e-2)
        recipe = replace(recipe, optimizer=rate, base=base.out)
    monkeypatch.setattr("jaxcrystal.training.loop.check_infilling", None)  # with pairs nothing is infilled
    train(recipe)
    found, margins = losses(recipe.out), told(recipe.out, "margin")
    assert (Path(recipe.out, "formulas.txt").read_text() == "ClNa\n") == bool(lora)
    assert found[0] == pytest.approx(math.log(2), rel=0, abs=2e-6) and found[-1] < found[0] - 0.01
    assert abs(margins[0]) < 1e-5 < 0.01 < margins[-1] and told(recipe.out, "accuracy")[-1] > 0.5
    for step in ("4", "6"):
        shutil.rmtree(Path(recipe.out) / "checkpoints" / step)
    train(recipe)
    assert losses(recipe.out) == found
    other = replace(recipe, preferences=replace(recipe.preferences, beta=0.2))
    with pytest.raises(UserError, match=r"preferences.beta is 0.1 there, 0.2 here"):
        train(other)
    chosen = pd.read_parquet(recipe.preferences.pairs)
    chosen[::-1].to_parquet(tmp_path / "others.parquet")
    with pytest.raises(UserError, match=r"preferences.pairs is .* there"):
        train(replace(recipe, preferences=replace(recipe.preferences, pairs=str(tmp_path / "others.parquet"))))


GOOD = {"preferred": "crystal-1", "dispreferred": "crystal-2", "conditions": "{}"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, GOOD | {"dispreferred": "x"}],
            r"pairs.parquet, row 1: .*train.parquet has no crystal 'x'; a pair names",
        ),
        ([GOOD | {"preferred": None}], r"row 0: .* has no crystal None; a pair names one by its id"),
        ([GOOD | {"dispreferred": "crystal-1"}], r"row 0: 'crystal-1' is preferred to itself; a pair is of two"),
        ([{"preferred": "crystal-1"}], r"pairs.parquet has no column 'dispreferred', of ids of crystals of .*train"),
        ([], r"pairs.parquet has no pairs; nothing can be trained on it"),
        ([GOOD | {"conditions": "NaCl"}], r"row 0: conditions 'NaCl' is no JSON object, such as"),
        ([GOOD | {"conditions": "[1]"}], r"row 0: conditions '\[1\]' is no JSON object, such as"),
        ([GOOD | {"conditions": '{"gap": 1}'}], r"row 0: unknown condition 'gap'; known are pretty_formula"),
        ([GOOD | {"conditions": '{"band_gap": "x"}'}], r"row 0: 'x' is no value of band_gap"),
        ([GOOD | {"conditions": '{"band_gap": [1, 2]}'}], r"row 0: band_gap is a range; a prompt states a value"),
    ],
)
def test_what_is_no_pair_is_refused(rows, message, recipe, tokenizer, tmp_path):
    path = tmp_path / "pairs.parquet"
    pd.DataFrame(rows, columns=rows[0] if rows else list(GOOD)).to_parquet(path)
    with pytest.raises(UserError, match=message) as caught:
        feed_of(replace(recipe, preferences=PreferenceConfig(str(path))), tokenizer)
    assert "\n" not in str(caught.value)


def test_pairs_without_conditions_state_nothing(recipe, tokenizer, tmp_path):
    path = tmp_path / "pairs.parquet"
    pd.DataFrame([GOOD]).drop(columns="conditions").to_parquet(path)
    feed = feed_of(replace(recipe, preferences=PreferenceConfig(str(path))), tokenizer)
    batch = written(feed)
    prompt = [*tokenizer.begin, *tokenizer.encode(generation_prompt(feed.writer.form, {}))]
    for segment in (1, 2):
        assert batch.rows.tokens[0][batch.rows.segments[0] == segment][: len(prompt)].tolist() == prompt


def test_what_is_no_table_is_refused(recipe, tokenizer, tmp_path):
    for path, message in (
        (tmp_path / "nowhere.parquet", r"cannot read the pairs .*nowhere.parquet: No such file"),
        (Path(__file__), r"test_preferences.py is no parquet file; preferences.pairs is a table of pairs"),
    ):
        with pytest.raises(UserError, match=message):
            feed_of(replace(recipe, preferences=PreferenceConfig(str(path))), tokenizer)
    short = replace(recipe, data=replace(recipe.data, tokens_per_row=260))
    with pytest.raises(UserError, match=r"pairs.parquet: the pair of row \d can take \d+ tokens, a row holds 260; set"):
        feed_of(short, tokenizer)
    twice = crystal_set(3)
    twice = replace(twice, ids=("crystal-1", "crystal-1", "crystal-2"))
    pd.DataFrame([GOOD]).to_parquet(tmp_path / "pairs.parquet")
    named = replace(recipe, preferences=PreferenceConfig(str(tmp_path / "pairs.parquet")))
    with pytest.raises(UserError, match=r"row 0: .* has 2 crystals 'crystal-1'; a pair names one by its id"):
        pairs.feed(named, twice, tokenizer, Writer.of(tokenizer, recipe.text, recipe.augment))
