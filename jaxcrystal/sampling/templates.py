"""Attempts that need no model: a known crystal at random, other elements of like size, the volume rescaled.

The baseline of every generator. Attempt I of seed S is decided by the two alone, so that a longer run begins with the
attempts of a shorter one. What could not be made stays a row, with a status that says why.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import trange

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.substitution import Pool, random_swaps, swapped
from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import CELL_ERROR, KNOWN_FORMULA, OK
from jaxcrystal.sampling.decoding import MOST_REDRAWS

if TYPE_CHECKING:
    from pymatgen.core import Structure

NO_SWAP = "no_swap"  #: the pool has no choice of elements for the template


@dataclass(frozen=True)
class Substitution:
    """One attempt."""

    index: int  #: of the row
    seed: int
    template: str  #: id of the crystal that it was made of, the last one if it was drawn again
    swaps: Mapping[str, str] | None  #: which element became which; None if none can
    status: str  #: `ok`, `no_swap`, `cell_error`, `known_formula`
    crystal: Crystal | None  #: None unless ok
    redraws: int | None = None  #: how often its formula was a known one, where new ones were asked for

    @property
    def id(self) -> str:
        """As the reader of its table names the row."""
        return str(self.index)

    @property
    def outcome(self) -> str:
        """The status, under the name that all tables have for it."""
        return self.status

    @property
    def structure(self) -> Structure | None:
        """pymatgen's; None unless ok."""
        return None if self.crystal is None else self.crystal.to_structure()

    def row(self) -> dict[str, Any]:
        """As a row of a table: columns of a ledger, where there is something to say."""
        return {
            "index": self.index,
            "seed": self.seed,
            "template": self.template,
            "swaps": None if self.swaps is None else json.dumps(self.swaps),
            "status": self.status,
            "formula": self.crystal and self.crystal.formula,
            "cif": self.crystal and self.crystal.to_cif(),
            "redraws": self.redraws,
        }


def check_request(num: int, swaps: int | None, seed: int) -> None:
    """Raises UserError for numbers that make no sense."""
    if num < 1:
        raise UserError(f"num is {num}; it must be at least 1")
    if swaps is not None and swaps < 1:
        raise UserError(f"swaps is {swaps}; it must be at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be at least 0")


def substitutions(
    templates: Sequence[tuple[str, Crystal]],
    num: int,
    pool: Pool,
    *,
    swaps: int | None = None,
    known: Container[str] | None = None,
    seed: int = 0,
) -> list[Substitution]:
    """`num` attempts, each of one of `templates` (id and crystal), all as likely; at least one must be there.

    `swaps` of its elements, or all, become others as `random_swaps` chooses them of the `pool`. With `known` formulas,
    what has one of them is drawn again with the next numbers of its attempt, template and all, `MOST_REDRAWS` times at
    most.
    """
    return [
        _attempt(templates, pool, swaps, known, seed, index)
        for index in trange(num, desc="swapping elements", unit="crystal")
    ]


def _attempt(
    templates: Sequence[tuple[str, Crystal]],
    pool: Pool,
    count: int | None,
    known: Container[str] | None,
    seed: int,
    index: int,
) -> Substitution:
    rng = np.random.default_rng([seed, index])
    for redraws in range(MOST_REDRAWS + 1):
        name, template = templates[rng.integers(len(templates))]
        swaps = random_swaps(rng, template, pool, count)
        status, crystal = made(template, swaps)
        if known is None or crystal is None or crystal.formula not in known:
            told = None if known is None else redraws
            return Substitution(index, seed, name, swaps, status, crystal, told)
    return Substitution(index, seed, name, swaps, KNOWN_FORMULA, None, MOST_REDRAWS)


def made(template: Crystal, swaps: Mapping[str, str] | None) -> tuple[str, Crystal | None]:
    """The status, and the crystal if there is one."""
    if swaps is None:
        return NO_SWAP, None
    try:
        return OK, swapped(template, swaps)
    except UserError:  # the pool has elements of known volume only: the new cell is too large
        return CELL_ERROR, None
