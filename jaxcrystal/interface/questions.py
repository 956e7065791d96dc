"""What is asked of a model that infills: crystals, each with an element masked, and the elements that may answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal
from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.crystals.masking import Masked, hide
from jaxcrystal.errors import UserError
from jaxcrystal.reader.rows import Row, Rows

#: Which atoms of a crystal are masked with one of them.
MaskedWith: TypeAlias = Callable[[Crystal, int], Bool[np.ndarray, "atoms"]]


@dataclass(frozen=True)
class Question:
    """Which element could stand where one is masked."""

    id: str
    row: int  #: in the source, from 0
    crystal: Crystal  #: as it is
    masked: Masked
    allowed: tuple[str, ...]  #: elements among which it is asked

    @property
    def name(self) -> str:
        """How messages call the crystal."""
        return _name(self.id, self.crystal)


@dataclass(frozen=True)
class Wish:
    """Which of each crystal's atoms are masked, and what may stand there instead.

    Raises UserError unless it is `mask` or `site`, for what is no element, for a tolerance that is none.
    """

    mask: str | None = None  #: an element, all of whose atoms are masked
    site: int | None = None  #: or one atom by its number, from 0
    allow: Sequence[str] | None = None  #: None: all
    similar: float | None = None  #: Å: only elements whose ionic radius is so near that of the one that was there

    def __post_init__(self) -> None:
        if (self.mask is None) == (self.site is None):
            raise UserError("say what is masked: an element (mask) or the number of an atom (site), one of the two")
        if self.allow is not None and not self.allow:
            raise UserError("allow names no element, and one at least must be allowed")
        for symbol in ([] if self.mask is None else [self.mask]) + list(self.allow or ()):
            if symbol not in ATOMIC_NUMBER:
                isotope = "; the isotopes of hydrogen are H" if symbol in ("D", "T") else ""
                raise UserError(f"{symbol!r} is no chemical element{isotope}")
        if self.similar is not None and not 0 <= self.similar < math.inf:
            raise UserError(f"similar is {self.similar}; it must be a difference of radii in Å, such as 0.1")

    def allowed(self, element: str) -> tuple[str, ...]:
        """Elements that may stand where this one was. Raises UserError where there are none."""
        near = set(ELEMENTS)
        if self.similar is not None:
            from jaxcrystal.crystals.radii import similar

            near = set(similar(element, self.similar))
        found = tuple(symbol for symbol in ELEMENTS[1:] if symbol in near and symbol in (self.allow or ELEMENTS))
        if not found:
            raise UserError(f"no element that is allowed has an ionic radius within {self.similar} Å of {element}'s")
        return found


def ask(rows: Rows, masked_with: MaskedWith, wish: Wish) -> tuple[list[Question], list[str]]:
    """The question of each crystal, an atom masked as a form has it (`Form.masked_with`); and lines to be said of them.

    Rows that are no crystals, or have not the element that is masked, are left out, which is said. Raises UserError
    where none is left, and for a crystal that has no such site, or none of the elements that are wished for.
    """
    crystals = [row for row in rows.rows if row.crystal is not None]
    having = [row for row in crystals if wish.mask is None or wish.mask in row.crystal.symbols]
    if not crystals:
        first = rows.rows[0]
        raise UserError(f"{rows.path} holds no crystal; its first row ({first.id}) is {first.outcome}: {first.reason}")
    if not having:
        first, others = crystals[0], len(crystals) - 1
        more = f", nor has any of the {others} others" if others else ""
        raise UserError(
            f"{_name(first.id, first.crystal)} has no {wish.mask}{more}; its elements are "
            f"{', '.join(sorted(set(first.crystal.symbols)))}"
        )
    questions = [_question(row, masked_with, wish) for row in having]
    left_out = Counter(row.outcome for row in rows.rows if row.crystal is None)
    left_out |= Counter({f"without {wish.mask}": len(crystals) - len(having)})
    notes = []
    if why := ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count):
        notes.append(f"{len(rows) - len(having)} of {len(rows)} rows are left out: {why}")
    if partly := [question for question in questions if question.masked.elsewhere]:
        more = f" and {len(partly) - 1} more" if len(partly) > 1 else ""
        notes.append(
            f"{partly[0].name}{more}: {partly[0].masked.element} stands at other sites too, which are not masked; in "
            "training an element was masked wherever it stood"
        )
    return questions, notes


def _question(row: Row, masked_with: MaskedWith, wish: Wish) -> Question:
    crystal = row.crystal
    if wish.site is None:
        atoms = crystal.species == ATOMIC_NUMBER[wish.mask]
    elif 0 <= wish.site < len(crystal):
        atoms = masked_with(crystal, wish.site)
    else:
        raise UserError(
            f"{_name(row.id, crystal)} has {len(crystal)} atoms, numbered from 0 to {len(crystal) - 1}: there is no "
            f"site {wish.site}"
        )
    masked = hide(crystal, atoms)
    return Question(row.id, row.row, crystal, masked, wish.allowed(masked.element))


def _name(name: str, crystal: Crystal) -> str:
    return f"{name} ({spelled(crystal.formula)})"
