"""Keys and values of tokens already seen, in pages of BLOCK tokens, and attention to them.

    what a row attends to:   its prompt's pages         │  its own tail, in blocks, of which the last has its tokens
                             ▓▓▓▓ ▓▓··                  │  ▓▓▓▓ ▓▓▓▓ ▓▓▒▒ ····          of this call ▒ in their places
                             taken from a pool, stored  │  only blocks in which there
                             once, whoever follows it   │  is something are read

One online softmax (arXiv 2205.14135, section 3.1) goes through the pages of the prompt, which a block table lists, and
the blocks of the tail, a block at a time, so nothing is copied together. A token of this call stands in its block as it
will be stored there: what a token attends to is summed up in the same order, to the last bit, whether those before it
came in the same call or in an earlier one. Rows are of very different lengths when each begins a crystal as soon as its
last one is done; so rows of like lengths go together, some at a time, as far as the longest of them needs. What a row
costs depends on its own prompt and tail, not on how many prompts there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int8

from jaxcrystal.config import LlamaConfig
from jaxcrystal.mesh import parts, spec
from jaxcrystal.model.online_softmax import Softmax

BLOCK = 64  #: tokens of a row's tail that are read together
LEAST_AT_ONCE = 16  #: rows that read a block together, if there are so many

#: Scopes of the loops whose trips depend on how much rows have read, in the metadata of a compiled program.
PROMPT_LOOP, TAIL_LOOP, BEGUN_LOOP = "prompt_blocks", "tail_blocks", "begun_blocks"

#: The axes of what is stored, as far as they are divided over devices.
POOL_AXES, TAIL_AXES = (None, None, "kv_heads"), (None, "batch", None, "kv_heads")


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

    prompt_keys: Stored  #: [layers, pages, kv_heads, BLOCK, head_dim]; a pool
    prompt_values: Stored
    prompt_pages: Int[Array, "prompts blocks"]  #: the block table: which pages of the pool hold a prompt, in order
    prompt_lengths: Int[Array, "prompts"]  #: tokens of each prompt
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
        pages: int = 1,
        longest: int = BLOCK,
        dtype: DTypeLike | None = None,
    ) -> Cache:
        """Room for a `tail` of so many tokens behind each of `rows`, and a pool of `pages` for prompts of up to
        `longest` tokens, as many at most as there are pages.

        Tails and prompts are rounded up to whole blocks. `dtype` is that of the config by default; int8 stores `Codes`.
        """
        layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        dtype = jnp.dtype(dtype or config.dtype)

        def nothing(*shape: int) -> Stored:
            entries = jnp.zeros((*shape, width), dtype)
            return Codes(entries, jnp.zeros(shape, jnp.float32)) if dtype == jnp.int8 else entries

        pool = (layers, pages, heads, BLOCK)
        own = (layers, rows, whole_blocks(tail), heads, BLOCK)
        return cls(
            nothing(*pool),
            nothing(*pool),
            jnp.zeros((pages, whole_blocks(longest)), jnp.int32),
            jnp.zeros(pages, jnp.int32),
            nothing(*own),
            nothing(*own),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.int32),
        )

    def with_prompt(self, number: Int[Array, ""], pages: Int[Array, "blocks"], length: Int[Array, ""]) -> Cache:
        """With a prompt of so many tokens in these pages of the pool as prompt `number`; see `reader` for how they come
        there. What `pages` says beyond the prompt's last block is never read."""
        return self.replace(
            prompt_pages=self.prompt_pages.at[number].set(pages),
            prompt_lengths=self.prompt_lengths.at[number].set(length),
        )

    def reader(self, number: Int[Array, ""], block: Int[Array, ""]) -> Cache:
        """One row, that follows prompt `number` as far as `block`, and has room for the tokens of that block."""

        def nothing(pool: Array) -> Array:
            return jnp.zeros((pool.shape[0], 1, 1, *pool.shape[2:]), pool.dtype)

        return self.replace(
            prompt_lengths=self.prompt_lengths.at[number].set(block * BLOCK),
            keys=jax.tree.map(nothing, self.prompt_keys),
            values=jax.tree.map(nothing, self.prompt_values),
            lengths=jnp.zeros(1, jnp.int32),
            prompt=number[None],
        )

    def with_page(self, page: Int[Array, ""], read: Cache) -> Cache:
        """With what a `reader` has read as this page of the pool."""

        def put(pool: Array, tail: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(pool, tail[:, 0], page, axis=1)

        return self.replace(
            prompt_keys=jax.tree.map(put, self.prompt_keys, read.keys),
            prompt_values=jax.tree.map(put, self.prompt_values, read.values),
        )

    @property
    def positions(self) -> Int[Array, "rows"]:
        """Of each row's next token."""
        return self.prompt_lengths[self.prompt] + self.lengths

    def append(
        self,
        keys: Float[Array, "layers rows time kv_heads head_dim"],
        values: Float[Array, "layers rows time kv_heads head_dim"],
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

        new = (keys, _finite(values))
        written = (None, "batch", None, "kv_heads")
        inputs = (TAIL_AXES, ("batch",), _by_token(ragged), written)
        own = _on_each_device(own, len(self.lengths), inputs, TAIL_AXES)
        tail = own((self.keys, self.values), self.lengths, ragged, new)
        lengths = self.lengths + (keys.shape[2] if ragged is None else ragged.count)
        return self.replace(keys=tail[0], values=tail[1], lengths=lengths, ragged=None)


def whole_blocks(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def attend(
    queries: Float[Array, "rows time heads head_dim"],
    keys: Float[Array, "rows time kv_heads head_dim"],
    values: Float[Array, "rows time kv_heads head_dim"],
    cache: Cache,
    layer: Int[Array, ""],
) -> Float[Array, "rows time heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v over the row's prompt, its tail and its tokens of this call, these causally.

    Heads are grouped (arXiv 2305.13245): query head h reads key head h // (heads / kv_heads). Scores and sums are
    float32; a row's result does not depend on what other rows are or how long they are, nor on how its tokens are
    divided into calls of one shape.
    """
    shape = queries.shape

    def own(queries: Array, keys: Array, values: Array, cache: Cache, layer: Array) -> Array:
        rows, ragged = len(cache.lengths), cache.ragged
        values = _finite(values)
        if ragged is not None:
            queries, keys, values = (ragged.grid(x, rows) for x in (queries, keys, values))
        pool, tail = (cache.prompt_keys, cache.prompt_values), (cache.keys, cache.values)
        new = _stored(keys, cache.keys), _stored(values, cache.values)

        def chunk(row: Int[Array, "n"]) -> Float32[Array, "n kv_heads group time head_dim"]:
            """Of some rows, everything."""
            own_queries, own_new = jax.tree.map(lambda x: x[row], (queries, new))
            pages, known = cache.prompt_pages[cache.prompt[row]], cache.prompt_lengths[cache.prompt[row]]
            whole, begun = (x[:, None] for x in jnp.divmod(cache.lengths[row], BLOCK))
            token = begun + jnp.arange(queries.shape[1])  # of this call, counted from the block that is begun

            def begun_block(number: Int[Array, ""]) -> tuple[Stored, Stored]:
                """Of each row, counted from the one that is begun: with what this call adds."""
                at = token - number * BLOCK
                at = jnp.where(at < 0, BLOCK, at)  # such an index would count from the end; this one is dropped
                each = jnp.arange(len(row))[:, None]
                entries = _at(tail, layer, row, whole[:, 0] + number)
                return jax.tree.map(lambda x, y: x.at[each, :, at].set(y, mode="drop"), entries, own_new)

            softmax = Softmax.of_nothing(*jnp.moveaxis(own_queries, 1, 3).shape)
            with jax.named_scope(PROMPT_LOOP):
                softmax = _through(softmax, own_queries, lambda i: _at(pool, layer, pages[:, i]), known[:, None])
            with jax.named_scope(TAIL_LOOP):
                softmax = _through(softmax, own_queries, lambda i: _at(tail, layer, row, i), whole * BLOCK)
            with jax.named_scope(BEGUN_LOOP):
                return _through(softmax, own_queries, begun_block, token + 1).output

        at_once = min(rows, max(LEAST_AT_ONCE, rows // 4))
        by_length = jnp.argsort(-whole_blocks(cache.lengths))
        listed = jnp.arange(-(-rows // at_once) * at_once)  # the last chunk is filled up with the shortest row
        output = jax.lax.map(chunk, by_length[jnp.minimum(listed, rows - 1)].reshape(-1, at_once))
        output = output.reshape(-1, *output.shape[2:])[jnp.argsort(by_length)]
        output = jnp.moveaxis(output, 3, 1).astype(queries.dtype)  # [rows, time, kv_heads, group, head_dim]
        return output if ragged is None else ragged.flat(output)

    heads = ("batch", None, "kv_heads")
    entries = Cache(
        prompt_keys=POOL_AXES,
        prompt_values=POOL_AXES,
        prompt_pages=(None,),
        prompt_lengths=(None,),
        keys=TAIL_AXES,
        values=TAIL_AXES,
        lengths=("batch",),
        prompt=("batch",),
        ragged=_by_token(cache.ragged),
    )
    own = _on_each_device(own, len(cache.lengths), (heads, heads, heads, entries, ()), heads)
    queries = queries.reshape(*shape[:2], keys.shape[2], -1, shape[3])
    return own(queries, keys, values, cache, layer).reshape(shape)


def _by_token(ragged: Ragged | None) -> Ragged | None:
    """The axes of what says how tokens lie."""
    return jax.tree.map(lambda _: ("batch",), ragged)


def _at(entries: tuple[Stored, Stored], *index: Int[Array, "..."]) -> tuple[Stored, Stored]:
    return jax.tree.map(lambda x: x[index], entries)


def _through(
    softmax: Softmax,
    queries: Float[Array, "n time kv_heads group head_dim"],
    read: Callable[[Int[Array, ""]], tuple[Stored, Stored]],
    lengths: Int[Array, "n #time"],
) -> Softmax:
    """`softmax`, and so many entries of the blocks behind it, of which `read` gives each row's keys and values: [n,
    kv_heads, BLOCK, head_dim]."""

    def product(pattern: str, x: Array, y: Stored) -> Float32[Array, "..."]:
        y = y.codes if isinstance(y, Codes) else y
        return jnp.einsum(pattern, x, y.astype(x.dtype), preferred_element_type=jnp.float32)

    def scaled(x: Float32[Array, "n kv_heads group time entries"], y: Stored) -> Float32[Array, "..."]:
        return x * y.scale[..., None, None, :] if isinstance(y, Codes) else x

    def further(block: Int[Array, ""], softmax: Softmax) -> Softmax:
        keys, values = read(block)
        visible = block * BLOCK + jnp.arange(BLOCK) < lengths[..., None]
        scores = scaled(product("btkgd,bksd->bkgts", queries, keys), keys) * queries.shape[-1] ** -0.5
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
        both = softmax.over(
            scores, lambda weights: product("bkgts,bksd->bkgtd", scaled(weights, values).astype(queries.dtype), values)
        )
        # A row that has no such block is given another's, which may hold nan.
        there = visible[:, None, None, :, 0]
        return jax.tree.map(
            lambda x, y: jnp.where(there.reshape(*there.shape, *[1] * (x.ndim - 4)), x, y), both, softmax
        )

    return jax.lax.fori_loop(0, whole_blocks(lengths.max()), further, softmax)


def _finite(values: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """A masked value is multiplied by 0, but 0 · NaN is NaN: no other token, and no later sequence of the row, may find
    one. A nan stays in the token's own residual stream."""
    return jnp.where(jnp.isfinite(values), values, 0)


def _stored(x: Float[Array, "*n head_dim"], like: Stored) -> Stored:
    """`x` as `like` holds it."""
    if not isinstance(like, Codes):
        return x.astype(like.dtype)
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return Codes(codes.astype(jnp.int8), scale)


def _on_each_device(f: Callable[..., Any], rows: int, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`f`, of which each device of the mesh that is set computes its own rows and heads, without collectives.

    `inputs` and `outputs` name the axes of the arrays; all of a subtree may be named at once. Rows that the mesh does
    not divide are computed on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    divided = rows % parts(mesh, "batch") == 0

    def places(names: tuple[str | None, ...]) -> jax.sharding.PartitionSpec:
        return spec([None if name == "batch" and not divided else name for name in names])

    def is_names(x: Any) -> bool:
        return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)

    inputs, outputs = (jax.tree.map(places, x, is_leaf=is_names) for x in (inputs, outputs))
    # check_vma: a loop's first carry does not vary over devices, and its later ones do.
    return jax.shard_map(f, in_specs=inputs, out_specs=outputs, check_vma=False)
