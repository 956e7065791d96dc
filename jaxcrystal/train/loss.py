"""Cross-entropy of the next token, over the tokens that count, without the logits of all tokens.

    hidden  │ block 0 │ block 1 │ block 2 │ ...      [rows, length, embed], cut along the length
                 │ head
    logits  │ block 0 │                              [rows, block, vocab] in float32: one block at a time

Backward computes a block's logits again, so that no more than one block ever exists; that is one product with the
head more. Blocks are cut from the length and not from the vocabulary: then every device keeps its own rows and its
own part of the vocabulary, as the mesh divides them, and the softmax over a vocabulary needs no running correction.
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
) -> tuple[Float32[Array, ""], Int[Array, ""]]:
    """Sum of -log p(token t+1 | tokens up to t) in nats over counted targets, and how many there are.

    `hidden` and `head` are those of `Llama`; logits exist for `block` tokens of each row at a time. A target counts if
    its `loss_mask` says so and it belongs to the same crystal as the token before it: the first token of a crystal is
    never predicted from the end of another.
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

    def add(
        total: Float32[Array, ""],
        part: tuple[Float[Array, "rows block embed"], Int[Array, "rows block"], Bool[Array, "rows block"]],
    ) -> tuple[Float32[Array, ""], None]:
        hidden, targets, counted = part
        logits = project(hidden, head, rules)
        # A sum over the vocabulary, and no look-up: each device adds what its part of the vocabulary holds.
        chosen = jnp.sum(jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0.0), axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.sum(jnp.where(counted, nats, 0.0)), None

    last = ((0, 0), (0, 1))  # nothing follows a row's last token
    parts = (cut(hidden, 0), cut(jnp.pad(rows.tokens[:, 1:], last), 0), cut(jnp.pad(counted, last), False))
    total, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.float32(0), parts)
    return total, counted.sum()
