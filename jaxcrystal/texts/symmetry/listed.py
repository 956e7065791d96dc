"""Few of many: work that only some pairs of rows and columns need, in blocks of a fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

BLOCK = 16  #: pairs that are worked on at once
T = TypeVar("T")


def over_pairs(
    pairs: Bool[Array, "rows columns"],
    work: Callable[[Int32[Array, "block"], Int32[Array, "block"], T], T],
    start: T,
) -> T:
    """`work` on the rows and columns of all pairs that are True, a block at a time.

    Behind the last pair rows are out of bounds, so that what is scattered there is dropped.
    """
    columns = pairs.shape[1]
    order = jnp.cumsum(pairs.reshape(-1).astype(jnp.int32))
    blocks = (order[-1] + BLOCK - 1) // BLOCK

    def step(block: Array, result: T) -> T:
        at = jnp.searchsorted(order, block * BLOCK + jnp.arange(BLOCK) + 1).astype(jnp.int32)
        return work(at // columns, at % columns, result)

    return jax.lax.fori_loop(0, blocks, step, start)
