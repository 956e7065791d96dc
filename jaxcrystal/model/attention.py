"""Attention of tokens to the tokens of their own row, of their own segment, up to themselves.

What is written here is the reference; `model.attention_kernels` takes its place where it can, and `model.cache` where
a row also attends to what it has read in earlier calls.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxcrystal.model import attention_kernels, cache
from jaxcrystal.model.attention_blocks import blocks
from jaxcrystal.model.cache import Cache


@struct.dataclass
class View:
    """What each token of a call may attend to, in the form that the implementation takes."""

    implementation: attention_kernels.Implementation = struct.field(pytree_node=False)
    mask: Bool[Array, "#batch time time"] | None = None  #: for xla, and for cudnn where there are segments
    segments: Int[Array, "batch time"] | None = None  #: for blocks and splash
    cache: Cache | None = None  #: whose entries come before the tokens of the call, whatever the implementation

    @classmethod
    def of(
        cls,
        implementation: attention_kernels.Implementation,
        time: int,
        segments: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
    ) -> View:
        """Of `time` tokens, causally, within equal `segments` (None: one segment a row) or behind a cache."""
        if cache is not None:
            if segments is not None:
                raise ValueError("a cache holds one sequence a row: segments and cache exclude each other")
            return cls(implementation, cache=cache)
        if implementation in ("blocks", "splash"):
            return cls(implementation, segments=segments)
        if implementation == "cudnn" and segments is None:
            return cls(implementation)
        return cls(implementation, mask=visible(time, segments))


def visible(time: int, segments: Int[Array, "batch time"] | None = None) -> Bool[Array, "#batch time time"]:
    """Which tokens of its row each token may attend to: causally within equal segment ids; padding (0) sees padding."""
    mask = jnp.tril(jnp.ones((1, time, time), bool))
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])


def attend(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    view: View,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over this call's tokens (arXiv 1706.03762, equation 1), and over `layer` of a cache.

    Heads are grouped (arXiv 2305.13245): query head h reads key head h // (heads / kv_heads). Scores and softmax are
    float32.
    """
    if view.cache is not None:
        return cache.attend(queries, keys, values, view.cache, layer)
    if view.implementation == "blocks":
        return blocks(queries, keys, values, view.segments)
    if view.implementation == "splash":
        return attention_kernels.splash(queries, keys, values, view.segments)
    if view.implementation == "cudnn":
        return attention_kernels.cudnn(queries, keys, values, view.mask)
    shape = queries.shape
    queries = queries.reshape(*shape[:2], keys.shape[2], -1, shape[3])
    scores = jnp.einsum("btkgd,bskd->bkgts", queries, keys, preferred_element_type=jnp.float32) * shape[3] ** -0.5
    scores = jnp.where(view.mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    output = jnp.einsum("bkgts,bskd->btkgd", weights, values, preferred_element_type=jnp.float32)
    return output.astype(queries.dtype).reshape(shape)
