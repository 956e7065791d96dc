"""How large an element's ions are, and which elements have ions as large.

`radii.csv` has Shannon's crystal radii in sixfold coordination (Acta Cryst. A 32, 751 (1976)), an ion a row, as
pymatgen's `Element.ionic_radii` has them; high spin where both are known. An element has one radius here: the mean over
its anions if the table has any (N, O, F, S, Cl, Se, Br, Te, I), and over its cations if not. pymatgen's
`average_ionic_radius` takes the mean over both, by which Cl (0.78 Å) is as large as Fe; in crystals it is Cl⁻, 1.67 Å.
H, what is heavier than Cf, and the noble gases have no radius; Shannon's Xe⁸⁺ is left out, for Xe is no such ion in
nearly all of its crystals.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.errors import UserError

DECIMALS = 6  #: of a difference of radii, in Å: 1.36 is as far from 1.26 as 0.1 is


def radius(symbol: str) -> float | None:
    """Mean radius of an element's ions in Å; None if none is known. Raises UserError for what is no element."""
    return _size(symbol)[1]


def similar(symbol: str, tolerance: float = 0.1) -> list[str]:
    """Other elements whose radius is within `tolerance` Å of this one's, and whose ions have the same sign.

    The nearest come first, equally near ones by atomic number. None are similar to an element without a radius; within
    0.1 Å none are to B, C, Cs and Fr either. Raises UserError for what is no element, and for a tolerance below 0.
    """
    if not tolerance >= 0:
        raise UserError(f"the tolerance is {tolerance} Å; it must be at least 0")
    sign, size = _size(symbol)
    if size is None:
        return []
    away = {
        other: round(abs(its - size), DECIMALS)
        for other, (its_sign, its) in _sizes().items()
        if other != symbol and its_sign == sign
    }
    near = [other for other, distance in away.items() if distance <= tolerance]
    return sorted(near, key=lambda other: (away[other], ATOMIC_NUMBER[other]))


def _size(symbol: str) -> tuple[int, float | None]:
    """The sign of an element's ions, and their radius."""
    if symbol not in ATOMIC_NUMBER:
        raise UserError(f"{symbol!r} is no chemical element")
    return _sizes().get(symbol, (0, None))


@cache
def _sizes() -> Mapping[str, tuple[int, float]]:
    """Of all elements that have a radius."""
    radii: dict[str, dict[int, float]] = defaultdict(dict)
    with Path(__file__).with_name("radii.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            radii[row["element"]][int(row["charge"])] = float(row["radius"])
    found = {}
    for symbol, ions in radii.items():
        sign = -1 if min(ions) < 0 else 1
        of_sign = [size for charge, size in ions.items() if charge * sign > 0]
        found[symbol] = (sign, sum(of_sign) / len(of_sign))
    return found
