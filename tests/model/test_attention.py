"""The cache: calls in pieces, on rows of different lengths behind a shared prefix, equal one call on everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.attention import View, visible
from jaxcrystal.model.cache import BLOCK, Cache
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
FOLLOWED = [1, 0, 1, 0]  #: the prompt of each row
PREFIX = np.array([6, 70, 6, 70])  #: tokens of it
LENGTHS = np.array([11, 64, 67, 1])  #: tokens of each row behind it


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
    """Rows that follow one prompt begin alike."""
    tokens = np.random.default_rng(0).integers(0, 64, (4, 160))
    tokens[2, : PREFIX[0]], tokens[3, : PREFIX[1]] = tokens[0, : PREFIX[0]], tokens[1, : PREFIX[1]]
    return tokens


def positions(tokens: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


PAGES = {1: [4, 0], 0: [2, 3]}  #: of the pool, that hold each prompt


def with_prompt(llama, cache: Cache, number: int, prompt: np.ndarray) -> Cache:
    """Reads a prompt in calls of a block each, the last one padded."""
    tokens = np.zeros((1, len(PAGES[number]) * BLOCK), np.int32)
    tokens[0, : len(prompt)] = prompt
    for block, page in enumerate(PAGES[number]):
        cache = cache.with_prompt(jnp.int32(number), jnp.array(PAGES[number]), jnp.int32(len(prompt)))
        if block * BLOCK < len(prompt):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            reader = cache.reader(jnp.int32(number), jnp.int32(block))
            _, reader = llama(tokens[:, part], np.arange(part.start, part.stop)[None], cache=reader)
            cache = cache.with_page(jnp.int32(page), reader)
    return cache


def cached(llama, tokens: np.ndarray, chunk: int = 11, dtype: str | None = None) -> tuple[Cache, np.ndarray]:
    """Two prompts, then one call on padded rows whose `lengths` are then set to what each row really has."""
    cache = Cache.empty(CONFIG, rows=4, tail=LENGTHS.max() + 8, pages=5, longest=70, dtype=dtype)
    for number, row in ((1, 0), (0, 1)):
        cache = with_prompt(llama, cache, number, tokens[row, : PREFIX[row]])
    cache = cache.replace(prompt=jnp.array(FOLLOWED))
    np.testing.assert_array_equal(cache.positions, PREFIX)
    at = PREFIX[:, None] + np.arange(chunk)
    logits, cache = llama(np.take_along_axis(tokens, at, 1), at, cache=cache)
    np.testing.assert_array_equal(cache.lengths, chunk)
    return cache.replace(lengths=jnp.array(np.minimum(LENGTHS, chunk))), logits


@pytest.mark.parametrize("chunk", [LENGTHS.max(), 11], ids=["one call", "token by token"])
def test_rows_of_different_lengths_equal_the_uncached_forward(llama, chunk):
    """Behind two prompts, one of them longer than a block; tails end within, at the end of and behind a block."""
    tokens = sequences()
    full = np.asarray(llama(tokens, positions(tokens))[0])
    cache, logits = cached(llama, tokens, chunk)
    rows = np.arange(4)
    np.testing.assert_allclose(logits, full[rows[:, None], PREFIX[:, None] + np.arange(chunk)], atol=1e-5)
    steps = 3 if chunk > 11 else LENGTHS.max() - 11
    before = np.asarray(cache.lengths)
    for _ in range(steps):
        at = np.asarray(cache.positions)
        logits, cache = llama(tokens[rows, at][:, None], at[:, None], cache=cache)
        np.testing.assert_allclose(logits[:, 0], full[rows, at], atol=1e-5)
    at = np.asarray(cache.positions)[:, None] + np.arange(2)  # two tokens in one call
    logits, cache = llama(tokens[rows[:, None], at], at, cache=cache)
    np.testing.assert_allclose(logits, full[rows[:, None], at], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, before + steps + 2)


def test_a_row_does_not_depend_on_the_others(llama):
    tokens = sequences()
    others = tokens.copy()
    others[1, PREFIX[1] :] = (others[1, PREFIX[1] :] + 1) % 64
    others[3, PREFIX[3] :] = (others[3, PREFIX[3] :] + 1) % 64
    results = []
    for batch, lengths in ((tokens, LENGTHS), (others, LENGTHS), (tokens, [LENGTHS[0], 70, LENGTHS[2], 0])):
        cache, _ = cached(llama, batch, LENGTHS.max())
        cache = cache.replace(lengths=jnp.array(lengths))
        at = np.asarray(cache.positions)
        results.append(np.asarray(llama(batch[np.arange(4), at][:, None], at[:, None], cache=cache)[0]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0][[0, 2]], other[[0, 2]])
        assert (np.abs(results[0][[1, 3]] - other[[1, 3]]).max(axis=(1, 2)) > 1e-3).all()


def test_forgotten_entries_are_never_read(llama):
    """What a slot engine relies on when it gives a row to the next crystal: lengths 0, and old entries are nothing."""
    tokens = sequences()
    cache, _ = cached(llama, tokens)
    cache = cache.replace(lengths=jnp.array([0, 3, 0, 0]))
    poisoned = cache.replace(
        keys=cache.keys.at[:, [0, 2, 3]].set(jnp.nan), values=cache.values.at[:, [0, 2, 3]].add(-100)
    )
    at = np.asarray(cache.positions)[:, None]
    first, second = (llama(np.take_along_axis(tokens, at, 1), at, cache=c)[0] for c in (cache, poisoned))
    np.testing.assert_array_equal(first, second)


def test_what_is_no_number_stays_in_its_row(llama):
    """The next sequence of the row must not meet it, nor must another row, whichever lies behind it in memory."""
    tokens = sequences()
    cache, _ = cached(llama, tokens)
    at = np.asarray(cache.positions)[:, None]
    expected, _ = llama(np.take_along_axis(tokens, at, 1), at, cache=cache)
    spoilt = cache.replace(values=cache.values.at[:, 2, 0, :, 1].set(jnp.nan))
    found, after = llama(np.take_along_axis(tokens, at, 1), at, cache=spoilt)
    others = np.array([0, 1, 3])
    assert np.isnan(found[2]).all()
    np.testing.assert_array_equal(found[others], expected[others])
    assert np.isfinite(after.values[:, 2, 0, :, 11]).all()  # what the row appended when all was lost


def test_a_call_of_more_tokens_than_a_block_behind_a_begun_one(llama):
    """Of 70 tokens behind 1 or 11: they fill the begun block, and what is behind it begins with the right one."""
    tokens = sequences()
    full = np.asarray(llama(tokens, positions(tokens))[0])
    cache, _ = cached(llama, tokens)
    at = np.asarray(cache.positions)[:, None] + np.arange(70)
    logits, _ = llama(np.take_along_axis(tokens, at, 1), at, cache=cache)
    np.testing.assert_allclose(logits, full[np.arange(4)[:, None], at], atol=1e-5)


def test_what_is_no_number_is_not_met_by_tokens_before_it_in_the_call(llama, variables):
    """The last of three tokens has an embedding that is none; the two before it do not see it."""
    tokens = sequences()
    tokens[tokens == 63] = 0
    cache, _ = cached(llama, tokens)
    at = np.asarray(cache.positions)[:, None] + np.arange(3)
    read = np.take_along_axis(tokens, at, 1)
    expected, _ = llama(read, at, cache=cache)
    table = variables["params"]["embed_tokens"]["embedding"].at[63].set(jnp.nan)
    spoilt = {"params": variables["params"] | {"embed_tokens": {"embedding": table}}}
    read[:, 2] = 63
    found, after = Llama(CONFIG).apply(spoilt, read, at, cache=cache)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-5)
    assert np.isnan(found[:, 2]).all() and np.isfinite(after.values).all()


def test_a_prompt_is_stored_once_and_may_be_replaced(llama):
    empty = Cache.empty(CONFIG, rows=50, tail=4, pages=5, longest=65)
    assert empty.prompt_keys.shape == (3, 5, 2, BLOCK, 8) and empty.keys.shape == (3, 50, 1, 2, BLOCK, 8)
    first, second = sequences()[0, :6], sequences()[1, :70]
    other = with_prompt(llama, empty, 0, second)
    both = with_prompt(llama, with_prompt(llama, other, 1, first), 1, second)
    np.testing.assert_array_equal(both.prompt_lengths, [70, 70, 0, 0, 0])
    for pool, before in ((both.prompt_keys, other.prompt_keys), (both.prompt_values, other.prompt_values)):
        np.testing.assert_array_equal(pool[:, PAGES[0]], before[:, PAGES[0]])  # the other prompt's are as they were
        np.testing.assert_array_equal(pool[:, PAGES[1]], pool[:, PAGES[0]])
        assert not pool[:, 1].any()


def test_an_int8_cache_is_near_the_exact_one_and_a_quarter_of_it(llama):
    tokens = sequences()
    exact, expected = cached(llama, tokens)
    cache, logits = cached(llama, tokens, dtype="int8")
    assert cache.keys.codes.dtype == jnp.int8 and cache.keys.scale.shape == cache.keys.codes.shape[:-1]
    for name in ("keys", "values"):
        stored, true = (np.asarray(x, np.float64) for x in (getattr(cache, name).codes, getattr(exact, name)))
        scale = np.asarray(getattr(cache, name).scale)[..., None]
        written = np.zeros(true.shape, bool)
        written[0, :, 0, :, :11] = True  # layers above have read what is already rounded
        assert (np.abs(stored * scale - true) <= 0.5001 * scale)[written].all() and (scale[written[..., :1]] > 0).all()
    at = np.asarray(cache.positions)[:, None]
    step, _ = llama(np.take_along_axis(tokens, at, 1), at, cache=cache)
    true, _ = llama(np.take_along_axis(tokens, at, 1), at, cache=exact)
    spread = np.std(true)
    for a, b in ((logits, expected), (step, true)):
        off = np.asarray(a) - b
        assert 0 < np.std(off) < 0.02 * spread and np.abs(off).max() < 0.1 * spread


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
    assert Cache.empty(CONFIG, 1, 2, dtype="int8").values.codes.dtype == jnp.int8


def test_visible_is_causal_within_segments():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(visible(5, segments)[0], np.array(expected, bool))
    with pytest.raises(ValueError, match="exclude each other"):
        View.of("xla", 5, segments, Cache.empty(CONFIG, 1, 5))
