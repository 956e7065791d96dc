"""Attention on any platform that never keeps its [time, time] weights: XLA's own products, block by block.

    queries  │ block 0 │ block 1 │ block 2 │ block 3 │
    keys     │ 0       │ 0 1     │   1 2   │     2 3 │    no key that follows, and no block of other segments before

A block of queries meets one block of keys after the other, from the first that holds one of its segments, under a
softmax that is kept up to date (`online_softmax`); backward makes the weights again from the
logarithm of that sum (arXiv 2205.14135). Query heads that share a key head are rows of one product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxcrystal.model.online_softmax import Softmax

BLOCK = 64  #: queries, and keys, that are taken at a time


def blocks(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    segments: Int[Array, "batch time"] | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Causal attention within equal segments."""
    batch, time, heads, width = queries.shape
    kv_heads, size = keys.shape[2], min(BLOCK, time)
    if segments is None:
        segments = jnp.ones((batch, time), jnp.int32)

    def cut(x: Array) -> Array:
        """[batch, time, ...] -> [blocks, batch, size, ...]; the last block is filled with zeros, which follow all."""
        x = jnp.pad(x, ((0, 0), (0, -time % size), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    grouped = jnp.einsum("nbtkgd->nbkgtd", cut(queries.reshape(batch, time, kv_heads, -1, width)))
    merged = grouped.reshape(*grouped.shape[:3], -1, width)
    keys, values = (jnp.swapaxes(cut(x), 2, 3) for x in (keys, values))
    segments = cut(segments)
    output = _blocks(merged, keys, values, segments, first_blocks(segments)).reshape(grouped.shape)
    return jnp.einsum("nbkgtd->bntkgd", output).reshape(batch, -1, heads, width)[:, :time]


def first_blocks(segments: Int[Array, "blocks batch size"]) -> Int[Array, "blocks"]:
    """For each block of queries the first block of keys that may hold one of its segments in some row.

    Blocks are compared by the range of their segments, padding (0) as the last one: exact where segments are numbered
    in order. On several devices it is 0, since each would have to wait for what the others' rows need.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return jnp.zeros(len(segments), jnp.int32)
    ordered = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)
    least, most = ordered.min(axis=-1), ordered.max(axis=-1)
    overlap = (least[:, None] <= most[None]) & (most[:, None] >= least[None])
    return jnp.argmax(overlap.any(axis=-1), axis=1).astype(jnp.int32)


def _product(pattern: str, x: Array, y: Array) -> Array:
    return jnp.einsum(pattern, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _scores(
    queries: Array, keys: Array, query_segments: Array, segments: Array, ahead: Array
) -> Float[Array, "b k gt s"]:
    """Of a block of queries to one of keys, which begins `ahead` tokens before it."""
    size = keys.shape[-2]
    seen = ahead + jnp.arange(size)[:, None] >= jnp.arange(size)
    seen &= query_segments[:, :, None] == segments[:, None, :]
    scores = _product("bkqd,bksd->bkqs", queries, keys) * keys.shape[-1] ** -0.5
    seen = jnp.tile(seen[:, None], (1, 1, scores.shape[-2] // size, 1))
    return jnp.where(seen, scores, jnp.finfo(scores.dtype).min)


@jax.custom_vjp
def _blocks(
    queries: Float[Array, "n b k gt d"],
    keys: Float[Array, "n b k t d"],
    values: Float[Array, "n b k t d"],
    segments: Int[Array, "n b t"],
    first: Int[Array, "n"],
) -> Float[Array, "n b k gt d"]:
    """Forward keeps the logarithm of each softmax's sum; backward makes the weights from it again, block by block."""
    return _blocks_forward(queries, keys, values, segments, first)[0]


def _blocks_forward(queries: Array, keys: Array, values: Array, segments: Array, first: Array) -> tuple[Array, tuple]:
    def of_block(block: tuple[Array, ...]) -> tuple[Array, Array]:
        i, first, query, own = block

        def add(j: Array, softmax: Softmax) -> Softmax:
            scores = _scores(query, keys[j], own, segments[j], (i - j) * keys.shape[-2])
            return softmax.over(scores, lambda weights: _product("bkqs,bksd->bkqd", weights, values[j]))

        # The last block holds each query's own key.
        softmax = lax.fori_loop(first, i + 1, add, Softmax.of_nothing(*query.shape))
        return softmax.output.astype(query.dtype), softmax.log_total[..., None]

    output, log_totals = lax.map(of_block, (jnp.arange(len(queries)), first, queries, segments))
    return output, (queries, keys, values, segments, first, output, log_totals)


def _blocks_backward(kept: tuple[Array, ...], d_output: Array) -> tuple[Array | None, ...]:
    """arXiv 2205.14135, appendix B.2: Σ weights · d_weights of a query is the scalar product of output and d_output."""
    queries, keys, values, segments, first, output, log_totals = kept
    shares = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1, keepdims=True)
    scale = keys.shape[-1] ** -0.5

    def of_block(d_pairs: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        i, first, query, own, d_output, share, log_total = block

        def add(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            d_query, d_keys, d_values = state
            scores = _scores(query, keys[j], own, segments[j], (i - j) * keys.shape[-2])
            weights = jnp.exp(scores - log_total)
            d_values = d_values.at[j].add(_product("bkqs,bkqd->bksd", weights, d_output))
            d_weights = _product("bkqd,bksd->bkqs", d_output, values[j])
            d_scores = weights * (d_weights - share) * scale
            d_keys = d_keys.at[j].add(_product("bkqs,bkqd->bksd", d_scores, query))
            return d_query + _product("bkqs,bksd->bkqd", d_scores, keys[j]), d_keys, d_values

        d_query = jnp.zeros(query.shape, jnp.float32)
        d_query, *d_pairs = lax.fori_loop(first, i + 1, add, (d_query, *d_pairs))
        return tuple(d_pairs), d_query.astype(query.dtype)

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    each = (jnp.arange(len(queries)), first, queries, segments, d_output, shares, log_totals)
    (d_keys, d_values), d_queries = lax.scan(of_block, nothing, each)
    return d_queries, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)
