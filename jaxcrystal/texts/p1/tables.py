"""What the device writes P1 texts with, once a tokenizer was tried on all that stands beside something in them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.texts.conditions import Properties
from jaxcrystal.texts.p1 import text
from jaxcrystal.texts.prompts import MASK
from jaxcrystal.texts.token_tables import Comparison, TokenTables
from jaxcrystal.texts.tokenizer import Tokenizer

_PIECE = re.compile(r"(?P<digits>[0-9]+)|(?P<mask>\[MASK\]\n)|(?P<symbol>[A-Z][a-z]?)|(?P<mark>[. \n])")


def build(tokenizer: Tokenizer, properties: Properties = ()) -> TokenTables:
    """Raises UserError if `tokenizer` does not cut texts where pieces meet, naming the text that shows it."""
    tables = TokenTables.read(tokenizer, text.REQUEST, begins="0")
    comparison = Comparison(tokenizer, tables, text.REQUEST)
    for lines in _lines(tables.group):
        comparison.generation((lines, spell(tables, lines)))
        masked = re.sub(r"[A-Z][a-z]?\n", f"{MASK}\n", lines)
        comparison.infilling((masked, spell(tables, masked)), "H")
    for symbol in ELEMENTS[1:]:
        comparison.infilling(("", []), symbol)
    comparison.sentences(properties)
    return tables


def spell(tables: TokenTables, lines: str) -> list[int]:
    """Tokens of lines of a crystal, piece by piece, as the device writes them."""
    marks = {".": tables.point, " ": tables.space, "\n": tables.newline}
    tokens: list[int] = []
    for piece in _PIECE.finditer(lines):
        if run := piece["digits"]:
            tokens += tables.digit_tokens(run)
        elif piece["mask"]:
            tokens += tables.mask.tolist()
        elif symbol := piece["symbol"]:
            tokens += tables.symbol_tokens(symbol)
        else:
            tokens.append(marks[piece["mark"]])
    return tokens


def _lines(group: int) -> Iterator[str]:
    """Every number, symbol and separator beside all that can stand there; then runs of digits, then crystals."""
    for width in range(1, group + 1):
        for value in range(10**width):
            n = f"{value:0{width}}"
            yield f"{n} {n} {n}.{n} {n}.{n}\n{n}.{n}\nH\n{n}\nH\n{n}.{n} {n}"
    for symbol in ELEMENTS[1:]:
        yield f"1.0\n{symbol}\n0.5\n{symbol}\n5\n{symbol}\n0"
    random = np.random.default_rng(0)
    for width in range(1, 8):
        for value in random.integers(0, 10**width, 200):
            yield f"{value % 1000}.{value:0{width}} {value % 1000}.{value:0{width}}\n0.{value:0{width}}"
    for decimals in range(1, 7):
        fmt = TextFormat(length_decimals=min(decimals, 4), angle_decimals=decimals % 3, coord_decimals=decimals)
        yield from (text.write(_random_crystal(random), fmt) for _ in range(20))


def _random_crystal(random: np.random.Generator) -> Crystal:
    n = int(random.integers(1, 9))
    species = random.integers(1, len(ELEMENTS), n)
    return Crystal(random.uniform(1, 99, 3), random.uniform(60, 120, 3), species, random.uniform(0, 1, (n, 3)))
