"""What the device writes symmetry texts with, once a tokenizer was tried on all that has a neighbour in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.crystals.wyckoff import LETTERS
from jaxcrystal.texts.conditions import Properties
from jaxcrystal.texts.pieces import EMPTY, ragged
from jaxcrystal.texts.prompts import MASK
from jaxcrystal.texts.symmetry.text import REQUEST
from jaxcrystal.texts.token_tables import Comparison, Reader, TokenTables
from jaxcrystal.texts.tokenizer import Tokenizer


@dataclass(frozen=True)
class SymmetryTables(TokenTables):
    """With what stands behind a space: elements behind a number, letters behind an element."""

    spaced_elements: Int[np.ndarray, "119 element"]  #: by atomic number, with the space before
    letters: Int[np.ndarray, "27 letter"]  #: of Wyckoff positions, with the space before
    mask_count: Int[np.ndarray, "mask"]  #: [MASK] before a number, with the space between
    mask_letters: Int[np.ndarray, "27 mask"]  #: [MASK] with each letter

    @classmethod
    def build(cls, tokenizer: Tokenizer, properties: Properties = ()) -> SymmetryTables:
        """Raises UserError if `tokenizer` does not cut texts where pieces meet, naming the text that shows it."""
        after = Reader(tokenizer)
        tables = cls(
            **vars(TokenTables.read(tokenizer, REQUEST, begins="Sr 1")),
            spaced_elements=ragged([[], *(after.tokens("\n1", f" {symbol}") for symbol in ELEMENTS[1:])]),
            letters=ragged([after.tokens("\nSr", f" {letter}") for letter in LETTERS]),
            mask_count=after.tokens("\n", f"{MASK} ", before="1"),
            mask_letters=ragged([after.tokens("\n", f"{MASK} {letter}") for letter in LETTERS]),
        )
        comparison = Comparison(tokenizer, tables, REQUEST)
        for lines in _texts(tables.group):
            comparison.generation((lines, tables.spell(lines)))
        for lines in _texts(1):
            symbol = lines.split(" ")[0]
            masked = re.sub(rf"(?m)^{symbol} ", f"{MASK} ", lines)
            comparison.infilling((masked, tables.spell(masked)), symbol)
        comparison.sentences(properties)
        return tables

    def spell(self, lines: str) -> list[int]:
        """Tokens of a text, piece by piece, as the device writes them."""
        composition, number, *orbits, cell = lines.split("\n")
        tokens: list[int] = []
        words = composition.split(" ")
        for place, (symbol, count) in enumerate(zip(words[::2], words[1::2], strict=True)):
            if symbol == MASK:
                tokens += [*self.mask_count.tolist(), *self.digit_tokens(count)]
                continue
            table = self.spaced_elements if place else self.elements
            tokens += [*_row(table, ATOMIC_NUMBER[symbol]), self.space, *self.digit_tokens(count)]
        tokens += [self.newline, *self.digit_tokens(number), self.newline]
        for line in orbits:
            symbol, letter, *coords = line.split(" ")
            at = LETTERS.index(letter)
            tokens += (
                _row(self.mask_letters, at) if symbol == MASK else self.symbol_tokens(symbol) + _row(self.letters, at)
            )
            for digits in coords:
                tokens += [self.space, *self.digit_tokens(digits)]
            tokens.append(self.newline)
        for place, value in enumerate(cell.split(" ")):
            whole, point, decimals = value.partition(".")
            tokens += [self.space] * (place > 0) + self.digit_tokens(whole)
            tokens += [self.point, *self.digit_tokens(decimals)] if point else []
        return tokens


def _row(table: Int[np.ndarray, "rows width"], at: int) -> list[int]:
    return [token for token in table[at].tolist() if token != EMPTY]


def _texts(group: int) -> Iterator[str]:
    """Texts, mostly of no crystal, in which every number, symbol, letter and separator has all its neighbours."""
    for width in range(1, group + 1):
        for value in range(10**width):
            n = f"{value:0{width}}"
            yield f"H {n} O {n}\n{n}\nH a {n} {n} {n}\nO b {n}\n{n} {n}.{n} {n}.{n} {n}"
    for z, symbol in enumerate(ELEMENTS[1:], start=1):
        other, letter, next_letter = ELEMENTS[z % 118 + 1], LETTERS[z % 27], LETTERS[(z + 1) % 27]
        yield f"{symbol} 1 {other} 2\n12\n{symbol} {letter}\n{other} {next_letter} 05\n{symbol} {next_letter} 5\n4.0"
    random = np.random.default_rng(0)
    for _ in range(100):
        symbols = [ELEMENTS[z] for z in random.choice(np.arange(1, 119), 3, replace=False)]
        counts = " ".join(f"{symbol} {random.integers(1, 100)}" for symbol in symbols)
        lines = [
            " ".join([symbol, LETTERS[random.integers(27)], *(f"{x:0{d}}" for x in random.integers(0, 10**d, free))])
            for symbol in symbols
            for d, free in [(int(random.integers(1, 5)), int(random.integers(0, 4)))]
        ]
        cell = " ".join(f"{x:.{d}f}" for d, x in zip(random.integers(0, 5, 6), random.uniform(1, 199, 6), strict=True))
        yield "\n".join([counts, str(random.integers(1, 231)), *lines, cell])
