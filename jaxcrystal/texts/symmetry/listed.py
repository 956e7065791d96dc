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

    The last block is filled up with a row behind all others, so that what is scattered there is dropped.
    """
    columns = pairs.shape[1]

    def step(carry: tuple[Array, T]) -> tuple[Array, T]:
        left, result = carry
        there, at = jax.lax.top_k(left.astype(jnp.float32), min(BLOCK, left.size))
        at = jnp.where(there > 0, at, left.size)
        return left.at[at].set(False, mode="drop"), work(at // columns, at % columns, result)

    return jax.lax.while_loop(lambda carry: carry[0].any(), step, (pairs.reshape(-1), start))[1]
