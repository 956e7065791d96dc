"""A softmax over keys that come block by block (arXiv 1805.02867): its maximum and its sums are kept up to date."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32


@struct.dataclass
class Softmax:
    """Over the keys so far, of each query; every query must see one in the end."""

    highest: Float32[Array, "*n"]  #: score
    total: Float32[Array, "*n"]  #: Σ exp(score - highest)
    summed: Float32[Array, "*n head_dim"]  #: Σ exp(score - highest) · value

    @classmethod
    def of_nothing(cls, *shape: int) -> Softmax:
        """No key; `shape` is that of the output."""
        nothing = jnp.zeros(shape, jnp.float32)
        none = nothing[..., 0]
        return cls(jnp.full_like(none, jnp.finfo(none.dtype).min), none, nothing)

    def over(
        self,
        scores: Float32[Array, "*n keys"],
        product: Callable[[Float32[Array, "*n keys"]], Float32[Array, "*n head_dim"]],
    ) -> Softmax:
        """And over these keys, of whose values `product` makes the sum with given weights.

        Where all scores are the least number there is and so were all before, the weights are 1: the next factor clears
        them, once a query sees a key.
        """
        highest = jnp.maximum(self.highest, scores.max(-1))
        factor, weights = jnp.exp(self.highest - highest), jnp.exp(scores - highest[..., None])
        summed = self.summed * factor[..., None] + product(weights)
        return Softmax(highest, self.total * factor + weights.sum(-1), summed)

    @property
    def output(self) -> Float32[Array, "*n head_dim"]:
        """The mean of the values, weighted by the softmax."""
        return self.summed / self.total[..., None]

    @property
    def log_total(self) -> Float32[Array, "*n"]:
        """The logarithm of Σ exp(score)."""
        return self.highest + jnp.log(self.total)
