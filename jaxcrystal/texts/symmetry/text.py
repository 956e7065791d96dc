"""A crystal as text by its symmetry, and back.

    Sr 1 Ti 1 O 3        what is in the primitive cell: elements as formulas order them, and how many atoms
    221                  space group number
    Sr a                 an orbit: element and Wyckoff letter, then the free coordinates of the letter's first listed
    Ti b                 representative, of which only the decimals are written: `25` is 0.25
    O c
    3.91                 the free lattice parameters of the crystal system: Å, then degrees

Orbits stand in the order of the elements above, those of an element by letter, then by coordinates. Where an element is
masked it comes first, so that its place tells nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal, closes
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, cell_of, orbit_points, primitive_vectors, same
from jaxcrystal.crystals.wyckoff import GROUPS, SYSTEMS, Group, group
from jaxcrystal.errors import UserError
from jaxcrystal.texts.parsing import ParseError, ParseErrorKind
from jaxcrystal.texts.prompts import MASK

REQUEST = " Generate its composition, space group, Wyckoff positions and lattice:\n"
LONGEST = 256  #: Å: the crystal's grid ends

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def write(crystal: SymmetricCrystal, fmt: TextFormat, mask_element: int | None = None) -> str:
    """The text of a crystal with its orbits in their order; those of the atomic number `mask_element` are masked."""
    masked = None if mask_element is None else ELEMENTS[mask_element]
    counts = sorted(crystal.composition.items(), key=lambda item: item[0] != masked)
    lines = [" ".join(f"{MASK if symbol == masked else symbol} {count}" for symbol, count in counts)]
    lines.append(str(crystal.space_group))
    for orbit in sorted(crystal.orbits, key=lambda orbit: orbit.symbol != masked):
        free = crystal.position(orbit).free
        coords = [
            _decimals(x, fmt.coord_decimals) for x, is_free in zip(orbit.frac_coords, free, strict=True) if is_free
        ]
        lines.append(" ".join([MASK if orbit.symbol == masked else orbit.symbol, orbit.letter, *coords]))
    decimals = [fmt.length_decimals if place < 3 else fmt.angle_decimals for place in crystal.free_parameters]
    lines.append(" ".join(f"{x:.{d}f}" for x, d in zip(crystal.parameters, decimals, strict=True)))
    return "\n".join(lines)


def _decimals(x: float, decimals: int) -> str:
    """Those of a coordinate; 1.00 is 0.00 of the next cell."""
    return f"{x:.{decimals}f}".partition(".")[2]


def parse(text: str) -> SymmetricCrystal:
    """The crystal that a text describes, whatever its decimals. Raises ParseError at the first line that is wrong."""
    if not text.strip():
        raise ParseError(ParseErrorKind.EMPTY, 1, "a composition", text)
    lines = text.strip("\n").split("\n")
    composition = _composition(lines[0])
    here = _group(lines)
    # The cell comes last, so that its line is known: all others are orbits.
    if len(lines) < 4:
        raise ParseError(ParseErrorKind.MISSING, len(lines) + 1, "an orbit, and then the lattice", "the end")
    orbits = list(_orbits(lines, here, len(lines) - 1))
    found = Counter[str]()
    for orbit in orbits:
        found[orbit.symbol] += here.atoms(orbit.letter)
    if found != composition:
        has = " ".join(f"{symbol} {count}" for symbol, count in found.items())
        raise ParseError(ParseErrorKind.COMPOSITION, 1, f"the atoms of the orbits, {has}", lines[0])
    cell = _cell(lines[-1], here, len(lines))
    return SymmetricCrystal(here.number, cell[:3], cell[3:], tuple(orbits))


def space_group(text: str) -> int | None:
    """The number that a text states in its second line; None if that is none."""
    lines = text.strip("\n").split("\n")
    stated = lines[1] if len(lines) > 1 else ""
    return int(stated) if re.fullmatch(r"[0-9]{1,3}", stated) and int(stated) in GROUPS else None


def _composition(line: str) -> Counter[str]:
    words = line.split(" ")
    counts = Counter[str]()
    for symbol, count in zip(words[::2], words[1::2], strict=False):
        if symbol in ATOMIC_NUMBER and symbol not in counts and re.fullmatch("[1-9][0-9]{0,2}", count):
            counts[symbol] = int(count)
    if 2 * len(counts) != len(words):
        raise ParseError(ParseErrorKind.COMPOSITION, 1, "elements, each once, with their numbers of atoms", line)
    return counts


def _group(lines: list[str]) -> Group:
    stated = lines[1] if len(lines) > 1 else "the end"
    if not re.fullmatch("[1-9][0-9]{0,2}", stated) or int(stated) not in GROUPS:
        kind = ParseErrorKind.MISSING if len(lines) < 2 else ParseErrorKind.SPACE_GROUP
        raise ParseError(kind, 2, "a space group from 1 to 230", stated)
    return group(int(stated))


def _orbits(lines: list[str], here: Group, end: int) -> Iterator[Orbit]:
    """Of the lines from the third to before `end`; each full, no two on the same points."""
    taken: dict[str, list[np.ndarray]] = {}
    for number, line in enumerate(lines[2:end], start=3):
        symbol, *rest = line.split(" ")
        if symbol not in ATOMIC_NUMBER:
            raise ParseError(ParseErrorKind.ELEMENT, number, "an element symbol", line)
        letter = rest[0] if rest else ""
        try:
            position = here.position(letter)
        except UserError:
            last = here.positions[-1].letter
            expected = f"a position of space group {here.number}, a to {last}"
            raise ParseError(ParseErrorKind.LETTER, number, expected, line) from None
        if letter in taken and not position.reusable:
            raise ParseError(ParseErrorKind.LETTER, number, f"another position than {letter}, which is taken", line)
        if len(rest) - 1 != position.free.sum() or not all(re.fullmatch("[0-9]+", word) for word in rest[1:]):
            expected = f"decimals of the {position.free.sum()} free coordinates of {letter}"
            raise ParseError(ParseErrorKind.COORDINATES, number, expected, line)
        coords = np.zeros(3)
        coords[position.free] = [float(f"0.{word}") for word in rest[1:]]
        orbit = Orbit(ATOMIC_NUMBER[symbol], letter, tuple(position.representative(coords).tolist()))
        points = orbit_points(here, orbit)
        if len(points) != here.atoms(letter):
            expected = f"coordinates of {letter} that lie on no more special position"
            raise ParseError(ParseErrorKind.ORBIT, number, expected, line)
        if any(same(points[0], theirs).any() for theirs in taken.setdefault(letter, [])):
            raise ParseError(ParseErrorKind.ORBIT, number, f"points of {letter} that are not taken", line)
        taken[letter].append(points)
        yield orbit


def _cell(line: str, here: Group, number: int) -> np.ndarray:
    words = line.split(" ")
    free = SYSTEMS[here.system][0]
    if len(words) != len(free) or not all(_NUMBER.fullmatch(word) for word in words):
        expected = f"{len(free)} free lattice parameters of a {here.system} cell"
        raise ParseError(ParseErrorKind.LATTICE, number, expected, line)
    cell = cell_of(here.system, np.array([float(word) for word in words]))
    if not (0 < cell[:3].min() and cell[:3].max() < LONGEST):
        raise ParseError(ParseErrorKind.CELL, number, f"lengths between 0 and {LONGEST} Å", line)
    if not (0 < cell[3:].min() and cell[3:].max() < 180 and closes(cell[:3], cell[3:])):
        raise ParseError(ParseErrorKind.CELL, number, "angles that close a cell", line)
    try:
        Crystal.from_vectors(primitive_vectors(here, cell[:3], cell[3:]), np.array([1]), np.zeros((1, 3)))
    except (UserError, np.linalg.LinAlgError):
        raise ParseError(ParseErrorKind.CELL, number, "a cell that is not flat", line) from None
    return cell
