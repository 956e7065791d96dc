"""What is wrong with a text that is no crystal, whatever its form."""

from __future__ import annotations

from enum import StrEnum

from jaxcrystal.errors import UserError


class ParseErrorKind(StrEnum):
    """What about a text is not a crystal."""

    EMPTY = "empty"  # no text at all
    LENGTHS = "lengths"  # the first line is not three numbers
    ANGLES = "angles"  # the second line is not three numbers
    ELEMENT = "element"  # a line that should name an element does not
    COORDINATES = "coordinates"  # a line that should hold three numbers of [0, 1] does not
    MISSING = "missing"  # the text ends where a line was due
    COMPOSITION = "composition"  # the first line names no atoms, or others than the orbits have
    SPACE_GROUP = "space_group"  # the second line is no number from 1 to 230
    LETTER = "letter"  # of no position of the group, or of one that is taken
    ORBIT = "orbit"  # lies on a more special position than it says, or where another does
    LATTICE = "lattice"  # the last line does not hold the free parameters of the crystal system
    CELL = "cell"  # the numbers are well written, but no such cell exists


class ParseError(UserError):
    """A text that is not a crystal: which line (from 1), what was expected there, what was found."""

    def __init__(self, kind: ParseErrorKind, line: int, expected: str, found: str) -> None:
        self.kind, self.line, self.expected, self.found = kind, line, expected, found
        super().__init__(f"line {line}: expected {expected}, found {found!r}")
