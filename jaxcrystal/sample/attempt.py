"""One attempt to draw a crystal: what the model wrote, and what it turned out to be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import count

from jaxcrystal.crystals import text as crystal_text
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, Crystal
from jaxcrystal.crystals.text import ParseError, ParseErrorKind

OK = "ok"
TRUNCATED = "truncated"  #: no end of sequence before the limit
NAN_LOGITS = "nan_logits"  #: the model's logits were no numbers
CELL_ERROR = "cell_error"  #: well written, but no such cell exists
PARSE_ERROR = "parse_error"  #: followed by `:` and a `ParseErrorKind`


@dataclass(frozen=True)
class Attempt:
    """A row of the ledger."""

    index: int  #: the crystal is a function of the model, the prompt, the methods, `seed` and `index`
    seed: int
    prompt: str
    conditions: str  #: the attributes that the prompt states, as JSON
    text: str  #: what the model wrote after the prompt
    status: str  #: `ok`, `truncated`, `cell_error`, `nan_logits` or `parse_error:<kind>`
    log_probability: float | None  #: of all `tokens`, by the model alone: temperature 1, no method; None for NaN logits
    tokens: int  #: how many were drawn, the end of sequence counted
    formula: str | None  #: OPTIMADE's chemical_formula_reduced: elements in alphabetical order; None unless ok
    cif: str | None  #: in P1; None unless ok


def judge(text: str) -> tuple[str, Crystal | None]:
    """The status of a text that ended, and its crystal if there is one."""
    try:
        return OK, crystal_text.parse(text)
    except ParseError as error:
        return CELL_ERROR if error.kind is ParseErrorKind.CELL else f"{PARSE_ERROR}:{error.kind}", None


def reduced_formula(crystal: Crystal) -> str:
    """OPTIMADE's `chemical_formula_reduced`, for example FeLiO4P."""
    counts = Counter(crystal.symbols)
    unit = reduce(math.gcd, counts.values())
    return "".join(f"{symbol}{n // unit if n > unit else ''}" for symbol, n in sorted(counts.items()))


def p1_cif(crystal: Crystal) -> str:
    """CIF with every atom written out; each number is the shortest decimal that leads back to the same crystal."""
    cell = zip("abc", ("alpha", "beta", "gamma"), crystal.lengths, crystal.angles, strict=True)
    lengths, angles = [], []
    for edge, corner, length, angle in cell:
        lengths.append(f"_cell_length_{edge} {_shortest(length, CELL_BITS, round)}")
        angles.append(f"_cell_angle_{corner} {_shortest(angle, CELL_BITS, math.floor)}")
    atoms = [
        f"{symbol} {symbol}{i} {' '.join(_shortest(x, COORD_BITS, round) for x in coords)} 1"
        for i, (symbol, coords) in enumerate(zip(crystal.symbols, crystal.frac_coords, strict=True))
    ]
    return "\n".join(
        [
            f"data_{reduced_formula(crystal)}",
            "_symmetry_space_group_name_H-M 'P 1'",
            "_symmetry_Int_Tables_number 1",
            *lengths,
            *angles,
            "loop_",
            "_symmetry_equiv_pos_site_id",
            "_symmetry_equiv_pos_as_xyz",
            "1 'x, y, z'",
            "loop_",
            *(f"_atom_site_{column}" for column in ("type_symbol", "label", "fract_x", "fract_y", "fract_z")),
            "_atom_site_occupancy",
            *atoms,
            "",
        ]
    )


def _shortest(value: float, bits: int, to_grid: Callable[[float], int]) -> str:
    """The decimal of fewest digits that `Crystal` puts on the same point of its grid of 2**-bits."""
    for decimals in count():
        written = f"{value:.{decimals}f}"
        if to_grid(float(written) * 2**bits) == value * 2**bits:
            return written
