"""A short name for the exact values of a tree of arrays, the same on every mesh.

Each array's bits are read as 32-bit words w_i, and reduced where they lie to

    Σ_i w_i · (2 i + 1)   modulo 2³²

which does not depend on how the array is divided, for sums of integers that wrap around have no order. The factors are
odd, so that every change of a single word changes the sum. The names and sums of all arrays are hashed together.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, UInt32


def fingerprint(tree: dict[str, Any]) -> str:
    """16 hexadecimal digits that name the values, dtypes and shapes of the arrays in a nested dictionary."""
    arrays = flatten_dict(tree, sep="/")
    sums = jax.device_get(_sums(arrays))
    return _digest({name: _line(name, x, sums[name]) for name, x in arrays.items()})


class Passing:
    """The fingerprint of a tree of which only one array is there at a time."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def seen(self, name: str, array: Array) -> Array:
        """The array, once it is counted under its path in the tree, such as layers/mlp/up_proj/kernel."""
        self._lines[name] = _line(name, array, jax.device_get(_sums({"": array})[""]))
        return array

    @property
    def fingerprint(self) -> str:
        """Of all that was seen: what `fingerprint` gives for the tree of them."""
        return _digest(self._lines)


def _line(name: str, array: Array, total: UInt32[Array, ""]) -> str:
    return f"{name} {array.dtype} {array.shape} {int(total)}"


def _digest(lines: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(lines[name] for name in sorted(lines)).encode()).hexdigest()[:16]


@jax.jit
def _sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _sum(x) for name, x in arrays.items()}


def _sum(x: Array) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    factor, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        factor += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(words * (2 * factor + 1), dtype=jnp.uint32)
