"""Crystals of known energy, at least one of each of 89 elements: what a potential is checked against.

`known_crystals.csv` has a row a crystal: its prototype, lattice constants in Å and total energy in eV/atom by the
Materials Project (PBE and PBE+U; CC-BY-4.0), with its MP2020 correction, in eV/atom too, apart. They are elements and
binary compounds of MP-20 without free coordinates, of one to four atoms, on which M3GNet-MP-2021.2.8 and CHGNet 0.3.0
lie near the Materials Project: three of each element where there are so many, and one with half of its atoms. Oxides
and fluorides of elements with a Hubbard U are not among them.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymatgen.core import Structure

_FCC = ((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
_BCC = ((-0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.5, 0.5, -0.5))
_CUBE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_HEXAGON = ((1, 0, 0), (-0.5, 0.75**0.5, 0), (0, 0, 1))
_ORIGIN, _CENTRE = (0, 0, 0), (0.5, 0.5, 0.5)
_QUARTER, _THREE_QUARTERS = (0.25, 0.25, 0.25), (0.75, 0.75, 0.75)

#: Primitive cell in units of a, a and c; fractional coordinates of the first element, then of the second.
PROTOTYPES = {
    "fcc": (_FCC, (_ORIGIN,), ()),
    "bcc": (_BCC, (_ORIGIN,), ()),
    "hcp": (_HEXAGON, ((1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)), ()),
    "rocksalt": (_FCC, (_ORIGIN,), (_CENTRE,)),
    "zincblende": (_FCC, (_ORIGIN,), (_QUARTER,)),
    "CsCl": (_CUBE, (_ORIGIN,), (_CENTRE,)),
    "fluorite": (_FCC, (_ORIGIN,), (_QUARTER, _THREE_QUARTERS)),
    "WC": (_HEXAGON, (_ORIGIN,), ((1 / 3, 2 / 3, 0.5),)),
    "AlB2": (_HEXAGON, (_ORIGIN,), ((1 / 3, 2 / 3, 0.5), (2 / 3, 1 / 3, 0.5))),
    "AuCu3": (_CUBE, (_ORIGIN,), ((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))),
    "BiF3": (_FCC, (_ORIGIN,), (_CENTRE, _QUARTER, _THREE_QUARTERS)),
}


@dataclass(frozen=True)
class KnownCrystal:
    """A row of the table."""

    first: str  #: symbol
    second: str  #: symbol; empty for an element
    prototype: str
    a: float  #: Å
    c: float  #: Å; a for a cubic crystal
    energy: float  #: eV/atom, PBE and PBE+U
    correction: float  #: eV/atom, MP2020's

    def __str__(self) -> str:
        of_second = len(PROTOTYPES[self.prototype][2])
        return f"{self.first}{self.second}{of_second if of_second > 1 else ''} ({self.prototype})"

    @property
    def symbols(self) -> list[str]:
        """Of each atom of the primitive cell."""
        _, first, second = PROTOTYPES[self.prototype]
        return [self.first] * len(first) + [self.second] * len(second)

    def structure(self) -> Structure:
        """The primitive cell."""
        from pymatgen.core import Structure

        cell, first, second = PROTOTYPES[self.prototype]
        lengths = (self.a, self.a, self.c)
        vectors = [[x * length for x in row] for row, length in zip(cell, lengths, strict=True)]
        return Structure(vectors, self.symbols, [*first, *second])


@cache
def known_crystals() -> tuple[KnownCrystal, ...]:
    """The rows of the table, elements first."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8") as file:
        return tuple(
            KnownCrystal(
                row["first"],
                row["second"],
                row["prototype"],
                float(row["a"]),
                float(row["c"] or row["a"]),
                float(row["energy"]),
                float(row["correction"]),
            )
            for row in csv.DictReader(file)
        )
