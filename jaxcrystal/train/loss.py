"""Cross-entropy of the next token, over the tokens that count, without the logits of all tokens.

    hidden  │ block 0 │ block 1 │ block 2 │ ...      [rows, length, embed], cut along the length
                 │ head
    logits  │ block 0 │                              [rows, block, vocab] in float32: one block at a time
                 │
    loss    │ block 0 │ + its gradient               where a gradient will be asked for

A block's gradient is taken while its logits are there, so that they are made once and none is kept: backward only
multiplies by what came from above. Blocks are cut from the length and not from the vocabulary: then every device keeps
its own rows and its own part of the vocabulary, as the mesh divides them, and the softmax over a vocabulary needs no
running correction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxcrystal.crystals.writer import Rows
from jaxcrystal.mesh import ShardingRules
from jaxcrystal.model.llama import project


def next_token_loss(
    hidden: Float[Array, "rows length embed"],
    head: Float[Array, "embed vocab"],
    rows: Rows,
    block: int,
    rules: ShardingRules,
    pieces: int,
) -> tuple[Float32[Array, ""], Int[Array, ""]]:
    """Sum of -log p(token t+1 | tokens up to t) in nats over counted targets, and how many there are.

    `hidden` and `head` are those of `Llama`; logits exist for `block` tokens of each row at a time, and columns of
    the head beyond the vocabulary's `pieces` have none. A target counts if its `loss_mask` says so and it belongs to
    the same crystal as the token before it: the first token of a crystal is never predicted from the end of another.
    """
    block = min(block, hidden.shape[1])
    segments = rows.segments
    counted = rows.loss_mask[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)

    def cut(x: Array, fill: int) -> Array:
        """[rows, length, ...] -> [blocks, rows, block, ...]; the last block is filled."""
        missing = -x.shape[1] % block
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
        return rules.constrain(jnp.moveaxis(x, 1, 0), None, "batch")

    def nats(
        hidden: Float[Array, "rows block embed"],
        head: Float[Array, "embed vocab"],
        targets: Int[Array, "rows block"],
        counted: Bool[Array, "rows block"],
    ) -> Float32[Array, ""]:
        """The loss of one block."""
        logits = project(hidden, head, rules, pieces)
        # A sum over the vocabulary, and no look-up: each device adds what its part of the vocabulary holds.
        chosen = jnp.sum(jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0.0), axis=-1)
        return jnp.sum(jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0))

    @jax.custom_vjp
    def total(hidden: Array, head: Array, targets: Array, counted: Array) -> Float32[Array, ""]:
        add = lambda sum, part: (sum + nats(part[0], head, *part[1:]), None)  # noqa: E731
        return jax.lax.scan(add, jnp.float32(0), (hidden, targets, counted))[0]

    def forward(hidden: Array, head: Array, targets: Array, counted: Array) -> tuple[Array, tuple[Array, Array]]:
        def add(sums: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
            loss, (d_hidden, d_head) = jax.value_and_grad(nats, (0, 1))(part[0], head, *part[1:])
            return (sums[0] + loss, sums[1] + d_head), d_hidden

        nothing = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)  # the compiler drops d_head of a frozen head
        (loss, d_head), d_hidden = jax.lax.scan(add, nothing, (hidden, targets, counted))
        return loss, (d_hidden, d_head.astype(head.dtype))

    def backward(gradients: tuple[Array, Array], d_loss: Float32[Array, ""]) -> tuple[Array, Array, None, None]:
        d_hidden, d_head = (x * d_loss.astype(x.dtype) for x in gradients)
        return d_hidden, d_head, None, None

    total.defvjp(forward, backward)
    last = ((0, 0), (0, 1))  # nothing follows a row's last token
    targets, counted_here = jnp.pad(rows.tokens[:, 1:], last), jnp.pad(counted, last)
    return total(cut(hidden, 0), head, cut(targets, 0), cut(counted_here, False)), counted.sum()
