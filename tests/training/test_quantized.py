"""Adapters trained on a quantized base: the same on every mesh, the same as on the base decoded, and within memory."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import struct
from small import SMALL

from jaxcrystal.config import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, Recipe, TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables, initialize
from jaxcrystal.model.quantize import dequantize
from jaxcrystal.texts.writer import Rows
from jaxcrystal.training.loop import train
from jaxcrystal.training.speed import Multiplied
from jaxcrystal.training.step import Trainer, make_optimizer
from jaxcrystal.weights.saved import describe, load_model

ROWS, LENGTH, STEPS = 4, 64, 5
CONFIG = replace(SMALL, hidden_size=128, intermediate_size=128, num_attention_heads=4, head_dim=32)
LORA = LoraConfig(rank=4, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
ONE = MeshConfig(1, 1, 1)


@struct.dataclass
class Written:
    """Examples that are rows already."""

    index: jax.Array
    rows: Rows


class Ready:
    """A writer with nothing left to write: it compiles at once, and what is tested here is not the writing."""

    def draw(self, key, examples):
        return None

    def write(self, examples, draws, length):
        return examples.rows


def batch(mesh, seed: int) -> Written:
    """Rows of two sequences of random tokens and some padding."""
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    lengths = (40, 20, 4)
    segments = np.tile(np.repeat(np.array([1, 2, 0], np.int32), lengths), (ROWS, 1))
    positions = np.tile(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]), (ROWS, 1))
    rows = Rows(tokens, segments, positions, segments > 0)
    return jax.device_put(Written(np.zeros((ROWS, 2), np.int32), rows), batch_sharding(mesh))


def run(config, variables, mesh):
    """Losses of a few steps on the same rows, and the state after them."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-2, warmup_steps=1), STEPS)
    trainer = Trainer(Llama(config, LORA), Ready(), optimizer, mesh, LENGTH)
    state, losses = trainer.start(variables), []
    step = trainer.compile_train(state, batch(mesh, 0))
    for i in range(STEPS):
        state, metrics = step(state, batch(mesh, i % 2), jax.random.key(0))
        losses.append(float(metrics.loss))
    return losses, jax.device_get(state)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_every_mesh_gives_the_same_losses_and_so_does_the_decoded_base(weights):
    config = replace(CONFIG, weights=weights)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    many, after = run(config, initialize(Llama(config, LORA), jax.random.key(7), mesh), mesh)
    one_device = make_mesh(ONE)
    variables = initialize(Llama(config, LORA), jax.random.key(7), one_device)
    before = jax.device_get(variables)
    floats = {"params": dequantize(variables["params"]), "lora": jax.tree.map(jnp.copy, variables["lora"])}
    one, after_one = run(config, variables, one_device)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
    assert one[-1] < one[0] - 0.05  # it learns
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), after_one.trained, after.trained)
    for state in (after_one, after):
        jax.tree.map(np.testing.assert_array_equal, state.frozen, {"params": before["params"]})
    if weights == "nf4":
        decoded, _ = run(CONFIG, floats, one_device)
        np.testing.assert_allclose(decoded, one, rtol=0, atol=1e-5)


def test_the_base_takes_a_half_and_a_quarter_of_bfloat16():
    """By the compiled step's own account of its arguments, in a model whose layers dominate."""
    mesh = make_mesh(ONE)
    taken, multiplied = {}, set()
    for weights in ("float", "int8", "nf4"):
        config = replace(CONFIG, weights=weights, hidden_size=512, intermediate_size=1536, num_hidden_layers=6)
        model = Llama(config, LoraConfig(rank=1, targets=("q_proj",)))
        variables = abstract_variables(model, mesh)
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)

        def loss(adapters, params, tokens, model=model):
            return model.apply({"params": params, "lora": adapters}, tokens, tokens)[0].sum()

        def like(x):
            return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype)

        params = jax.tree.map(like, variables["params"])
        compiled = jax.jit(jax.grad(loss)).lower(variables["lora"], params, tokens).compile()
        taken[weights] = compiled.memory_analysis().argument_size_in_bytes
        multiplied.add(Multiplied.of(config, variables, "lora"))
    assert 0.50 < taken["int8"] / taken["float"] < 0.52
    assert 0.265 < taken["nf4"] / taken["float"] < 0.29
    assert len({(m.weights, m.trained) for m in multiplied}) == 1  # FLOPs do not depend on how weights are stored


def test_codes_are_not_trained():
    with pytest.raises(
        UserError, match=r"int8 weights are frozen, only adapters on them can be trained: set lora.rank"
    ):
        Trainer(Llama(replace(CONFIG, weights="int8")), Ready(), make_optimizer(OptimizerConfig(), 1), None, LENGTH)


@pytest.mark.slow
def test_a_recipe_trains_on_a_quantized_base_and_on_no_other(files, tokenizer, tmp_path):
    config, mesh = replace(CONFIG, weights="nf4", vocab_size=tokenizer.vocab_size), make_mesh(ONE)
    base = tmp_path / "base"
    describe(base, config, None, TextFormat(), tokenizer)
    variables = initialize(Llama(config), jax.random.key(0), mesh)
    with ocp.CheckpointManager(base / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(variables)))
    recipe = Recipe(
        base=str(base), out=str(tmp_path / "run"), lora=LoraConfig(rank=2, targets=("q_proj",)), steps=2,
        data=DataConfig(**files, tokens_per_row=384, rows_per_batch=2, validation_rows=2), mesh=ONE,
    )  # fmt: skip
    report = train(recipe)
    model = load_model(report.out)
    assert model.config.weights == "nf4" and model.adapters["layers"]["self_attn"]["q_proj"]["b"].any()
    jax.tree.map(np.testing.assert_array_equal, model.params, variables["params"])
    start = json.loads((report.out / "metrics.jsonl").read_text().splitlines()[0])
    floats = jax.eval_shape(lambda: dequantize(variables["params"]))
    assert start["weights"]["params"] == sum(x.size for x in jax.tree.leaves(floats))
    with pytest.raises(UserError, match="nf4 weights are frozen"):
        train(replace(recipe, lora=None, out=str(tmp_path / "other")))
    with pytest.raises(
        UserError, match=r"base .*base holds nf4 weights; make a base with `jaxcrystal convert --weights"
    ):
        train(replace(recipe, model=replace(recipe.model, weights="int8"), out=str(tmp_path / "other")))
