"""Random words, 32 bits each, as what is drawn from them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, UInt32


def uniform(words: UInt32[Array, "*n"]) -> Float32[Array, "*n"]:
    """In [0, 1)."""
    return (words >> 8).astype(jnp.float32) * 2.0**-24


def shuffled(words: UInt32[Array, "n"], chosen: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The numbers below n in random order, the `chosen` first: each is the end of a word, and the words are sorted."""
    n, bits = len(words), (len(words) - 1).bit_length()
    words = jnp.where(chosen, words >> 1, words | jnp.uint32(1 << 31))
    words = jnp.sort((words >> bits << bits) | jnp.arange(n, dtype=jnp.uint32))
    return (words & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)
