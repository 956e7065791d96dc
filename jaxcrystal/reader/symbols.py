"""Chemical symbols as files write them: `Fe`, `FE`, `Fe3+`, `Fe2.5+`, `D`, `13C`; and labels of sites: `Fe12`, `Na(1)`.

What names more than one element or a group of atoms (`Al/Si`, `Fe0.9Mg0.1`, `H2O`, `NH4`) is no element: its first
letters are not taken for it.
"""

from __future__ import annotations

import re
from functools import lru_cache

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.reader.rows import Outcome, Refused

_ISOTOPES = {"D": "deuterium", "T": "tritium"}
#: An element with, perhaps, a mass number before it; behind it a charge (3+, +3, 2.5+, +, -) or a site's number.
_SPECIES = re.compile(r"(\d{1,3})?([A-Za-z]{1,2})(?:((?:\d+(?:\.\d+)?)?[+-]|[+-]\d+(?:\.\d+)?)|(\d+))?")
#: An element and what tells its sites apart: a number, then perhaps a letter, but not H or W as of hydroxyl and water.
_LABEL = re.compile(r"([A-Za-z]{1,2})(?:[_#-]?\d+[A-GI-VX-Za-z]?\d*|[_#-]?\(\d+[A-Za-z]?\))?['\"*+]*")
#: Capitals that are as likely hydrogen, carbon, nitrogen or oxygen with a letter that tells its site.
_DOUBTFUL = frozenset(("HO", "HE", "HS", "CN", "CM", "CF", "NO", "NE", "NH", "NP", "OG"))
#: Elements beyond it are in no crystal whose file is in capitals.
_HEAVIEST = ATOMIC_NUMBER["Pu"]


@lru_cache(4096)
def element(text: str) -> tuple[str, tuple[str, ...]]:
    """The element of a species, and what of the text is not kept, as notes. Raises Refused if it is not one element."""
    match = _SPECIES.fullmatch(text.strip())
    if not match or (match[4] and not match[2].istitle()):  # NH4, CO3
        raise _no_element(text)
    mass, letters, charge, _ = match.groups()
    symbol, notes = _symbol(letters, text)
    if mass:
        notes.append("mass numbers of isotopes are not kept")
    if charge and charge.strip("+-0."):
        notes.append("oxidation states are not kept")
    return symbol, tuple(notes)


@lru_cache(4096)
def element_of_label(text: str) -> tuple[str, tuple[str, ...]]:
    """The element of a site's label, where no type is given. Raises Refused if it does not say one, or may say two."""
    match = _LABEL.fullmatch(text.strip())
    if not match or match[1] == "T":  # a tetrahedral site more often than tritium
        raise _no_element(text)
    if match[1] in _DOUBTFUL:
        reason = f"the label {text!r} may be {match[1].title()} or {match[1][0]}; give _atom_site_type_symbol"
        raise Refused(Outcome.UNKNOWN_ELEMENT, reason)
    symbol, notes = _symbol(match[1], text)
    return symbol, tuple(notes)


def _symbol(letters: str, text: str) -> tuple[str, list[str]]:
    if letters in _ISOTOPES:
        return "H", [f"{_ISOTOPES[letters]} ({letters}) read as hydrogen"]
    symbol = letters.title()
    if symbol not in ATOMIC_NUMBER or (symbol != letters and ATOMIC_NUMBER[symbol] > _HEAVIEST):
        raise _no_element(text)
    return symbol, [] if symbol == letters else [f"symbol {letters} read as {symbol}"]


def _no_element(text: str) -> Refused:
    return Refused(Outcome.UNKNOWN_ELEMENT, f"{text!r} is no chemical element")
