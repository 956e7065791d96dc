"""Numbers with a point, within an interval: which digits may come next, on the device.

p·10ᵐ ≤ value < (p + 1)·10ᵐ once the digits so far read p and m are to come: the next digits may come if this meets the
interval. All numbers are whole ones, in units of the last decimal.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from jaxcrystal.errors import UserError
from jaxcrystal.texts.numbers import power_of_ten

WHOLE = 3  #: digits that a number may have before the point
POINTED = WHOLE + 1  #: the column behind the point


def next_digits(
    digits: Int[np.ndarray, "numbers 2"],
    value: Int32[Array, "slots"],
    column: Int32[Array, "slots"],
    decimals: Int32[Array, "slots"],
    low: Int32[Array, "slots"],
    high: Int32[Array, "slots"],
) -> tuple[Bool[Array, "slots numbers"], Bool[Array, "slots"], Bool[Array, "slots"]]:
    """Which digits may come next, whether the point may, and whether the number may end.

    `digits`: what each letter reads as, and how many digits it has; a run of digits is cut into the widest from its
    left. `column`: the number's digits so far; behind the point POINTED + decimals so far.
    """
    group = int(digits[:, 1].max())
    whole = column < POINTED  # before the point

    def meets(p: Int[Array, "slots *n"], to_come: Int[Array, "slots *n"]) -> Bool[Array, "slots *n"]:
        """Whether digits p, with so many to come, can lead into the interval."""
        power = power_of_ten(jnp.clip(to_come, 0, 9))
        ahead = (slice(None), *[None] * (p.ndim - 1))
        return (p * power <= high[ahead]) & ((p + 1) * power > low[ahead])

    read, width = (jnp.asarray(x)[:, None] for x in digits.T)
    full = width == group  # only behind a whole group may a run of digits go on
    at, first = column[:, None, None], (column == 0)[:, None, None]
    p = value[:, None, None] * power_of_ten(width) + read
    more = jnp.arange(WHOLE)  # whole digits after these; none after a leading zero
    fits = (at + width + more <= WHOLE) & ((more == 0) | (full & (p > 0)))
    fits &= jnp.where(first, (width == 1) | (read >= power_of_ten(width - 1)), p >= power_of_ten(width))
    left = (decimals + POINTED)[:, None, None] - at - width  # decimals that then are to come
    fits = jnp.where(whole[:, None, None], fits, (more == 0) & (left >= 0) & (full | (left == 0)))
    to_come = jnp.where(whole, decimals, 0)[:, None, None] + jnp.where(whole[:, None, None], more, left)
    open_run = jnp.where(whole, column, column - POINTED) % group == 0
    p, to_come = jnp.broadcast_arrays(p, to_come)
    allowed = open_run[:, None] & (fits & meets(p, to_come)).any(-1)
    begun = whole & (column > 0)
    point = begun & (decimals > 0) & meets(value, decimals)
    complete = jnp.where(decimals > 0, column == POINTED + decimals, begun) & (low <= value) & (value <= high)
    return allowed, point, complete


def interval(name: str, stated: tuple[float, float], decimals: int, below: float) -> tuple[int, int]:
    """Least and most in units of the last decimal. Raises UserError if no number of so few decimals lies between."""
    low, high = (Decimal(str(x)).scaleb(decimals) for x in stated)
    least = max(1, int(low.to_integral_value(ROUND_CEILING)))
    most = min(int(high.to_integral_value(ROUND_FLOOR)), int(below * 10**decimals) - 1)
    if least > most:
        raise UserError(f"{name} from {stated[0]} to {stated[1]}: no number with {decimals} decimals lies between them")
    return least, most
