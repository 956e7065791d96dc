"""What a prompt can state of a crystal: the table from which options, columns, checks, sentences, constraints come.

attribute                  column and JSON key, as CDVAE publishes it          pretty_formula
name                       keyword in Python; --name on the command line       formula
subject                    how its sentence begins                             The chemical formula is
typed, checked             the text of an option or of a cell -> the value
spelled, written           -> the value as training texts spell it -> its text in the sentence
implied                    what the grammar keeps to where it is stated

A number may be asked for as a `Range`, of which each crystal's prompt states a value (`sampling.ranges`).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxcrystal.config import Attribute, Property
from jaxcrystal.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; infinite where it is open. Typed as 1:2, :0.05 or 195:"""

    low: float
    high: float

    @classmethod
    def read(cls, text: str) -> Range:
        """Of typed text. Raises ValueError for what is none."""
        low, high = (float(end) if end else None for end in text.split(":"))
        if not all(end is None or math.isfinite(end) for end in (low, high)):
            raise ValueError(f"{text} has an end that is no number")
        return cls(-math.inf if low is None else low, math.inf if high is None else high)

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """None where it is open: what JSON has for it."""
        low, high = (x if math.isfinite(x) else None for x in (self.low, self.high))
        return low, high

    def __str__(self) -> str:
        return ":".join("" if x is None else f"{x:g}" for x in self.ends)


def number_or_range(text: str) -> float | Range:
    """Of typed text. Raises ValueError for what is none."""
    return Range.read(text) if ":" in text else float(text)


def group_or_range(text: str) -> int | Range:
    """Of typed text. Raises ValueError for what is none."""
    return Range.read(text) if ":" in text else int(text)


def _symbols(text: str) -> list[str]:
    """`Li,O`, `Li O` or `Li-O` as a list."""
    return re.split(r"[\s,-]+", text.strip())


def _spelled(value: str) -> str:
    from jaxcrystal.crystals.formulas import spelled

    return spelled(value)


def _elements(value: Any) -> list[str]:
    from jaxcrystal.crystals.crystal import ATOMIC_NUMBER

    symbols = _symbols(value) if isinstance(value, str) else list(value)
    for symbol in symbols:
        if symbol not in ATOMIC_NUMBER:
            raise UserError(f"{symbol!r} is no chemical element")
    if not symbols:
        raise ValueError
    return symbols


def _space_group(value: Any) -> int:
    if int(value) != float(value):
        raise ValueError
    if not 1 <= int(value) <= 230:
        raise UserError(f"space group {int(value)} does not exist; numbers run from 1 to 230")
    return int(value)


def _number(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _decimals(value: float, paper_compat: bool) -> str:
    return str(round(float(value), 4)) if paper_compat else f"{float(value):.4f}"


def _formula_kept(value: str) -> dict[str, Any]:
    from jaxcrystal.crystals.formulas import unit

    return {"formula": unit(value)}


def _elements_kept(value: list[str]) -> dict[str, Any]:
    return {"required": tuple(value), "allowed": tuple(value)}


@dataclass(frozen=True)
class Condition:
    """An attribute that a prompt can state."""

    attribute: Attribute | str  #: or the name of a property
    name: str
    subject: str  #: the sentence before its value
    unit: str  #: of the value, or what it looks like; for help
    typed: Callable[[str], Any]  #: of an option or a cell; raises ValueError for what is none
    checked: Callable[[Any], Any]  #: of its type; raises ValueError, TypeError or UserError for what is none
    spelled: Callable[[Any], Any] = lambda value: value  #: as training texts have it; raises UserError
    written: Callable[[Any, bool], str] = lambda value, paper_compat: str(value)  #: `paper_compat`: as the original did
    implied: Callable[[Any], dict[str, Any]] | None = None  #: fields of `Constraints`, in every form
    metavar: str = "X"
    ranged: bool = False  #: whether it may be asked for as a `Range`

    @property
    def option(self) -> str:
        """On the command line."""
        return f"--{self.name.replace('_', '-')}"

    def check(self, value: Any) -> Any:
        """The value as training texts spell it; a pair, of which None leaves an end open, as a `Range`.

        Raises UserError for one that the attribute cannot have, and for an empty range.
        """
        try:
            if self.ranged and isinstance(value, Range | tuple | list):
                return self._checked_range(value)
            return self.spelled(self.checked(value))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{value!r} is no value of {self.attribute}") from None

    def _checked_range(self, value: Range | Sequence[float | None]) -> Range:
        low, high = value.ends if isinstance(value, Range) else value
        low = -math.inf if low is None else float(self.checked(low))
        high = math.inf if high is None else float(self.checked(high))
        if low > high:
            raise UserError(f"{self.attribute} from {low:g} to {high:g} is an empty range")
        return Range(low, high)

    def read(self, text: str) -> Any:
        """`check` of a value that was typed. Raises UserError as it."""
        try:
            return self.check(self.typed(text))
        except ValueError:
            raise UserError(f"{text!r} is no value of {self.attribute}") from None


#: In the order of `config.ATTRIBUTES`; `known` adds a model's own properties.
CONDITIONS = (
    Condition(
        "pretty_formula",
        "formula",
        "The chemical formula is",
        "for example LiFePO4; the grammar keeps to multiples of it",
        str,
        str,
        _spelled,
        implied=_formula_kept,
        metavar="F",
    ),
    Condition(
        "elements",
        "elements",
        "The elements are",
        "for example Li,O; the grammar keeps to all of these, no others",
        _symbols,
        _elements,
        lambda value: sorted(set(value)),
        lambda value, paper_compat: ", ".join(value),
        implied=_elements_kept,
        metavar="A,B",
    ),
    Condition(
        "spacegroup.number",
        "spacegroup",
        "The spacegroup number is",
        "1 to 230, or a range as 195:230",
        group_or_range,
        _space_group,
        metavar="N",
        ranged=True,
    ),
    Condition(
        "formation_energy_per_atom",
        "formation_energy",
        "The formation energy per atom is",
        "eV per atom, or a range as -3:-1",
        number_or_range,
        _number,
        written=_decimals,
        ranged=True,
    ),
    Condition(
        "band_gap",
        "band_gap",
        "The band gap is",
        "eV, or a range as 1:2",
        number_or_range,
        _number,
        written=_decimals,
        ranged=True,
    ),
    Condition(
        "e_above_hull",
        "e_above_hull",
        "The energy above the convex hull is",
        "eV per atom, or a range as :0.05",
        number_or_range,
        _number,
        written=_decimals,
        ranged=True,
    ),
)
BY_ATTRIBUTE: dict[str, Condition] = {condition.attribute: condition for condition in CONDITIONS}
_BY_NAME = {condition.name: condition for condition in CONDITIONS}

Properties = tuple[Property, ...]


@cache
def known(properties: Properties = ()) -> Mapping[str, Condition]:
    """All that prompts may state, by attribute, in the order of `TextFormat.attributes`.

    Raises UserError for a property whose name is that of a condition.
    """
    for own in properties:
        if own.name in _BY_NAME:
            raise UserError(f"the property {own.name!r} is called as a condition that prompts state anyway; rename it")
    return BY_ATTRIBUTE | {own.name: _of_property(own) for own in properties}


def _of_property(own: Property) -> Condition:
    if own.decimals is None:
        return Condition(own.name, own.name, own.sentence, own.unit or "text", str, _words)
    decimals = own.decimals
    return Condition(
        own.name,
        own.name,
        own.sentence,
        own.unit or "a number",
        number_or_range,
        _number,
        written=lambda value, paper_compat: f"{value:.{decimals}f}",
        ranged=True,
    )


def _words(value: Any) -> str:
    """Text in one line. Raises TypeError or ValueError for what is none."""
    if not isinstance(value, str):
        raise TypeError
    if not value.strip() or len(value.splitlines()) > 1:
        raise ValueError
    return value.strip()


def condition(name: str, properties: Properties = ()) -> Condition:
    """The condition of that attribute or name. Raises UserError if there is none."""
    named = {**known(properties), **_BY_NAME}
    if name not in named:
        near = difflib.get_close_matches(name, named, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known(properties))}"
        raise UserError(f"unknown condition {name!r}; {remedy}")
    return named[name]


def checked(conditions: Mapping[str, Any], properties: Properties = ()) -> dict[str, Any]:
    """Conditions by attribute, each spelled as training texts spell it; in the order given.

    Raises UserError for an unknown condition, one that is there under two names, or a value that it cannot have.
    """
    found: dict[str, Any] = {}
    for name, value in conditions.items():
        one = condition(name, properties)
        if one.attribute in found:
            raise UserError(f"{one.attribute} is stated twice, as {one.attribute} and as {one.name}")
        found[one.attribute] = one.check(value)
    return found


def sentence(attribute: str, value: Any, paper_compat: bool = False, properties: Properties = ()) -> str:
    """One condition, for example " The band gap is 1.1200.": energies in eV (per atom), gaps in eV, four decimals.

    The value keeps its spelling: it is of a data set, or went through `checked`. `paper_compat` writes energies as the
    original did, without trailing zeros. Raises UserError for an unknown attribute, or a value that it cannot have.
    """
    one = condition(attribute, properties)
    try:
        return f" {one.subject} {one.written(one.checked(value), paper_compat)}."
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{value!r} is no value of {attribute}") from None


def subjects() -> Iterable[str]:
    """How the sentences begin."""
    return (condition.subject for condition in CONDITIONS)
