"""Logits against transformers' torch LLaMA, and that neither scanning nor the mesh changes them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, RopeScaling
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, abstract_variables, initialize
from jaxcrystal.model.rotary import rotary_frequencies
from jaxcrystal.weights.checkpoint_map import load_hf

LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
ONE = MeshConfig(1, 1, 1)


def draw_tokens(vocab: int, batch: int = 2, time: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, vocab, (batch, time), dtype=np.int32)
    return tokens, np.broadcast_to(np.arange(time, dtype=np.int32), (batch, time))


def torch_logits(model: transformers.LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest logit."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def random_changes(seed: int) -> dict:
    """A random shape: grouped or not, tied or not, any theta and scaling, heads of any width."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([2, 4, 6]))
    theta = float(rng.uniform(50, 1e6))
    scaling = [dict(rope_type="default"), dict(rope_type="linear", factor=float(rng.uniform(1, 8))), LLAMA3]
    return dict(
        hidden_size=heads * int(rng.choice([6, 10, 16])),
        intermediate_size=int(rng.choice([24, 56])),
        num_hidden_layers=int(rng.integers(1, 5)),
        num_attention_heads=heads,
        num_key_value_heads=int(rng.choice([k for k in (1, 2, 3, 4, 6) if heads % k == 0])),
        head_dim=int(rng.choice([4, 10, 16])),
        rms_norm_eps=float(rng.choice([1e-6, 1e-2])),
        tie_word_embeddings=bool(rng.integers(2)),
        rope_parameters={"rope_theta": theta, **scaling[rng.integers(3)]},
    )


NAMED = {
    "mha": dict(num_key_value_heads=4),
    "gqa": dict(num_key_value_heads=2),
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "odd theta": dict(rope_parameters=dict(rope_type="default", rope_theta=1234.5)),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0)),
    "llama3": dict(rope_parameters=dict(LLAMA3, rope_theta=500.0)),
    "wide heads": dict(head_dim=24),
    "large eps": dict(rms_norm_eps=0.1),
} | {f"random {seed}": random_changes(seed) for seed in range(8)}


@pytest.mark.parametrize("name", NAMED)
def test_logits_equal_transformers(name, checkpoint):
    theirs, directory = checkpoint(**NAMED[name])
    config, params = load_hf(directory, make_mesh(ONE))
    tokens, positions = draw_tokens(config.vocab_size)
    expected = torch_logits(theirs, tokens)
    for scan in (True, False):
        model = Llama(dataclasses.replace(config, scan_layers=scan))
        logits, cache = jax.jit(model.apply)({"params": params}, tokens, positions)
        assert cache is None and logits.dtype == jnp.float32
        assert relative(logits, expected) < 1e-4
        assert np.abs(expected).max() > 1  # or the comparison would say little


@pytest.mark.parametrize("theta", [50.0, 1e4, 5e5])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rotary_frequencies_equal_transformers(kind, theta):
    scaling = {key: LLAMA3[key] for key in LLAMA3 if kind == "llama3" or key == "factor"} | {"rope_type": kind}
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=1, rope_parameters=scaling | {"rope_theta": theta}
    )
    expected, _ = ROPE_INIT_FUNCTIONS[kind](theirs)
    found = rotary_frequencies(
        dataclasses.replace(TINY, head_dim=128, rope_theta=theta, rope_scaling=RopeScaling(**scaling))
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=5e-7)
    plain = rotary_frequencies(dataclasses.replace(TINY, head_dim=128, rope_theta=theta))
    ratio = plain / found
    if kind == "llama3":  # all three bands occur
        assert ratio[0] == 1 and ratio[-1] == pytest.approx(4) and ((ratio > 1.01) & (ratio < 3.99)).any()


def test_bfloat16_is_as_close_as_transformers_in_bfloat16(checkpoint):
    """Stated: within 3 % of the largest logit; torch's own bfloat16 differs from float32 by as much."""
    ours, theirs = [], []
    for seed in range(4):
        model, directory = checkpoint(seed=seed, std=0.1, hidden_size=64, num_hidden_layers=4)
        config, params = load_hf(directory, make_mesh(ONE), dtype=jnp.bfloat16)
        tokens, positions = draw_tokens(config.vocab_size, seed=seed)
        expected = torch_logits(model, tokens)
        half = Llama(dataclasses.replace(config, dtype="bfloat16"))
        logits, _ = jax.jit(half.apply)({"params": params}, tokens, positions)
        assert logits.dtype == jnp.float32
        ours.append(relative(logits, expected))
        theirs.append(relative(torch_logits(model.to(torch.bfloat16), tokens), expected))
    assert 1e-4 < max(ours) < 0.03
    assert np.mean(ours) < 1.25 * np.mean(theirs)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 2), (8, 1, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_mesh_gives_the_same_logits(sizes, tied, checkpoint):
    theirs, directory = checkpoint(tie_word_embeddings=tied)
    tokens, positions = draw_tokens(96, batch=8)
    expected = torch_logits(theirs, tokens)
    mesh = make_mesh(MeshConfig(*sizes))
    config, params = load_hf(directory, mesh)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    _, fsdp, tensor = sizes
    assert kernel.addressable_shards[0].data.shape == (3, 32 // fsdp, 48 // tensor)
    with jax.set_mesh(mesh):
        tokens, positions = jax.device_put((tokens, positions), batch_sharding(mesh))
        logits, _ = jax.jit(Llama(config).apply)({"params": params}, tokens, positions)
    assert relative(logits, expected) < 1e-5
    rows, _, vocab = logits.addressable_shards[0].data.shape
    assert (rows, vocab) == (8 // (sizes[0] * fsdp), 96 // tensor)


def test_unrolled_layers_are_not_a_loop():
    variables = initialize(Llama(TINY), jax.random.key(0), make_mesh(ONE))
    tokens, positions = draw_tokens(64)

    def program(scan: bool) -> str:
        model = Llama(dataclasses.replace(TINY, scan_layers=scan, attention="xla"))  # blocks are a loop themselves
        return jax.jit(model.apply).lower(variables, tokens, positions).as_text()

    assert "while" in program(True) and "while" not in program(False)


def test_packed_rows_equal_their_sequences_alone():
    model = Llama(TINY)
    variables = initialize(model, jax.random.key(0), make_mesh(ONE))
    lengths = [7, 12, 5]
    tokens, _ = draw_tokens(64, batch=1, time=sum(lengths) + 4)
    positions = np.concatenate([np.arange(n) for n in [*lengths, 4]])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 4])[None]
    apply = jax.jit(model.apply)
    packed, _ = apply(variables, tokens, positions, segments)
    assert np.isfinite(packed).all()
    start = 0
    for n in lengths:
        alone, _ = apply(variables, tokens[:, start : start + n], np.arange(n)[None])
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-6)
        start += n


def test_what_layers_add_is_dropped(monkeypatch):
    """Each number that attention or feed-forward adds: 0 with the probability stated, else enlarged by its inverse."""
    model = Llama(dataclasses.replace(TINY, dropout=0.4, attention="xla", scan_layers=False))
    variables = initialize(model, jax.random.key(0), make_mesh(ONE))
    tokens, positions = draw_tokens(64, batch=8, time=48)
    seen = []
    dropped = nn.Dropout.__call__

    def record(self, x, deterministic):
        y = dropped(self, x, deterministic)
        jax.debug.callback(lambda x, y: seen.append((np.array(x), np.array(y))), x, y)
        return y

    monkeypatch.setattr(nn.Dropout, "__call__", record)
    model.apply(variables, tokens, positions, deterministic=False, rngs={"dropout": jax.random.key(1)})
    jax.effects_barrier()
    assert len(seen) == 2 * TINY.num_hidden_layers
    for x, y in seen:
        kept = y != 0
        np.testing.assert_allclose(y[kept], x[kept] / 0.6, rtol=1e-6)
        assert abs(kept.mean() - 0.6) < 0.02
    masks = [(y != 0).ravel() for _, y in seen]
    assert all((a != b).mean() > 0.4 for i, a in enumerate(masks) for b in masks[:i])  # each of its own


def test_hidden_and_head_are_the_whole():
    model = Llama(TINY)
    variables = initialize(model, jax.random.key(0), make_mesh(ONE))
    tokens, positions = draw_tokens(64)
    hidden, _ = model.apply(variables, tokens, positions, method="hidden")
    logits = model.apply(variables, hidden, method="logits")
    np.testing.assert_array_equal(logits, model.apply(variables, tokens, positions)[0])


def test_initial_values_depend_on_the_key_alone():
    model = Llama(TINY, LoraConfig())
    one = initialize(model, jax.random.key(0), make_mesh(ONE))
    eight = initialize(model, jax.random.key(0), make_mesh(MeshConfig(2, 2, 2)))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    only = initialize(model, jax.random.key(0), make_mesh(ONE), ["lora"])
    jax.tree.map(np.testing.assert_array_equal, {"lora": one["lora"]}, only)
    other = initialize(model, jax.random.key(1), make_mesh(ONE))
    kernel = one["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel, other["params"]["layers"]["mlp"]["up_proj"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])


def test_parameters_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"params/embed_tokens/embedding.*'vocab' of size 63.*tensor of size 2"):
        abstract_variables(Llama(dataclasses.replace(TINY, vocab_size=63)), make_mesh(MeshConfig(1, 1, 2)))
