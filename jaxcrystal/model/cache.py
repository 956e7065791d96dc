"""Keys and values of tokens already seen, and attention to them.

    what a row attends to:   its prompt, in blocks   │  its own tail, in blocks      │  the tokens of this call
                             ▓▓▓▓ ▓▓··               │  ▓▓▓▓ ▓▓▓▓ ▓▓·· ····          │  ▓ ▓
                             stored once, whoever    │  only blocks in which there   │  causally
                             follows it              │  is something are read        │

Each block is summed with a softmax of its own, and the parts are joined at the end (arXiv 2205.14135, section 3.1), so
nothing is copied together. Rows are of very different lengths when each begins a crystal as soon as its last one is
done; so the blocks that hold something, of all rows, are put in one list, and a loop goes through it, some at a time.
What a row costs depends on its own prompt and tail, not on how many prompts there are; a single prompt, which all rows
follow, is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from jaxcrystal.config import LlamaConfig
from jaxcrystal.mesh import ShardingRules

BLOCK = 64  #: tokens of a row's tail that are read together
LEAST_AT_ONCE = 16  #: blocks that are read together, if there are so many

#: The axes of what is stored, as far as they are divided over devices.
PROMPT_AXES, TAIL_AXES = (None, None, None, "kv_heads"), (None, "batch", None, "kv_heads")


@struct.dataclass
class Codes:
    """x ≈ codes · scale, in a quarter of float32's memory: each head of each token has a scale of its own."""

    codes: Int8[Array, "*n head_dim"]
    scale: Float32[Array, "*n"]


Stored = Array | Codes


@struct.dataclass
class Ragged:
    """Tokens of a call of which each row has a number of its own: [tokens, 1] instead of [rows, time]."""

    row: Int[Array, "tokens"]  #: of those on the token's device, counted from 0; padding has numbers that no row has
    offset: Int[Array, "tokens"]  #: among the row's tokens of this call
    count: Int[Array, "rows"]  #: tokens of each row
    width: int = struct.field(pytree_node=False)  #: most tokens of a row

    def grid(self, x: Float[Array, "tokens one *n"], rows: int) -> Float[Array, "rows width *n"]:
        """Row by row, 0 where a row has no more tokens."""
        nothing = jnp.zeros((rows, self.width, *x.shape[2:]), x.dtype)
        return nothing.at[self.row, self.offset].set(x[:, 0], mode="drop")

    def flat(self, x: Float[Array, "rows width *n"]) -> Float[Array, "tokens one *n"]:
        """Token by token again."""
        return x.at[self.row, self.offset].get(mode="clip")[:, None]


@struct.dataclass
class Cache:
    """Keys and values of every layer: of prompts that rows share, and of what each row has read itself.

    A call on T tokens appends T entries to the tail of each row, behind that row's own `lengths`. A caller that wants
    a row to forget some of them (padding, a finished row) lowers its `lengths`; what lies beyond is never read.
    """

    prompt_keys: Stored  #: [layers, prompts, blocks, kv_heads, BLOCK, head_dim]
    prompt_values: Stored
    prompt_lengths: Int[Array, "prompts"]
    keys: Stored  #: [layers, rows, blocks, kv_heads, BLOCK, head_dim]
    values: Stored
    lengths: Int[Array, "rows"]  #: entries of each row's tail
    prompt: Int[Array, "rows"]  #: which of the prompts a row follows
    ragged: Ragged | None = None  #: how the tokens of the next call lie, if not as [rows, time]

    @classmethod
    def empty(
        cls,
        config: LlamaConfig,
        rows: int,
        tail: int,
        prompts: int = 1,
        room: int = 0,
        dtype: DTypeLike | None = None,
    ) -> Cache:
        """Room for `prompts` of up to `room` tokens, and for a `tail` of so many tokens behind each of `rows`.

        Both are rounded up to whole blocks. `dtype` is that of the config by default; int8 stores `Codes`.
        """
        layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        dtype = jnp.dtype(dtype or config.dtype)

        def nothing(*shape: int) -> Stored:
            entries = jnp.zeros((*shape, width), dtype)
            return Codes(entries, jnp.zeros(shape, jnp.float32)) if dtype == jnp.int8 else entries

        shared = (layers, prompts, whole_blocks(room), heads, BLOCK)
        own = (layers, rows, whole_blocks(tail), heads, BLOCK)
        return cls(
            nothing(*shared),
            nothing(*shared),
            jnp.zeros(prompts, jnp.int32),
            nothing(*own),
            nothing(*own),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
        )

    def with_prompt(self, number: Int[Array, ""], read: Cache) -> Cache:
        """With the tail of `read`, a cache of one row that has as many blocks as a prompt has room, as prompt `number`.

        Rows that follow another prompt are not touched.
        """

        def put(stored: Array, tail: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(stored, tail, number, axis=1)

        return self.replace(
            prompt_keys=jax.tree.map(put, self.prompt_keys, read.keys),
            prompt_values=jax.tree.map(put, self.prompt_values, read.values),
            prompt_lengths=self.prompt_lengths.at[number].set(read.lengths[0]),
        )

    @property
    def positions(self) -> Int[Array, "rows"]:
        """Of each row's next token."""
        return self.prompt_lengths[self.prompt] + self.lengths

    def append(
        self,
        keys: Float[Array, "layers rows time kv_heads head_dim"],
        values: Float[Array, "layers rows time kv_heads head_dim"],
        rules: ShardingRules,
    ) -> Cache:
        """With these entries behind each row's tail. Entries that the tail has no room for are lost: reserve enough."""
        ragged = self.ragged

        def own(
            tail: tuple[Stored, Stored], lengths: Array, ragged: Ragged | None, new: tuple[Array, Array]
        ) -> tuple[Stored, Stored]:
            layers, rows, time, heads, _ = new[0].shape
            row, offset = jnp.arange(rows)[:, None, None], jnp.arange(time)[:, None]
            if ragged is not None:
                row, offset = (x[:, None, None] for x in (ragged.row, ragged.offset))
            at = lengths.at[row].get(mode="clip") + offset
            # Every index is said, also those that are all of an axis: TPUs copy the whole tail otherwise.
            where = (
                jnp.arange(layers)[:, None, None, None],
                row,
                at // BLOCK,
                jnp.arange(heads),
                at % BLOCK,
            )
            return jax.tree.map(
                lambda x, y: x.at[where].set(y, mode="drop", unique_indices=True),
                tail,
                tuple(_stored(x, like) for x, like in zip(new, tail, strict=True)),
            )

        # A masked value is multiplied by 0, but 0 · NaN is NaN: a row's next sequence must not find one.
        new = (keys, jnp.where(jnp.isfinite(values), values, 0))
        written = (None, "batch", None, "kv_heads")
        inputs = (TAIL_AXES, ("batch",), _by_token(ragged), written)
        own = _on_each_device(own, rules, len(self.lengths), inputs, TAIL_AXES)
        tail = own((self.keys, self.values), self.lengths, ragged, new)
        lengths = self.lengths + (keys.shape[2] if ragged is None else ragged.count)
        return self.replace(keys=tail[0], values=tail[1], lengths=lengths, ragged=None)


def whole_blocks(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


@struct.dataclass
class Part:
    """A softmax over some of the entries, before it is divided by its total."""

    highest: Float32[Array, "*n kv_heads group time"]  #: score; the lowest number that there is where none is visible
    total: Float32[Array, "*n kv_heads group time"]  #: Σ exp(score - highest)
    output: Float32[Array, "*n kv_heads group time head_dim"]  #: Σ exp(score - highest) · value


def attend(
    queries: Float[Array, "rows time heads head_dim"],
    keys: Float[Array, "rows time kv_heads head_dim"],
    values: Float[Array, "rows time kv_heads head_dim"],
    cache: Cache,
    layer: Int[Array, ""],
    rules: ShardingRules,
) -> Float[Array, "rows time heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over the row's prompt, its tail and its tokens of this call, these causally.

    Heads are grouped (arXiv 2305.13245): query head h reads key head h // (heads / kv_heads). Scores and sums are
    float32; a row's result does not depend on what other rows are or how long they are.
    """
    shape = queries.shape

    def own(queries: Array, keys: Array, values: Array, cache: Cache, layer: Array) -> Array:
        rows, ragged = len(cache.lengths), cache.ragged
        if ragged is not None:
            # 0 · NaN is NaN: a token that is masked, behind another of the same call, must not hold one. What is no
            # number stays so in the token's own residual stream.
            values = jnp.where(jnp.isfinite(values), values, 0)
            queries, keys, values = (ragged.grid(x, rows) for x in (queries, keys, values))
        time = queries.shape[1]
        now = _part(
            queries,
            *(jnp.moveaxis(x, 1, 2) for x in (keys, values)),
            visible=jnp.tril(jnp.ones((time, time), bool))[None],
        )
        prompt, tail = (cache.prompt_keys, cache.prompt_values), (cache.keys, cache.values)
        if len(cache.prompt_lengths) == 1:
            before = _shared(queries, prompt, layer, cache.prompt_lengths[0])
        else:
            before = _listed(queries, prompt, layer, cache.prompt, cache.prompt_lengths[cache.prompt])
        parts = [before, _listed(queries, tail, layer, jnp.arange(rows), cache.lengths)]
        parts = jax.tree.map(lambda *x: jnp.concatenate([*x[:2], x[2][:, None]], axis=1), *parts, now)
        share = jnp.exp(parts.highest - parts.highest.max(1, keepdims=True))
        output = (share[..., None] * parts.output).sum(1) / (share * parts.total).sum(1)[..., None]
        output = jnp.moveaxis(output, 3, 1).astype(queries.dtype)  # [rows, time, kv_heads, group, head_dim]
        return output if ragged is None else ragged.flat(output)

    heads = ("batch", None, "kv_heads")
    entries = Cache(
        prompt_keys=PROMPT_AXES,
        prompt_values=PROMPT_AXES,
        prompt_lengths=(None,),
        keys=TAIL_AXES,
        values=TAIL_AXES,
        lengths=("batch",),
        prompt=("batch",),
        ragged=_by_token(cache.ragged),
    )
    own = _on_each_device(own, rules, len(cache.lengths), (heads, heads, heads, entries, ()), heads)
    queries = queries.reshape(*shape[:2], keys.shape[2], -1, shape[3])
    return own(queries, keys, values, cache, layer).reshape(shape)


def _by_token(ragged: Ragged | None) -> Ragged | None:
    """The axes of what says how tokens lie."""
    return jax.tree.map(lambda _: ("batch",), ragged)


def _shared(
    queries: Float[Array, "rows time kv_heads group head_dim"],
    entries: tuple[Stored, Stored],
    layer: Int[Array, ""],
    length: Int[Array, ""],
) -> Part:
    """The part of the one prompt that there is, [rows, 1, ...]."""

    def joined(x: Array) -> Array:
        """[kv_heads, blocks · BLOCK, ...]"""
        x = jnp.moveaxis(x[layer, 0], 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    keys, values = jax.tree.map(joined, entries)
    blocks = jax.tree.leaves(entries)[0].shape[2]
    part = _part(queries, keys, values, visible=(jnp.arange(blocks * BLOCK) < length)[None, None], axes="ksd")
    return jax.tree.map(lambda x: x[:, None], part)


def _listed(
    queries: Float[Array, "rows time kv_heads group head_dim"],
    entries: tuple[Stored, Stored],
    layer: Int[Array, ""],
    owner: Int[Array, "rows"],
    lengths: Int[Array, "rows"],
) -> Part:
    """The part of each block that a row attends to, [rows, blocks, ...]; blocks that hold nothing have no weight.

    `owner` says whose entries those of a row are: its own, in the tail, or those of its prompt; `lengths`, how many.
    """
    rows, blocks = len(owner), jax.tree.leaves(entries)[0].shape[2]
    at_once = min(rows * blocks, max(LEAST_AT_ONCE, rows // 4))
    listed = jnp.arange(-(-rows * blocks // at_once) * at_once)
    filled = whole_blocks(lengths)
    ends = jnp.cumsum(filled)
    first = ends - filled
    row = jnp.minimum(jnp.searchsorted(ends, listed, side="right", method="compare_all"), rows - 1)
    block = jnp.clip(listed - first[row], 0, blocks - 1)

    def read(turn: Array, parts: Part) -> Part:
        start = turn * at_once
        r, b = (jax.lax.dynamic_slice_in_dim(x, start, at_once) for x in (row, block))
        keys, values = jax.tree.map(lambda x: x[layer, owner[r], b], entries)
        written = b[:, None] * BLOCK + jnp.arange(BLOCK) < lengths[r][:, None]
        part = _part(queries[r], keys, values, visible=written[:, None])
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), parts, part)

    _, time, heads, group, width = queries.shape
    zero = jnp.zeros((len(listed), heads, group, time), jnp.float32)
    nothing = Part(zero, zero, jnp.zeros((*zero.shape, width), jnp.float32))
    parts = jax.lax.fori_loop(0, -(-ends[-1] // at_once), read, nothing)
    there = jnp.arange(blocks) < filled[:, None]

    def of_rows(x: Float32[Array, "listed *n"], instead: float) -> Float32[Array, "rows blocks *n"]:
        """Behind a row's last block lies another's, which may hold what is no number."""
        own = there.reshape(rows, blocks, *[1] * (x.ndim - 1))
        return jnp.where(own, x[first[:, None] + jnp.arange(blocks)], instead)

    return Part(of_rows(parts.highest, _lowest), of_rows(parts.total, 0), of_rows(parts.output, 0))


_lowest = float(jnp.finfo(jnp.float32).min)


def _part(
    queries: Float[Array, "n time kv_heads group head_dim"],
    keys: Stored,
    values: Stored,
    visible: Bool[Array, "#n #time entries"],
    axes: str = "bksd",
) -> Part:
    """Of keys and values with these axes: without b they are the same for all."""

    def product(pattern: str, x: Array, y: Stored) -> Float32[Array, "..."]:
        y = y.codes if isinstance(y, Codes) else y
        return jnp.einsum(pattern, x, y.astype(x.dtype), preferred_element_type=jnp.float32)

    def scaled(x: Float32[Array, "n kv_heads group time entries"], y: Stored) -> Float32[Array, "..."]:
        return x * y.scale[..., None, None, :] if isinstance(y, Codes) else x

    scores = scaled(product(f"btkgd,{axes}->bkgts", queries, keys), keys) * queries.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, _lowest)
    highest = scores.max(-1, initial=_lowest)
    weights = jnp.exp(scores - highest[..., None])
    order = "bkgtd" if axes == "bksd" else "kbgtd"  # as the product has it: XLA's CPUs know no other in bfloat16
    output = product(f"bkgts,{axes}->{order}", scaled(weights, values).astype(queries.dtype), values)
    return Part(highest, weights.sum(-1), jnp.moveaxis(output, order.index("b"), 0))


def _stored(x: Float[Array, "*n head_dim"], like: Stored) -> Stored:
    """`x` as `like` holds it."""
    if not isinstance(like, Codes):
        return x.astype(like.dtype)
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return Codes(codes.astype(jnp.int8), scale)


def _on_each_device(
    f: Callable[..., Any], rules: ShardingRules, rows: int, inputs: Any, outputs: Any
) -> Callable[..., Any]:
    """`f`, of which each device of the mesh that is set computes its own rows and heads and asks no other device.

    `inputs` and `outputs` name the axes of the arrays; all of a subtree may be named at once. Rows that the mesh does
    not divide are computed on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    divided = rows % rules.parts(mesh, "batch") == 0

    def spec(names: tuple[str | None, ...]) -> jax.sharding.PartitionSpec:
        return rules.spec([None if name == "batch" and not divided else name for name in names])

    def is_names(x: Any) -> bool:
        return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)

    inputs, outputs = (jax.tree.map(spec, x, is_leaf=is_names) for x in (inputs, outputs))
    # check_vma: a loop's first carry does not vary over devices, and its later ones do.
    return jax.shard_map(f, in_specs=inputs, out_specs=outputs, check_vma=False)
