"""Attention on any platform that never keeps its [time, time] weights: XLA's own products, block by block.

    queries  │ block 0 │ block 1 │ block 2 │        each block of queries against no key that follows it: of the square
    keys     │ 0       │ 0 1     │ 0 1 2   │        of weights, little more than the half that causality leaves

Forward keeps the logarithm of each softmax's sum; backward makes a block's weights from it again (arXiv 2205.14135).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128  #: queries that are taken at a time


def blocks(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    segments: Int[Array, "batch time"] | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Causal attention within equal segments."""
    if segments is None:
        segments = jnp.ones(queries.shape[:2], jnp.int32)
    grouped = queries.reshape(*queries.shape[:2], keys.shape[2], -1, queries.shape[3])
    queries, keys, values = jnp.einsum("btkgd->bkgtd", grouped), jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    return jnp.einsum("bkgtd->btkgd", _blocks(queries, keys, values, segments)).reshape(
        *segments.shape, -1, grouped.shape[4]
    )


def _spans(time: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, time)) for start in range(0, time, BLOCK)]


def _product(pattern: str, x: Array, y: Array) -> Array:
    return jnp.einsum(pattern, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _scores(queries: Array, keys: Array, segments: Array, start: int, end: int) -> Array:
    """Of queries start:end to the keys before `end`: no other comes before one of them."""
    seen = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    seen &= segments[:, start:end, None] == segments[:, None, :end]
    scores = _product("bkgtd,bksd->bkgts", queries[..., start:end, :], keys[..., :end, :]) * keys.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)


@jax.custom_vjp
def _blocks(
    queries: Float[Array, "b k g t d"], keys: Float[Array, "b k t d"], values: Float[Array, "b k t d"], segments: Array
) -> Float[Array, "b k g t d"]:
    """Forward keeps the logarithm of each softmax's sum; backward makes the weights from it again, block by block."""
    return _blocks_forward(queries, keys, values, segments)[0]


def _blocks_forward(queries: Array, keys: Array, values: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    outputs, log_sums = [], []
    for start, end in _spans(queries.shape[-2]):
        scores = _scores(queries, keys, segments, start, end)
        log_sum = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        outputs.append(_product("bkgts,bksd->bkgtd", jnp.exp(scores - log_sum), values[..., :end, :]))
        log_sums.append(log_sum)
    output = jnp.concatenate(outputs, axis=-2).astype(queries.dtype)
    return output, (queries, keys, values, segments, output, jnp.concatenate(log_sums, axis=-2))


def _blocks_backward(kept: tuple[Array, ...], d_output: Array) -> tuple[Array, Array, Array, None]:
    """arXiv 2205.14135, appendix B.2: Σ weights · d_weights of a query is the scalar product of output and d_output."""
    queries, keys, values, segments, output, log_sums = kept
    shares = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1, keepdims=True)
    d_queries = []
    d_keys, d_values = (jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    for start, end in _spans(queries.shape[-2]):
        own, before = (..., slice(start, end), slice(None)), (..., slice(end), slice(None))
        weights = jnp.exp(_scores(queries, keys, segments, start, end) - log_sums[own])
        d_values = d_values.at[before].add(_product("bkgts,bkgtd->bksd", weights, d_output[own]))
        d_weights = _product("bkgtd,bksd->bkgts", d_output[own], values[before])
        d_scores = weights * (d_weights - shares[own]) * keys.shape[-1] ** -0.5
        d_queries.append(_product("bkgts,bksd->bkgtd", d_scores, keys[before]))
        d_keys = d_keys.at[before].add(_product("bkgts,bkgtd->bksd", d_scores, queries[own]))
    d_queries = jnp.concatenate(d_queries, axis=-2)
    return d_queries.astype(queries.dtype), d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)
