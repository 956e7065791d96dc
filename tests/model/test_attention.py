"""The cache: calls in pieces, on rows of different lengths behind a shared prefix, equal one call on everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.attention import Cache, visible
from jaxcrystal.model.llama import Llama, initialize

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
PREFIX, LENGTHS = 6, np.array([11, 4, 7, 1])


@pytest.fixture(scope="module")
def variables():
    drawn = initialize(Llama(CONFIG), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
    # Initial weights are so small that attention is nearly uniform; larger ones make a wrong mask visible.
    return jax.tree.map(lambda x: 3 * x, drawn)


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "unrolled"])
def llama(variables, request):
    model = Llama(dataclasses.replace(CONFIG, scan_layers=request.param))
    return jax.jit(lambda *args, **kwargs: model.apply(variables, *args, **kwargs))


def sequences() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 64, (4, 20))
    tokens[:, :PREFIX] = tokens[0, :PREFIX]
    return tokens


def positions(tokens: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


def cached(llama, tokens: np.ndarray, room: int = 0, chunk: int = 11) -> tuple[Cache, np.ndarray]:
    """A shared prefix, then one call on padded rows whose `lengths` are then set to what each row really has."""
    where = positions(tokens)
    empty = Cache.empty(CONFIG, batch=1, tail=PREFIX + room)
    _, prefix = llama(tokens[:1, :PREFIX], where[:1, :PREFIX], cache=empty)
    cache = prefix.as_prefix(batch=len(tokens), tail=16)
    logits, cache = llama(tokens[:, PREFIX : PREFIX + chunk], where[:, PREFIX : PREFIX + chunk], cache=cache)
    np.testing.assert_array_equal(cache.lengths, chunk)
    return cache.replace(lengths=jnp.array(LENGTHS)), logits


@pytest.mark.parametrize("room", [0, 5], ids=["exact prefix", "prefix with room"])
def test_rows_of_different_lengths_equal_the_uncached_forward(llama, room):
    tokens = sequences()
    full = np.asarray(llama(tokens, positions(tokens))[0])
    cache, logits = cached(llama, tokens, room)
    np.testing.assert_allclose(logits, full[:, PREFIX : PREFIX + 11], atol=1e-5)
    rows = np.arange(4)
    for _ in range(3):
        at = PREFIX + np.asarray(cache.lengths)
        logits, cache = llama(tokens[rows, at][:, None], at[:, None], cache=cache)
        np.testing.assert_allclose(logits[:, 0], full[rows, at], atol=1e-5)
    at = (PREFIX + np.asarray(cache.lengths))[:, None] + np.arange(2)  # two tokens in one call
    logits, cache = llama(tokens[rows[:, None], at % 20], at, cache=cache)
    np.testing.assert_allclose(logits[1:], full[rows[1:, None], at[1:]], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + 5)


def test_a_row_does_not_depend_on_the_others(llama):
    tokens = sequences()
    others = tokens.copy()
    others[1:, PREFIX:] = (others[1:, PREFIX:] + 1) % 64
    results = []
    for batch in (tokens, others):
        cache, _ = cached(llama, batch)
        at = PREFIX + LENGTHS
        results.append(np.asarray(llama(batch[np.arange(4), at][:, None], at[:, None], cache=cache)[0]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert (np.abs(results[0][1:] - results[1][1:]).max(axis=(1, 2)) > 1e-3).all()


def test_forgotten_entries_are_never_read(llama):
    """What a slot engine relies on when it gives a row to the next crystal: lengths 0, and old entries are nothing."""
    tokens = sequences()
    cache, _ = cached(llama, tokens)
    cache = cache.replace(lengths=jnp.zeros(4, jnp.int32))
    poisoned = cache.replace(keys=cache.keys + 100, values=cache.values - 100)
    at = np.full((4, 1), PREFIX)
    first, second = (llama(tokens[:, PREFIX : PREFIX + 1], at, cache=c)[0] for c in (cache, poisoned))
    np.testing.assert_array_equal(first, second)


def test_the_prefix_is_stored_once():
    prefix = Cache.empty(CONFIG, batch=1, tail=6).as_prefix(batch=50, tail=4)
    assert prefix.prefix_keys.shape == (3, 2, 6, 8) and prefix.keys.shape == (3, 50, 2, 4, 8)
    with pytest.raises(ValueError, match="one row"):
        Cache.empty(CONFIG, batch=2, tail=6).as_prefix(batch=3, tail=4)
    with pytest.raises(ValueError, match="no prefix itself"):
        Cache.empty(CONFIG, batch=1, tail=6, prefix=2).as_prefix(batch=3, tail=4)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"attention": "splash"}], ids=str)
def test_what_training_chooses_does_not_change_decoding(variables, changes):
    """Checkpoints and kernels: calls on a cache are compiled to as many operations, and give the same bits."""
    tokens = sequences()
    results = []
    for config in (CONFIG, dataclasses.replace(CONFIG, **changes)):
        call = jax.jit(Llama(config).apply).lower(
            variables, tokens[:, :3], positions(tokens)[:, :3], cache=Cache.empty(CONFIG, 4, 5)
        )
        program = call.compile()
        found = program(variables, tokens[:, :3], positions(tokens)[:, :3], cache=Cache.empty(CONFIG, 4, 5))
        results.append((program.cost_analysis()["flops"], *jax.tree.leaves(found)))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_cache_has_the_dtype_asked_for():
    assert Cache.empty(CONFIG, 1, 2).keys.dtype == jnp.float32
    assert Cache.empty(dataclasses.replace(CONFIG, dtype="bfloat16"), 1, 2).keys.dtype == jnp.bfloat16
    assert Cache.empty(CONFIG, 1, 2, dtype=jnp.bfloat16).keys.dtype == jnp.bfloat16


def test_visible_is_causal_within_segments():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(visible(5, segments)[0], np.array(expected, bool))
    with pytest.raises(ValueError, match="exclude each other"):
        visible(5, segments, Cache.empty(CONFIG, 1, 5))
