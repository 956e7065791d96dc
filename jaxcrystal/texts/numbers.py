"""Numbers as tokens, on the device: whole ones by integer arithmetic, in the groups of digits that a tokenizer has.

group 1    1 2 0 . 2 5        group 2    12 0 . 25        group 3    120 . 25
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxcrystal.texts.token_tables import TokenTables


def decimal(
    x: UInt32[Array, "*n"], bits: int, decimals: int, truncate: bool = False
) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """Whole part and `decimals` digits of x·2⁻ᵇⁱᵗˢ, rounded exactly as Python's `format` does, or cut off.

    The fraction is kept as 32 bits. Ten times it, as a 64-bit product in two halves, pushes out the next digit; what
    stays is compared with one half, a tie going to the even neighbour.
    """
    whole = x >> bits if bits < 32 else jnp.zeros_like(x)
    rest = x << (32 - bits)
    digits = jnp.zeros_like(x)
    for _ in range(decimals):
        high, low = (rest >> 16) * 10, (rest & 0xFFFF) * 10
        digits = digits * 10 + ((high + (low >> 16)) >> 16)
        rest = rest * 10
    if not truncate:
        odd = (digits if decimals else whole) % 2 == 1
        half = jnp.uint32(1 << 31)
        digits = digits + ((rest > half) | ((rest == half) & odd))
    carry = digits == 10**decimals
    return (whole + carry).astype(jnp.int32), jnp.where(carry, 0, digits).astype(jnp.int32)


def power_of_ten(exponent: Int[Array, "*n"] | int) -> Int[Array, "*n"]:
    """10 to it, for 0 to 9."""
    return jnp.asarray(10 ** np.arange(10, dtype=np.int32))[exponent]


def digit_groups(tables: TokenTables, digits: Int[Array, "*n"], count: int) -> list[Int[Array, "*n"]]:
    """Tokens of so many digits, leading zeros too, in groups from the left."""
    tokens, group = [], tables.group
    for left in range(count, 0, -group):
        width = min(group, left)
        tokens.append(_group(tables, digits // 10 ** (left - width) % 10**width, width))
    return tokens


def whole_number(
    tables: TokenTables, whole: Int[Array, "*n"], places: int
) -> tuple[list[Int[Array, "*n"]], Int[Array, "*n"]]:
    """Tokens of a number below 10 to the `places`, without leading zeros, and how many of the first are none of it.

    Groups are counted from the left, so that only the last one may have fewer digits than the others.
    """
    group, most = tables.group, -(-places // tables.group)
    width = jnp.ones_like(whole) + sum((whole >= 10**k).astype(jnp.int32) for k in range(1, places))
    last = (width - 1) % group + 1 if group > 1 else 1  # digits of the last group
    tokens = [_group(tables, whole % power_of_ten(last), last)]
    for behind in range(1, most):  # groups that follow
        value = whole // power_of_ten(last + (behind - 1) * group) % 10**group
        tokens.insert(0, _group(tables, value, group))
    return tokens, most - (width + group - 1) // group


def _group(tables: TokenTables, value: Int[Array, "*n"], width: Int[Array, "*n"] | int) -> Int[Array, "*n"]:
    """The token of one group of so many digits."""
    return jnp.asarray(tables.digits)[(power_of_ten(width) - 10) // 9 + value]
