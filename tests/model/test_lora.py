"""Adapters against PEFT, merged against apart, and dropout where and only where it belongs."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxcrystal.config import TARGETS, LoraConfig, MeshConfig
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.kernels import multiply
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.model.lora import Linear, merge
from jaxcrystal.weights.checkpoint_map import load_hf

ONE = MeshConfig(1, 1, 1)
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def adapted(checkpoint, targets, rank=4, alpha=10.0):
    """A torch PEFT model and ours with the same weights and the same random adapters, b not zero."""
    theirs, directory = checkpoint()
    config, params = load_hf(directory, make_mesh(ONE))
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=0.0, targets=targets)
    model = Llama(config, lora)
    adapters = initialize(model, jax.random.key(1), make_mesh(ONE), ["lora"])["lora"]
    adapters = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets))
    )
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if name.endswith(targets):
                layer, block, kernel = int(name.split(".layers.")[1].split(".")[0]), *name.split(".")[-2:]
                ours = adapters["layers"][block][kernel]
                module.lora_A["default"].weight.copy_(torch.tensor(np.array(ours["a"][layer].T)))
                module.lora_B["default"].weight.copy_(torch.tensor(np.array(ours["b"][layer].T)))
    return theirs.eval(), model, params, adapters


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), TARGETS], ids=["paper", "one", "all"])
def test_logits_equal_peft_and_the_merged_model(targets, checkpoint):
    theirs, model, params, adapters = adapted(checkpoint, targets)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 30))
    positions = np.broadcast_to(np.arange(30), tokens.shape)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    scale = np.abs(expected).max()
    found, _ = jax.jit(model.apply)({"params": params, "lora": adapters}, tokens, positions)
    assert np.abs(found - expected).max() < 1e-5 * scale
    bare_apply = jax.jit(Llama(model.config).apply)
    merged, _ = bare_apply({"params": merge(params, adapters, model.lora)}, tokens, positions)
    assert np.abs(merged - expected).max() < 1e-5 * scale
    bare, _ = bare_apply({"params": params}, tokens, positions)
    assert np.abs(bare - expected).max() > 0.05 * scale


def test_merge_keeps_the_dtype_of_the_kernels(checkpoint):
    _, model, params, adapters = adapted(checkpoint, ("q_proj",))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = merge(half, adapters, model.lora)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_initial_adapters_change_nothing_and_have_pefts_distribution(checkpoint):
    theirs, directory = checkpoint(hidden_size=256, num_hidden_layers=2)
    config, params = load_hf(directory, make_mesh(ONE))
    model = Llama(config, LoraConfig(rank=16))
    adapters = initialize(model, jax.random.key(0), make_mesh(ONE), ["lora"])["lora"]
    assert set(adapters["layers"]) == {"self_attn"} and set(adapters["layers"]["self_attn"]) == {"q_proj", "v_proj"}
    for pair in adapters["layers"]["self_attn"].values():
        a = np.asarray(pair["a"])
        assert a.shape == (2, 256, 16) and a.dtype == np.float32 and not pair["b"].any()
        assert not np.array_equal(a[0], a[1])
        assert np.abs(a).max() <= 1 / 16 and a.std() == pytest.approx(1 / 16 / np.sqrt(3), rel=0.03)
    torch_a = peft.get_peft_model(theirs, peft.LoraConfig(r=16, target_modules=["q_proj"])).state_dict()
    torch_a = next(value for name, value in torch_a.items() if "lora_A" in name).numpy()
    assert np.abs(torch_a).max() <= 1 / 16 and torch_a.std() == pytest.approx(a.std(), rel=0.05)

    tokens = np.arange(20).reshape(2, 10)
    positions = np.broadcast_to(np.arange(10), tokens.shape)
    bare, _ = Llama(config).apply({"params": params}, tokens, positions)
    np.testing.assert_array_equal(model.apply({"params": params, "lora": adapters}, tokens, positions)[0], bare)


def test_gradients_of_adapters_are_float32_where_products_are_bfloat16():
    """Rounded to bfloat16, a gradient would be wrong by up to 2⁻⁹; sums over devices would add to that."""
    x, dy, w = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 64, 32), (4, 64, 8), (32, 8)])
    )
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    y, back = jax.vjp(lambda x, w: multiply(x, w, ("embed", "rank")), x, w)
    dx, dw = back(dy)
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    x, dy, w = (np.asarray(z.astype(jnp.bfloat16), np.float64) for z in (x, dy, w))
    for ours, exact in ((y, x @ w), (dx, dy @ w.T)):  # rounded once: half of the last of 8 digits
        error = np.abs(np.asarray(ours, np.float64) - exact)
        assert (error <= 2.0**-8 * np.abs(exact) + 1e-6 * np.abs(exact).max()).all()
    exact = np.einsum("bti,bto->io", x, dy)
    assert np.abs(dw - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or "avx512_bf16" not in CPU,
    reason="needs a CPU that multiplies bfloat16 numbers (AVX512-BF16)",
)
def test_a_cpu_multiplies_bfloat16_numbers_as_such():
    """By the compiled program of a product and its gradients: none of the three has factors that were made wider."""

    def all_three(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, back = jax.vjp(lambda x, w: multiply(x, w, ("embed", "mlp")), x, w)
        return y, *back(dy)

    given = ((2, 512, 192), jnp.bfloat16), ((192, 256), jnp.float32), ((2, 512, 256), jnp.bfloat16)
    program = jax.jit(all_three).lower(*(jax.ShapeDtypeStruct(*one) for one in given)).compile().as_text()
    types = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", program)) | dict(re.findall(r"([\w.-]+): (\w+)\[", program))
    factors = re.findall(r" dot\(%?([\w.-]+), %?([\w.-]+)\)", program)
    assert len(factors) == 3 and {types[name] for pair in factors for name in pair} == {"bf16"}


def test_dropout_zeroes_the_adapters_input_and_scales_what_stays():
    lora = LoraConfig(rank=64, alpha=128.0, dropout=0.25, targets=("v_proj",))
    layer = Linear(64, ("embed", "heads"), lora, name="v_proj")
    eye, x = jnp.eye(64), jax.random.uniform(jax.random.key(0), (100, 64), minval=1.0, maxval=2.0)
    variables = {"params": {"kernel": 5 * eye}, "lora": {"a": eye, "b": eye}}
    np.testing.assert_allclose(layer.apply(variables, x), 5 * x + 2 * x, rtol=1e-6)
    delta = layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)}) - 5 * x
    kept = np.asarray(delta > 0.1)
    np.testing.assert_allclose(delta, np.where(kept, 2 * x / 0.75, 0), atol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)


def test_dropout_differs_between_layers_and_keys(checkpoint):
    _, model, params, adapters = adapted(checkpoint, ("q_proj",))
    model = Llama(model.config, LoraConfig(rank=4, dropout=0.5, targets=("q_proj",)))
    tokens = np.arange(20).reshape(2, 10)
    positions = np.broadcast_to(np.arange(10), tokens.shape)

    @partial(jax.jit, static_argnums=1)
    def apply(key: jax.Array, deterministic: bool) -> jax.Array:
        variables = {"params": params, "lora": adapters}
        return model.apply(variables, tokens, positions, deterministic=deterministic, rngs={"dropout": key})[0]

    def logits(key: int | None) -> np.ndarray:
        return np.asarray(apply(jax.random.key(key or 0), key is None))

    np.testing.assert_array_equal(logits(1), logits(1))
    assert not np.allclose(logits(1), logits(2)) and not np.allclose(logits(1), logits(None))
