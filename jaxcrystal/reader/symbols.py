"""Chemical symbols as files write them: `Fe`, `FE`, `Fe3+`, `Fe2.5+`, `Fe12`, `D`, `13C`."""

from __future__ import annotations

import re
from functools import lru_cache

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.reader.rows import Outcome, Refused

_ISOTOPES = {"D": "deuterium", "T": "tritium"}
#: An element with, perhaps, a mass number before it and a charge after it (3+, +3, 2.5+, +, -).
_SPECIES = re.compile(r"(\d{1,3})?([A-Za-z]{1,3})((?:\d+(?:\.\d+)?)?[+-]|[+-]\d+(?:\.\d+)?)?")
_LABEL = re.compile(r"([A-Za-z]{1,3})[\d\W_]?.*", re.DOTALL)


@lru_cache(4096)
def element(text: str) -> tuple[str, tuple[str, ...]]:
    """The element of a species or a site's label, and what of the text is not kept, as notes.

    Raises Refused if it is no chemical element.
    """
    text = text.strip()
    match = _SPECIES.fullmatch(text)
    mass, letters, charge = match.groups() if match else (None, _letters(text), None)
    notes = []
    if letters in _ISOTOPES:
        notes.append(f"{_ISOTOPES[letters]} ({letters}) read as hydrogen")
        letters = "H"
    symbol = letters.title()
    if symbol not in ATOMIC_NUMBER:
        raise Refused(Outcome.UNKNOWN_ELEMENT, f"{text!r} is no chemical element")
    if symbol != letters:
        notes.append(f"symbol {letters} read as {symbol}")
    if mass:
        notes.append("mass numbers of isotopes are not kept")
    if charge and charge.strip("+-0."):
        notes.append("oxidation states are not kept")
    return symbol, tuple(notes)


def _letters(label: str) -> str:
    """The letters with which a label such as Fe12 or Na(1) begins."""
    match = _LABEL.fullmatch(label)
    if not match:
        raise Refused(Outcome.UNKNOWN_ELEMENT, f"{label!r} is no chemical element")
    return match[1]
