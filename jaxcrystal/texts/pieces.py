"""Pieces of texts: where their tokens lie in one list for a whole batch, and how many they are."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

EMPTY = -1  #: no token; only behind the tokens of a row


@struct.dataclass
class Pieces:
    """Where the tokens of some pieces start in the list of tokens, and how many they are."""

    start: Int[Array, "*n"]
    length: Int[Array, "*n"]

    def __getitem__(self, index: object) -> Pieces:
        return jax.tree.map(lambda x: x[index], self)

    def only(self, when: Bool[Array, "*n"]) -> Pieces:
        """Nothing unless `when`."""
        return self.replace(length=self.length * when)

    def otherwise(self, when: Bool[Array, "*n"], other: Pieces) -> Pieces:
        """`other` where `when`."""
        return jax.tree.map(lambda x, y: jnp.where(when, y, x), self, other)

    def without_first(self, count: Int[Array, "*n"]) -> Pieces:
        return Pieces(self.start + count, self.length - count)

    def without_last(self, count: Int[Array, "*n"]) -> Pieces:
        return self.replace(length=self.length - count)


def one_after_the_other(shape: tuple[int, ...], *parts: Pieces) -> Pieces:
    """Along a last axis. Each part has `shape` (or is for all of it), or that and an axis of its own pieces."""

    def join(*xs: Int[Array, "..."]) -> Int[Array, "*n pieces"]:
        wide = [x if x.ndim > len(shape) else x[..., None] for x in xs]
        return jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in wide], axis=-1)

    return jax.tree.map(join, *parts)


class TokenList:
    """The list of tokens of a batch, while its pieces are laid down."""

    def __init__(self) -> None:
        self._laid: list[Int[Array, "some"]] = []
        self._size = 0

    def lay(self, table: Int[Array, "*n width"]) -> Pieces:
        """A piece for each row of `table`: its tokens before EMPTY."""
        *shape, width = table.shape
        start = self._size + width * np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
        self._laid.append(jnp.ravel(table))
        self._size += table.size
        return Pieces(jnp.asarray(start), jnp.asarray((table != EMPTY).sum(-1)))

    def tokens(self) -> Int[Array, "all"]:
        return jnp.concatenate(self._laid)


def ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> Int[np.ndarray, "rows width"]:
    """Rows of different lengths as a table that EMPTY fills."""
    table = np.full((len(rows), max((len(r) for r in rows), default=0)), EMPTY, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
