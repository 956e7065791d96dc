"""Cross-entropy of the next token, over the tokens that count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from jaxcrystal.crystals.writer import Rows


def next_token_loss(
    logits: Float32[Array, "rows length vocab"], rows: Rows
) -> tuple[Float32[Array, ""], Int[Array, ""]]:
    """Sum of -log p(token t+1 | tokens up to t) in nats over counted targets, and how many there are.

    A target counts if its `loss_mask` says so and it belongs to the same crystal as the token before it: the first
    token of a crystal is never predicted from the end of another.
    """
    targets = rows.tokens[:, 1:]
    counted = rows.loss_mask[:, 1:] & (rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] > 0)
    log_probability = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(log_probability, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, chosen, 0.0)), counted.sum()
