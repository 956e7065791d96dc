"""A crystal as text, the paper's way (arXiv 2402.04379, figure 2), and back.

    5.1 5.2 5.7          lengths a b c in Å
    90 90 90             angles α β γ in degrees
    Li                   element of the first atom
    0.00 0.50 0.25       its fractional coordinates
    ...

Numbers are rounded as Python's `format` rounds them (to nearest, ties to even); a coordinate that rounds to 1 is
written 0. `TextFormat.paper_compat` writes what the original wrote: angles truncated, coordinates up to 1.00.
"""

from __future__ import annotations

import re

import numpy as np

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal, closes
from jaxcrystal.texts.parsing import ParseError, ParseErrorKind
from jaxcrystal.texts.prompts import MASK

REQUEST = (
    " Generate a description of the lengths and angles of the lattice vectors and then the element type and"
    " coordinates for each atom within the lattice:\n"
)
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def write(crystal: Crystal, fmt: TextFormat = TextFormat(), mask_element: int | None = None) -> str:  # noqa: B008
    """The text of a crystal; atoms of the atomic number `mask_element` are written [MASK]."""
    lines = [
        " ".join(f"{x:.{fmt.length_decimals}f}" for x in crystal.lengths),
        " ".join(_angle(x, fmt) for x in crystal.angles),
    ]
    for z, symbol, coords in zip(crystal.species, crystal.symbols, crystal.frac_coords, strict=True):
        lines.append(MASK if z == mask_element else symbol)
        lines.append(" ".join(_coordinate(x, fmt) for x in coords))
    return "\n".join(lines)


def _angle(x: float, fmt: TextFormat) -> str:
    if fmt.paper_compat:
        x = np.floor(x * 10**fmt.angle_decimals) / 10**fmt.angle_decimals
    return f"{x:.{fmt.angle_decimals}f}"


def _coordinate(x: float, fmt: TextFormat) -> str:
    text = f"{x:.{fmt.coord_decimals}f}"
    return "0" + text[1:] if text[0] == "1" and not fmt.paper_compat else text


def parse(text: str) -> Crystal:
    """The crystal that a text describes, whatever its decimals. Raises ParseError at the first line that is wrong."""
    if not text.strip():
        raise ParseError(ParseErrorKind.EMPTY, 1, "three lengths", text)
    lines = text.strip("\n").split("\n")
    lengths = _three(lines, 0, ParseErrorKind.LENGTHS, "three lengths in Å")
    angles = _three(lines, 1, ParseErrorKind.ANGLES, "three angles in degrees")
    # 256 is where the crystal's fixed-point grid ends.
    if not (0 < lengths.min() and lengths.max() < 256):
        raise ParseError(ParseErrorKind.CELL, 1, "lengths between 0 and 256 Å", lines[0])
    if not (0 < angles.min() and angles.max() < 180 and closes(lengths, angles)):
        raise ParseError(ParseErrorKind.CELL, 2, "angles that close a cell", lines[1])
    if len(lines) == 2:
        raise ParseError(ParseErrorKind.MISSING, 3, "an element symbol", "the end")
    species, coords = [], []
    for row in range(2, len(lines), 2):
        if lines[row] not in ATOMIC_NUMBER:
            raise ParseError(ParseErrorKind.ELEMENT, row + 1, "an element symbol", lines[row])
        species.append(ATOMIC_NUMBER[lines[row]])
        coords.append(_three(lines, row + 1, ParseErrorKind.COORDINATES, "three fractional coordinates"))
        if coords[-1].max() > 1:
            raise ParseError(ParseErrorKind.COORDINATES, row + 2, "coordinates between 0 and 1", lines[row + 1])
    return Crystal(lengths, angles, np.array(species), np.array(coords))


def _three(lines: list[str], row: int, kind: ParseErrorKind, expected: str) -> np.ndarray:
    if row >= len(lines):
        raise ParseError(ParseErrorKind.MISSING, row + 1, expected, "the end")
    words = lines[row].split(" ")
    if len(words) != 3 or not all(_NUMBER.fullmatch(word) for word in words):
        raise ParseError(kind, row + 1, expected, lines[row])
    return np.array([float(word) for word in words])
