"""Attention of queries to their own row's tokens, and to keys and values that are remembered from earlier calls.

    what a row attends to:   | prefix, one for all rows | its own tail, written so far | the tokens of this call |
    number of entries:       | P, prefix_length valid   | S, lengths[row] valid        | T, causally             |

The three parts share one softmax but are never joined in memory: the prefix is not copied for each row, and the tail
is written once, after all layers have read it.

Where there is no cache, `model.attention_kernels` takes the place of what is written here, which stays its reference.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxcrystal.config import LlamaConfig
from jaxcrystal.mesh import ShardingRules
from jaxcrystal.model import attention_kernels
from jaxcrystal.model.attention_blocks import blocks

#: What one layer reads of a cache: keys and values of the prefix, keys and values of the tails.
Past = tuple[Array, Array, Array, Array]


@struct.dataclass
class Cache:
    """Keys and values of every layer for tokens already seen.

    A call on T tokens appends T entries to the tail of each row, behind that row's own `lengths`. A caller that wants
    a row to forget some of them (padding, a finished row) lowers its `lengths`; what lies beyond is never read.
    """

    prefix_keys: Float[Array, "layers kv_heads prefix head_dim"]
    prefix_values: Float[Array, "layers kv_heads prefix head_dim"]
    prefix_length: Int[Array, ""]
    keys: Float[Array, "layers batch kv_heads tail head_dim"]
    values: Float[Array, "layers batch kv_heads tail head_dim"]
    lengths: Int[Array, " batch"]

    @classmethod
    def empty(
        cls, config: LlamaConfig, batch: int, tail: int, prefix: int = 0, dtype: DTypeLike | None = None
    ) -> Cache:
        """Room for `prefix` shared entries, and `tail` in each of `batch` rows, by default in the config's dtype."""
        dtype = dtype or config.dtype
        layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        shared = jnp.zeros((layers, heads, prefix, width), dtype)
        own = jnp.zeros((layers, batch, heads, tail, width), dtype)
        return cls(shared, shared, jnp.int32(0), own, own, jnp.zeros(batch, jnp.int32))

    def as_prefix(self, batch: int, tail: int) -> Cache:
        """The one row of this cache as the prefix that `batch` rows share, each with an empty tail."""
        layers, rows, heads, _, width = self.keys.shape
        if rows != 1 or self.prefix_keys.shape[2]:
            raise ValueError("a prefix is made from a cache of one row that has no prefix itself")
        own = jnp.zeros((layers, batch, heads, tail, width), self.keys.dtype)
        lengths = jnp.zeros(batch, jnp.int32)
        return Cache(self.keys[:, 0], self.values[:, 0], self.lengths[0], own, own, lengths)

    @property
    def layers(self) -> Past:
        """What all layers read, each array with its leading layer axis."""
        return self.prefix_keys, self.prefix_values, self.keys, self.values

    def append(
        self,
        keys: Float[Array, "layers batch time kv_heads head_dim"],
        values: Float[Array, "layers batch time kv_heads head_dim"],
    ) -> Cache:
        """With these entries behind each row's tail. Entries that the tail has no room for are lost: reserve enough."""
        rows = jnp.arange(keys.shape[1])[:, None]
        slots = self.lengths[:, None] + jnp.arange(keys.shape[2])
        where = (slice(None), rows, slice(None), slots)  # advanced indices around a slice: [batch, time, layers, ...]
        keys, values = (jnp.moveaxis(x, 0, 2) for x in (keys, values))
        # A masked value is multiplied by 0, but 0 · NaN is NaN: a row's next sequence must not find one.
        values = jnp.where(jnp.isfinite(values), values, 0)
        return self.replace(
            keys=self.keys.at[where].set(keys.astype(self.keys.dtype), mode="drop", unique_indices=True),
            values=self.values.at[where].set(values.astype(self.values.dtype), mode="drop", unique_indices=True),
            lengths=self.lengths + keys.shape[1],
        )


@struct.dataclass
class View:
    """What each token of a call may attend to, in the form that the implementation asks for."""

    implementation: attention_kernels.Implementation = struct.field(pytree_node=False)
    mask: Bool[Array, "#batch time attended"] | None = None  #: for xla, and for cudnn where there are segments
    segments: Int[Array, "batch time"] | None = None  #: for blocks and splash

    @classmethod
    def of(
        cls,
        implementation: attention_kernels.Implementation,
        time: int,
        segments: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
    ) -> View:
        """Of `time` tokens, causally, within equal `segments` (None: one segment a row) or behind a cache."""
        if implementation in ("blocks", "splash"):
            return cls(implementation, segments=segments)
        if implementation == "cudnn" and segments is None:
            return cls(implementation)
        return cls(implementation, mask=visible(time, segments, cache))


def visible(
    time: int, segments: Int[Array, "batch time"] | None = None, cache: Cache | None = None
) -> Bool[Array, "#batch time attended"]:
    """Which entries each token may attend to, in the order prefix, tail, this call.

    Tokens of one row see each other causally and within equal segment ids; padding (0) thus sees padding only.
    """
    mask = jnp.tril(jnp.ones((1, time, time), bool))
    if segments is not None:
        mask &= segments[:, :, None] == segments[:, None, :]
    if cache is None:
        return mask
    if segments is not None:
        raise ValueError("a cache holds one sequence a row: segments and cache exclude each other")
    batch, tail = cache.keys.shape[1], cache.keys.shape[3]
    prefix = jnp.arange(cache.prefix_keys.shape[2]) < cache.prefix_length
    written = jnp.arange(tail) < cache.lengths[:, None]
    past = jnp.concatenate([jnp.broadcast_to(prefix, (batch, len(prefix))), written], axis=1)
    past = jnp.broadcast_to(past[:, None], (batch, time, past.shape[1]))
    return jnp.concatenate([past, jnp.broadcast_to(mask, (batch, time, time))], axis=2)


def attend(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    view: View,
    rules: ShardingRules,
    past: Past | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over prefix, tail and this call's tokens (arXiv 1706.03762, equation 1).

    Heads are grouped (arXiv 2305.13245): query head h reads key head h // (heads / kv_heads). `past` is one layer of
    `Cache.layers`, and `view` is of the same cache. Scores and softmax are float32.
    """
    if view.implementation == "blocks":
        return blocks(queries, keys, values, view.segments)
    if view.implementation == "splash":
        return attention_kernels.splash(queries, keys, values, view.segments, rules)
    if view.implementation == "cudnn":
        return attention_kernels.cudnn(queries, keys, values, view.mask)
    shape = queries.shape
    queries = queries.reshape(*shape[:2], keys.shape[2], -1, shape[3])
    parts = [("bskd", keys, values)]
    if past is not None:
        prefix_keys, prefix_values, tail_keys, tail_values = past
        parts = [("ksd", prefix_keys, prefix_values), ("bksd", tail_keys, tail_values), *parts]

    def product(pattern: str, x: Array, y: Array) -> Array:
        return jnp.einsum(pattern, x, y.astype(x.dtype), preferred_element_type=jnp.float32)

    scores = jnp.concatenate([product(f"btkgd,{axes}->bkgts", queries, k) for axes, k, _ in parts], axis=-1)
    scores = jnp.where(view.mask[:, None, None], scores * shape[3] ** -0.5, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    output, start = 0.0, 0
    for axes, _, v in parts:
        end = start + v.shape[axes.index("s")]
        output += product(f"bkgts,{axes}->btkgd", weights[..., start:end], v)
        start = end
    return output.astype(queries.dtype).reshape(shape)
