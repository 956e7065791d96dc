"""Cross-entropy of the next token, over the tokens that count, with logits of these alone, some at a time.

    hidden  │ p p c c c c · p p p c c c c c · · │    [rows, length, embed]: prompts, what is counted, padding
                 │ on one CPU device, counted tokens of each row first
            │ block 0 │ block 1 │ block 2 │          cut along the length
                 │ head      │         └ no logits: nothing in it counts
    logits  │ block 0 │                              [rows, block, vocab] in float32: one block at a time
                 │
    loss    │ block 0 │ + its gradient               where the loss is differentiated

A block's gradient is taken while its logits are there, so that they are made once and none is kept: backward only
multiplies by what came from above. Blocks are cut from the length and not from the vocabulary: then every device keeps
its own rows and its own part of the vocabulary, as the mesh divides them, and the softmax over a vocabulary needs no
running correction. Elsewhere all blocks are computed, as they stand: to leave one out, devices of a mesh would have to
agree on it, and add up the head's gradient in every block instead of once; an accelerator would wait for its host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from jaxcrystal.mesh import constrain, platform
from jaxcrystal.model.llama import HEAD_AXES, project
from jaxcrystal.texts.writer import Rows

T = TypeVar("T")


@struct.dataclass
class Sums:
    """What rows add up to."""

    nats: Float32[Array, ""]  #: -log p(token t+1 | tokens up to t) over counted targets; what is differentiated
    targets: Int[Array, ""]  #: counted targets
    tokens: Int[Array, ""]  #: that are not padding
    crystals: Int[Array, ""]


def next_token_loss(
    hidden: Float[Array, "rows length embed"],
    head: Float[Array, "embed vocab"],
    rows: Rows,
    block: int,
    pieces: int,
) -> Sums:
    """The loss of `rows` and their counts.

    `hidden` and `head` are those of `Llama`; logits exist for `block` tokens of each row at a time, and columns of
    the head beyond the vocabulary's `pieces` have none. A target counts if its `loss_mask` says so and it belongs to
    the same crystal as the token before it: the first token of a crystal is never predicted from the end of another.
    """
    block = min(block, hidden.shape[1])
    alone = jax.sharding.get_abstract_mesh().size <= 1 and platform() == "cpu"
    written, counted = rows.segments > 0, _counted(rows)
    # Counts are added up in the loss's own scan: XLA on CPUs may run an all-reduce that does not depend on the layers'
    # collectives concurrently with these, in another order on each device, which is a deadlock of collectives.
    counts = jnp.stack([counted, written, written & (rows.positions == 0)], axis=-1)
    targets = _after(rows.tokens)
    if alone:
        order = jnp.argsort(~counted, axis=1, stable=True)
        hidden, targets, counts = (_taken(x, order) for x in (hidden, targets, counts))

    def sums(
        hidden: Float[Array, "rows block embed"],
        head: Float[Array, "embed vocab"],
        targets: Int[Array, "rows block"],
        counts: Bool[Array, "rows block 3"],
    ) -> tuple[Float32[Array, ""], Int[Array, "3"]]:
        """Of one block."""
        nats = jnp.where(counts[..., 0], _nats(hidden, head, targets, pieces), 0.0)
        return jnp.sum(nats), counted_up(counts)

    def counted_up(counts: Bool[Array, "rows block 3"]) -> Int[Array, "3"]:
        return jnp.sum(counts, axis=(0, 1), dtype=jnp.int32)

    def unless_empty(compute: Callable[[], T], counts: Bool[Array, "rows block 3"], empty: T) -> T:
        """`empty` for a block in which nothing counts."""
        return jax.lax.cond(counts[..., 0].any(), compute, lambda: empty) if alone else compute()

    nothing = jnp.float32(0), jnp.zeros(3, jnp.int32)

    @jax.custom_vjp
    def total(hidden: Array, head: Array, *parts: Array) -> tuple[Float32[Array, ""], Int[Array, "3"]]:
        def add(sum: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
            found = unless_empty(lambda: sums(part[0], head, *part[1:]), part[2], (nothing[0], counted_up(part[2])))
            return jax.tree.map(jnp.add, sum, found), None

        return jax.lax.scan(add, nothing, (hidden, *parts))[0]

    def forward(hidden: Array, head: Array, *parts: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        def add(sum: tuple[tuple[Array, Array], Array], part: tuple[Array, ...]) -> tuple[tuple, Array]:
            def compute() -> tuple[tuple[tuple[Array, Array], Array], Array]:
                found, (d_hidden, d_head) = jax.value_and_grad(sums, (0, 1), has_aux=True)(part[0], head, *part[1:])
                return jax.tree.map(jnp.add, sum, (found, d_head.astype(jnp.float32))), d_hidden

            counts_only = sum[0][0], sum[0][1] + counted_up(part[2])
            return unless_empty(compute, part[2], ((counts_only, sum[1]), jnp.zeros_like(part[0])))

        start = nothing, jnp.zeros(head.shape, jnp.float32)  # the compiler drops the gradient of a frozen head
        (found, d_head), d_hidden = jax.lax.scan(add, start, (hidden, *parts))
        # Devices add their blocks up, and each other's once behind the loop: without the barrier, in every block.
        d_head = constrain(jax.lax.optimization_barrier(constrain(d_head, None, "vocab")), *HEAD_AXES)
        return found, (d_hidden, d_head.astype(head.dtype))

    def backward(gradients: tuple[Array, Array], d_found: tuple[Array, Array]) -> tuple[Array | None, ...]:
        d_hidden, d_head = (x * d_found[0].astype(x.dtype) for x in gradients)
        return d_hidden, d_head, None, None

    total.defvjp(forward, backward)
    nats, counts = total(_cut(hidden, block), head, _cut(targets, block), _cut(counts, block))
    return Sums(nats, *counts)


def crystal_nats(
    hidden: Float[Array, "rows length embed"],
    head: Float[Array, "embed vocab"],
    rows: Rows,
    slots: int,
    block: int,
    pieces: int,
) -> tuple[Float32[Array, "rows slots"], Int[Array, "rows slots"]]:
    """-log p of the counted tokens of each crystal, and how many they are; of no crystal 0 and 0.

    Which tokens count, and what `block` and `pieces` mean, is as in `next_token_loss`. What a crystal weighs in a loss
    made of this is unknown before all of its tokens are summed: a block's logits are made once more for its gradient.
    """
    block = min(block, hidden.shape[1])
    crystals = jnp.where(_counted(rows), rows.segments, 0)[..., None] == jnp.arange(1, slots + 1)

    def sums(
        hidden: Float[Array, "rows block embed"],
        head: Float[Array, "embed vocab"],
        targets: Int[Array, "rows block"],
        crystals: Bool[Array, "rows block slots"],
    ) -> Float32[Array, "rows slots"]:
        """Of one block."""
        nats = _nats(hidden, head, targets, pieces)
        return constrain(jnp.sum(jnp.where(crystals, nats[..., None], 0.0), axis=1), "batch", None)

    @jax.custom_vjp
    def total(hidden: Array, head: Array, *parts: Array) -> Array:
        def add(sum: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
            return sum + sums(part[0], head, *part[1:]), None

        nothing = constrain(jnp.zeros((hidden.shape[1], slots), jnp.float32), "batch", None)
        return jax.lax.scan(add, nothing, (hidden, *parts))[0]

    def forward(hidden: Array, head: Array, *parts: Array) -> tuple[Array, tuple[Array, ...]]:
        return total(hidden, head, *parts), (hidden, head, *parts)

    def backward(kept: tuple[Array, ...], d_nats: Array) -> tuple[Array | None, ...]:
        hidden, head, *parts = kept

        def add(sum: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
            _, transposed = jax.vjp(lambda hidden, head: sums(hidden, head, *part[1:]), part[0], head)
            d_hidden, d_head = transposed(d_nats)
            return sum + d_head.astype(jnp.float32), d_hidden

        d_head, d_hidden = jax.lax.scan(add, jnp.zeros(head.shape, jnp.float32), (hidden, *parts))
        d_head = constrain(jax.lax.optimization_barrier(constrain(d_head, None, "vocab")), *HEAD_AXES)
        return d_hidden, d_head.astype(head.dtype), None, None

    total.defvjp(forward, backward)
    nats = total(_cut(hidden, block), head, _cut(_after(rows.tokens), block), _cut(crystals, block))
    return nats, jnp.sum(crystals, axis=1, dtype=jnp.int32)


def _after(x: Shaped[Array, "rows length"]) -> Shaped[Array, "rows length"]:
    """What follows each token; nothing follows a row's last one."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _counted(rows: Rows) -> Bool[Array, "rows length"]:
    """Whether the token that follows is a target that counts."""
    return _after(rows.loss_mask & (rows.segments > 0)) & (_after(rows.segments) == rows.segments)


def _nats(
    hidden: Float[Array, "rows block embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "rows block"],
    pieces: int,
) -> Float32[Array, "rows block"]:
    """-log p of each target."""
    logits = project(hidden, head, pieces)
    # A sum over the vocabulary, and no look-up: each device adds what its part of the vocabulary holds.
    chosen = jnp.sum(jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _cut(x: Shaped[Array, "rows length *n"], block: int) -> Shaped[Array, "blocks rows block *n"]:
    """The last block is filled with zeros."""
    missing = -x.shape[1] % block
    x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return constrain(jnp.moveaxis(x, 1, 0), None, "batch")


def _taken(x: Shaped[Array, "rows length *n"], order: Int[Array, "rows length"]) -> Shaped[Array, "rows length *n"]:
    """Each row's tokens in its own order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1, mode="promise_in_bounds")
