"""Whole models with quantized kernels: stored, laid out, converted, sampled, and their logits' error."""

import dataclasses
import gc
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrystal.config import TARGETS, LlamaConfig, LoraConfig, MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.kernels import decode
from jaxcrystal.model.llama import Llama, abstract_variables, initialize, param_shardings
from jaxcrystal.model.lora import merge
from jaxcrystal.model.quantize import dequantize, quantize, quantizer
from jaxcrystal.sampling.engine import Engine
from jaxcrystal.sampling.methods import Greedy
from jaxcrystal.weights import convert as converting
from jaxcrystal.weights.checkpoint_map import load_hf
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.saved import load_model

SIZES = dict(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=256,
)
SMALL = LlamaConfig(**SIZES)
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
FORMATS = ("int8", "nf4")


def as_stored(weights: str, **changes) -> LlamaConfig:
    return dataclasses.replace(SMALL, weights=weights, **changes)


@pytest.fixture(scope="module")
def floats():
    """Makes the float model's parameters on a mesh; kernels are so wide that every layer leaves its mark."""
    drawn = jax.device_get(initialize(Llama(SMALL), jax.random.key(0), make_mesh(ONE))["params"])
    wide = jax.tree.map(lambda x: 4 * x if x.ndim == 3 else x, drawn)
    return lambda mesh: jax.device_put(wide, param_shardings(Llama(SMALL), mesh)["params"])


def logits(model: Llama, variables, time: int = 48) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, time))
    positions = np.broadcast_to(np.arange(time), tokens.shape)
    return np.asarray(jax.jit(model.apply)(variables, tokens, positions)[0])


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_layers_kernels_are_stored_where_they_belong_and_nothing_else_is(weights, floats):
    mesh, config = make_mesh(EIGHT), as_stored(weights)
    params = floats(mesh)
    expected = jax.device_get(params)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    stored = quantize(params, config, mesh)
    assert kernel.is_deleted() and stored["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    assert jax.tree.map(lambda x: x.sharding, stored) == param_shardings(Llama(config), mesh)["params"]
    assert {*stored["layers"]["self_attn"], *stored["layers"]["mlp"]} == set(TARGETS)
    for block in ("self_attn", "mlp"):
        for name, module in stored["layers"][block].items():
            assert module["kernel"].keys() == {weights, "scale"}
            whole = expected["layers"][block][name]["kernel"]
            restored = np.asarray(jax.jit(decode, static_argnums=1)(module["kernel"], jnp.float32))
            assert 0 < np.abs(restored - whole).max() < 0.16 * np.abs(whole).max()
            expected["layers"][block][name]["kernel"] = restored
    restored = dequantize(stored)
    assert_equal(jax.device_get(restored), expected)
    assert jax.tree.map(lambda x: x.sharding, restored) == param_shardings(Llama(SMALL), mesh)["params"]
    part = stored["layers"]["mlp"]["down_proj"]["kernel"]["scale"].addressable_shards[0].data.shape
    assert part == ((2, 128 // 2) if weights == "int8" else (2, 256 // 64 // 2, 128 // 2))


def test_random_weights_are_those_of_the_float_model_on_any_mesh(floats):
    mesh, config = make_mesh(EIGHT), as_stored("nf4")
    drawn = initialize(Llama(config), jax.random.key(0), mesh)["params"]
    quantized = quantize(floats(make_mesh(ONE)), config, make_mesh(ONE))  # kernels four times as wide: the same codes
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(quantized), strict=True
    ):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        if jax.tree_util.keystr(path).endswith("['kernel']['scale']"):
            ours = 4 * ours
        # Drawn and encoded in one program, a weight may differ in its last bit and so, rarely, in its code.
        assert ours.std() > 0 or (ours == 1).all()
        assert (np.abs(ours - theirs) > 1e-6 * np.abs(theirs)).mean() < 1e-4


@pytest.mark.parametrize("weights", FORMATS)
def test_the_model_computes_with_the_decoded_kernels(weights, floats):
    mesh, config = make_mesh(EIGHT), as_stored(weights)
    stored = quantize(floats(mesh), config, mesh)
    expected = logits(Llama(SMALL), {"params": dequantize(stored)})
    assert expected.std() > 0.1  # or the comparison would say little
    with jax.set_mesh(mesh):
        assert relative(logits(Llama(config), {"params": stored}), expected) < 1e-5
    one = jax.device_put(stored, param_shardings(Llama(config), make_mesh(ONE))["params"])
    found = logits(Llama(config), {"params": one})
    assert relative(found, expected) < 1e-5
    # Wider models, measured: docs/precision.md.
    error = relative(found, logits(Llama(SMALL), {"params": floats(make_mesh(ONE))}))
    low, high = {"int8": (1e-3, 0.06), "nf4": (0.06, 0.6)}[weights]
    assert low < error < high


@pytest.mark.parametrize("weights", FORMATS)
def test_a_device_gathers_codes_not_weights(weights):
    mesh, config = make_mesh(MeshConfig(1, 8, 1)), as_stored(weights, hidden_size=512, intermediate_size=512)
    model = Llama(config, LoraConfig(rank=2))
    variables = abstract_variables(model, mesh)
    rows = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=batch_sharding(mesh))

    def loss(lora, params, tokens):
        return model.apply({"params": params, "lora": lora}, tokens, jnp.zeros_like(tokens))[0].sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(variables["lora"], variables["params"], rows).compile().as_text()
    largest = {"s8": 0, "u8": 0, "f32": 0}
    for kind, shape in re.findall(r"= (\w+)\[([\d,]*)\][^=]* all-gather\(", program):
        largest[kind] = max(largest[kind], int(np.prod([int(n) for n in shape.split(",")])))
    codes = {"int8": "s8", "nf4": "u8"}[weights]
    assert largest[codes] == 512 * 512 // (1 if weights == "int8" else 2)
    assert largest["f32"] <= 96 * 512  # the head and the embedding, but no kernel of a layer


@pytest.mark.parametrize("weights", FORMATS)
def test_backward_keeps_no_decoded_kernels(weights):
    layers = 8
    config = as_stored(weights, num_hidden_layers=layers, hidden_size=256, num_key_value_heads=8)
    model, token = Llama(config, LoraConfig(rank=1)), jnp.zeros((1, 2), jnp.int32)
    variables = abstract_variables(model, make_mesh(ONE))

    def loss(lora, params):
        return model.apply({"params": params, "lora": lora}, token, token)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(variables["lora"], variables["params"]).compile()
    layer = 4 * (4 * 256 * 128 + 3 * 256 * 256)  # bytes of its kernels in float32
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * layer  # not 8


def test_adapters_melt_into_decoded_kernels_only(floats):
    mesh, config = make_mesh(ONE), as_stored("nf4")
    stored = quantize(floats(mesh), config, mesh)
    model = Llama(config, LoraConfig(rank=4, dropout=0.0, targets=("q_proj", "down_proj")))
    adapters = initialize(model, jax.random.key(1), mesh, ["lora"])["lora"]
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    with pytest.raises(UserError, match="cannot be merged into nf4 weights; `dequantize` the parameters first"):
        merge(stored, adapters, model.lora)
    merged = merge(dequantize(stored), adapters, model.lora)
    expected = logits(model, {"params": stored, "lora": adapters})
    assert relative(logits(Llama(SMALL), {"params": merged}), expected) < 1e-5
    assert relative(logits(Llama(config), {"params": stored}), expected) > 0.05


def kernels_alive() -> int:
    """Stacked float kernels on the devices."""
    gc.collect()
    return sum(x.ndim == 3 and x.dtype == jnp.float32 and x.shape[1] >= 64 for x in jax.live_arrays())


@pytest.mark.parametrize("weights", FORMATS)
def test_a_converted_checkpoint_is_loaded_and_sampled(weights, checkpoint, tmp_path, monkeypatch):
    _, source = checkpoint(std=0.1, **SIZES)
    alive = []

    def watched(config, mesh):
        store = quantizer(config, mesh)
        return lambda path, parameter: (alive.append(kernels_alive()), store(path, parameter))[1]

    monkeypatch.setattr(converting, "quantizer", watched)
    before = kernels_alive()
    config = convert(source, tmp_path / "llama", make_mesh(ONE), weights=weights, pad_token=False, vocab_multiple=1)
    assert max(alive) == before + 1  # the one that was just loaded
    stated, params = load_hf(source, make_mesh(ONE))
    assert config == dataclasses.replace(stated, weights=weights)
    assert json.loads((tmp_path / "llama" / "model.json").read_text())["model"]["weights"] == weights
    model = load_model(tmp_path / "llama", make_mesh(EIGHT))
    assert_equal(model.params, quantize(params, config, make_mesh(ONE)))

    if weights == "int8":  # the engine does not know how weights are stored

        def texts(model):
            engine = Engine(model, end_id=2, methods=(Greedy(),), max_new_tokens=20, slots=2)
            return [draw.tokens.tolist() for draw in engine.draw([1, 5, 9], 0, range(2))]

        one = load_model(tmp_path / "llama")
        assert texts(one) == texts(dataclasses.replace(one, config=stated, params=dequantize(one.params)))


def test_sizes_that_cannot_be_stored_are_named():
    for change, size in (({"hidden_size": 96}, 96), ({"intermediate_size": 100}, 100), ({"head_dim": 4}, 32)):
        with pytest.raises(UserError, match=rf"'nf4', which scales 64 inputs at once, but .* is {size}"):
            as_stored("nf4", **change)
        as_stored("int8", **change)
    eight = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(UserError, match=r"down_proj/kernel/scale: its axis 'mlp' of size 4 .*tensor of size 8"):
        abstract_variables(Llama(as_stored("nf4", num_key_value_heads=8, head_dim=64)), eight)
    abstract_variables(Llama(as_stored("int8", num_key_value_heads=8)), eight)
