"""Words of a text, token by token: symbols at the beginning of a line, symbols behind a count, letters of positions.

Their tokens lead through a tree with three roots. A node knows the word that is complete there, if any, and which ones
still lie ahead. Several words may begin alike ("C" and "Ca" in letters of their own, or all with a space), and a word
may have the space that stands before it as a token of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int16, UInt32

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.crystals.formulas import ordered
from jaxcrystal.crystals.wyckoff import LETTERS
from jaxcrystal.texts.pieces import EMPTY

LINE, SPACED, LETTER = range(3)  #: roots, and so the first nodes
ORDER = [0, *(ATOMIC_NUMBER[symbol] for symbol in ordered(ELEMENTS[1:]))]  #: atomic numbers as formulas name elements
NUMBER_OF_WORDS = len(ELEMENTS) + len(LETTERS)  #: elements in that order (0 is none), and behind them letters
NO_WORD = 0


class WordTables(Protocol):
    """The tokens of words; rows are padded with EMPTY."""

    elements: Int[np.ndarray, "119 width"]  #: by atomic number, at the beginning of a line
    spaced_elements: Int[np.ndarray, "119 width"]  #: behind a count, with the space
    letters: Int[np.ndarray, "27 width"]  #: behind a symbol, with the space
    space: int


@dataclass(frozen=True, eq=False)
class Words:
    """The tree. Its columns are the space's token and `symbols`."""

    symbols: Int[np.ndarray, "symbols"]  #: tokens of words, but for the space's
    child: Int16[np.ndarray, "nodes columns"]  #: the last node leads to no word
    complete: Int16[np.ndarray, "nodes"]  #: the word that ends there, or NO_WORD
    behind: UInt32[np.ndarray, "nodes words"]  #: those that can still come, a bit each

    @classmethod
    def build(cls, tables: WordTables) -> Words:
        words = dict(_words(tables))
        tokens = [tables.space, *sorted({token for _, word in words for token in word} - {tables.space})]
        column = {token: i for i, token in enumerate(tokens)}
        starts = [(root, word[:n]) for root, word in words for n in range(1, len(word) + 1)]
        paths = [(LINE, ()), (SPACED, ()), (LETTER, ()), *sorted(set(starts), key=lambda path: len(path[1]))]
        node = {path: i for i, path in enumerate(paths)}
        child = np.full((len(paths) + 1, len(tokens)), len(paths), np.int16)
        complete = np.full(len(paths) + 1, NO_WORD, np.int16)
        for (root, word), at in node.items():
            complete[at] = words.get((root, word), NO_WORD)
            if word:
                child[node[root, word[:-1]], column[word[-1]]] = at
        ahead = complete[:, None] == np.arange(NUMBER_OF_WORDS)
        ahead[:, NO_WORD] = False
        for at in reversed(range(len(child))):  # children come after their parent; the last node is its own child
            ahead[at] |= ahead[child[at]].any(0)
        return cls(np.array(tokens[1:], np.int32), child, complete, np.asarray(packed(ahead)))

    def next(self, node: Int[Array, "slots"], wanted: Bool[Array, "slots words"]) -> Bool[Array, "slots columns"]:
        """Columns that lead to a wanted word."""
        behind = jnp.asarray(self.behind)[jnp.asarray(self.child)[node]]
        return (behind & packed(wanted)[:, None] != 0).any(-1)


def _words(tables: WordTables) -> Iterator[tuple[tuple[int, tuple[int, ...]], int]]:
    """Root and tokens of every word, and the word."""
    for place, number in enumerate(ORDER[1:], 1):
        for root, rows in ((LINE, tables.elements), (SPACED, tables.spaced_elements)):
            yield (root, _row(rows[number])), place
    for letter, row in enumerate(tables.letters):
        yield (LETTER, _row(row)), len(ELEMENTS) + letter


def _row(row: Int[np.ndarray, "width"]) -> tuple[int, ...]:
    return tuple(int(token) for token in row if token != EMPTY)


def packed(flags: Bool[Array, "*n flags"]) -> UInt32[Array, "*n words"]:
    """32 of them a word."""
    size = flags.shape[-1]
    flags = jnp.pad(flags, [(0, 0)] * (flags.ndim - 1) + [(0, -size % 32)])
    bits = flags.reshape(*flags.shape[:-1], -1, 32) * (jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32))
    return bits.sum(-1, dtype=jnp.uint32)
