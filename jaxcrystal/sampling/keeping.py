"""The most likely share of a model's crystals, so that what costs more is spent on these alone: best of n.

Of the attempts of each prompt that are ok, a share is kept: the most likely by the model's own log p, and of equals the
earlier. The others are `left_out`, with all that is known of them, so that another share can be kept later. What failed
is none of it: it is neither kept nor left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import LEFT_OUT, OK


def _atoms(row: Mapping[str, Any]) -> int:
    """Lines behind the last column of the atoms, as `Crystal.to_cif` writes one for each."""
    return row["cif"].rpartition("_atom_site_occupancy")[2].strip().count("\n") + 1


#: By what log p is divided.
PER: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "total": lambda row: 1,
    "token": lambda row: row["tokens"],
    "atom": _atoms,
}
KEEP_BY = "token"  #: where nothing is said


def check(keep: float | None, keep_by: str | None) -> None:
    """Raises UserError for a share that is none, or a likelihood that is none."""
    if keep is None and keep_by is not None:
        raise UserError("keep_by says by what the likeliest are found: say which share of them to keep")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"keep is {keep}; it is a share, above 0 and at most 1")
    if keep_by is not None and keep_by not in PER:
        raise UserError(f"keep_by is {keep_by!r}; it is {', '.join(PER)}")


def left_out(rows: Iterable[Mapping[str, Any]], num: int, keep: float, keep_by: str) -> set[int]:
    """The places of those rows that are ok and not kept; the rows are `num` of each prompt, one after the other.

    Of n that are ok ⌈`keep` · n⌉ are kept. A row without a probability is the least likely.
    """
    worth: dict[int, list[tuple[float, int]]] = {}
    for place, row in enumerate(rows):
        if row["status"] == OK:
            log_probability = row["log_probability"]
            each = -math.inf if log_probability is None else log_probability / PER[keep_by](row)
            worth.setdefault(place // num, []).append((-each, place))
    found: set[int] = set()
    for there in worth.values():
        kept = math.ceil(round(keep * len(there), 9))  # 0.1 · 30 is 3.0000000000000004 in floats
        found.update(place for _, place in sorted(there)[kept:])
    return found


def restored(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it was drawn."""
    return row | {"status": OK} if row["status"] == LEFT_OUT else row
