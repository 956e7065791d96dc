"""The tokens of every piece that a text is made of, read off a tokenizer: what the device writes crystals with.

    Below … ⏎ │ 5 │ . │ 2 │ ␣ │ … │ ⏎ │ Na │ ⏎ │ 0 │ . │ 5 │ 0 │ ␣ │ … │ ⏎ │ [MASK] ⏎ │ …

This works for a tokenizer that cuts texts where these pieces meet: no token may reach over a digit and a space, say, or
over a symbol and its line feed. A run of digits is one token each (LLaMA-2, SmolLM2, Qwen) or groups of three from its
left (LLaMA-3). `[MASK]` and the prompts are tokenized with the line feed behind them, which some tokenizers join to a
bracket or a colon. A scan of the vocabulary would not tell: a token that joins a space to a line feed is no harm where
no text brings it up. So `build` writes texts in which every piece stands beside all that can be its neighbours, then
random crystals, and compares them with the tokenizer's own tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxcrystal.config import ATTRIBUTES, TextFormat
from jaxcrystal.crystals import prompts, text
from jaxcrystal.crystals.conditions import sentence
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal
from jaxcrystal.crystals.text import MASK
from jaxcrystal.crystals.tokenizer import Tokenizer
from jaxcrystal.errors import UserError

EMPTY = -1  #: no token; only behind the tokens of a row
REMEDY = (
    "use a tokenizer that has every digit and letter, and keeps digits, spaces, line feeds and letters apart, as those "
    "of SmolLM2, LLaMA, Qwen and Mistral do"
)
GROUPED = 3  #: digits of a token, where they are grouped at all

_PIECE = re.compile(r"(?P<digits>[0-9]+)|(?P<mask>\[MASK\]\n)|(?P<symbol>[A-Z][a-z]?)|(?P<mark>[. \n])")


@dataclass(frozen=True)
class TokenTables:
    """Tokens by piece; ragged tables are padded with EMPTY."""

    digits: Int[np.ndarray, "numbers"]  #: 0 to 9; where digits are grouped, then 00 to 99 and 000 to 999
    point: int
    space: int
    newline: int
    elements: Int[np.ndarray, "119 element"]  #: by atomic number
    mask: Int[np.ndarray, "mask"]  #: with the line feed behind it
    introduction: Int[np.ndarray, "introduction"]
    request: Int[np.ndarray, "request"]
    infill_introduction: Int[np.ndarray, "infill_introduction"]
    infill_request: Int[np.ndarray, "infill_request"]
    eos: int
    pad: int

    @classmethod
    def build(cls, tokenizer: Tokenizer) -> TokenTables:
        """Raises UserError if `tokenizer` does not cut texts where pieces meet, naming the text that shows it."""
        after = _Reader(tokenizer)
        group = GROUPED if len(after.tokens("\n", "1" * GROUPED)) == 1 else 1
        numbers = (f"{value:0{width}}" for width in range(1, group + 1) for value in range(10**width))
        begin = list(tokenizer.begin)
        tables = cls(
            digits=np.array([after.one("\n", number) for number in numbers], np.int32),
            point=after.one("\n0", "."),
            space=after.one("\n0", " ", before="0"),
            newline=after.one("\n0", "\n", before="0"),
            elements=ragged([[], *(after.tokens("\n", symbol) for symbol in ELEMENTS[1:])]),
            mask=after.tokens("\n", f"{MASK}\n", before="0"),
            introduction=np.array(begin + tokenizer.encode(prompts.INTRODUCTION), np.int32),
            request=after.tokens(prompts.INTRODUCTION, prompts.REQUEST, before="0"),
            infill_introduction=np.array(begin + tokenizer.encode(prompts.INFILL_INTRODUCTION), np.int32),
            infill_request=after.tokens("\n0", prompts.INFILL_REQUEST, before="H"),
            eos=tokenizer.eos_id,
            pad=tokenizer.pad_id,
        )
        tables.check(tokenizer)
        return tables

    @property
    def group(self) -> int:
        """Digits of the widest token: a run of digits is cut into such groups, from its left."""
        return 1 if len(self.digits) == 10 else GROUPED

    def digit_tokens(self, run: str) -> list[int]:
        """Tokens of a run of digits."""
        groups = (run[i : i + self.group] for i in range(0, len(run), self.group))
        return [int(self.digits[(10 ** len(g) - 10) // 9 + int(g)]) for g in groups]

    def spell(self, text: str) -> list[int]:
        """Tokens of lines of a crystal, piece by piece, as the device writes them."""
        marks = {".": self.point, " ": self.space, "\n": self.newline}
        tokens: list[int] = []
        for piece in _PIECE.finditer(text):
            if run := piece["digits"]:
                tokens += self.digit_tokens(run)
            elif piece["mask"]:
                tokens += self.mask.tolist()
            elif symbol := piece["symbol"]:
                tokens += [t for t in self.elements[ATOMIC_NUMBER[symbol]].tolist() if t != EMPTY]
            else:
                tokens.append(marks[piece["mark"]])
        return tokens

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises UserError if `tokenizer` has other tokens for a text than its pieces have, one after the other."""
        asking = (prompts.INFILL_INTRODUCTION, self.infill_introduction)
        answering = (prompts.INFILL_REQUEST, self.infill_request)
        asked = (prompts.INTRODUCTION + prompts.REQUEST, [*self.introduction, *self.request])
        for lines in self._lines():
            masked = re.sub(r"[A-Z][a-z]?\n", f"{MASK}\n", lines)
            for parts in (
                [asked, (lines, self.spell(lines))],
                [asking, (masked, self.spell(masked)), answering, ("H", self.spell("H"))],
            ):
                self._compare(tokenizer, parts)
        for symbol in ELEMENTS[1:]:
            self._compare(tokenizer, [asking, answering, (symbol, self.spell(symbol))])
        self._check_sentences(tokenizer)

    def _lines(self) -> Iterator[str]:
        """Every number, symbol and separator beside all that can stand there; then runs of digits, then crystals."""
        for width in range(1, self.group + 1):
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

    def _check_sentences(self, tokenizer: Tokenizer) -> None:
        """Every sentence before and behind every other, and before the request."""
        values = ("NaCl", ["Cl", "Na"], 225, -1.25, 8.5, 0.0)
        stated = [sentence(name, value) for name, value in zip(ATTRIBUTES, values, strict=True)]
        begin = len(tokenizer.encode(prompts.INTRODUCTION))
        each = [(words, tokenizer.encode(prompts.INTRODUCTION + words)[begin:]) for words in stated]
        introduction, request = (prompts.INTRODUCTION, self.introduction), (prompts.REQUEST, self.request)
        for one in each:
            for other in each:
                self._compare(tokenizer, [introduction, one, other, request])

    def _compare(self, tokenizer: Tokenizer, parts: Sequence[tuple[str, Sequence[int]]]) -> None:
        ours = [int(token) for _, tokens in parts for token in tokens]
        words = "".join(part for part, _ in parts)
        theirs = [*tokenizer.begin, *tokenizer.encode(words)]
        if ours == theirs:
            self._compare_back(tokenizer, theirs, words)
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        here = slice(max(0, at - 2), at + 3)
        shown = [" | ".join(repr(tokenizer.decode([t])) for t in tokens[here]) for tokens in (theirs, ours)]
        raise UserError(
            f"{tokenizer.path} joins or cuts pieces of crystals: it has {shown[0]} where the device would write "
            f"{shown[1]}; {REMEDY}"
        )

    @staticmethod
    def _compare_back(tokenizer: Tokenizer, tokens: Sequence[int], words: str) -> None:
        """A piece that a tokenizer lacks has the token of all that it lacks, which says nothing."""
        again = tokenizer.decode(tokens[len(tokenizer.begin) :])
        if again != words:
            at = next((i for i, (a, b) in enumerate(zip(words, again, strict=False)) if a != b), len(again))
            near = slice(max(0, at - 10), at + 10)
            raise UserError(
                f"{tokenizer.path} cannot write {words[at : at + 1]!r}: its tokens of {words[near]!r} say "
                f"{again[near]!r}; {REMEDY}"
            )


class _Reader:
    """Reads tokens of a text behind another one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def tokens(self, context: str, piece: str, before: str = "") -> Int[np.ndarray, "tokens"]:
        """Those of `piece` between `context` and `before`. Raises UserError if they reach over into these."""
        encode = self._tokenizer.encode
        front, whole, back = encode(context), encode(context + piece + before), encode(f"\n{before}") if before else []
        behind = back[len(encode("\n")) :]
        if whole[: len(front)] != front or whole[len(whole) - len(behind) :] != behind:
            raise UserError(
                f"{self._tokenizer.path}: the tokens of {context[-12:]!r} or {before!r} change beside {piece!r}; "
                f"{REMEDY}"
            )
        return np.array(whole[len(front) : len(whole) - len(behind)], np.int32)

    def one(self, context: str, piece: str, before: str = "") -> int:
        """Raises UserError unless it is a single token."""
        tokens = self.tokens(context, piece, before)
        if len(tokens) != 1:
            raise UserError(
                f"{self._tokenizer.path} writes {piece!r} as {len(tokens)} tokens; the device needs one: {REMEDY}"
            )
        return int(tokens[0])


def _random_crystal(random: np.random.Generator) -> Crystal:
    n = int(random.integers(1, 9))
    species = random.integers(1, len(ELEMENTS), n)
    return Crystal(random.uniform(1, 99, 3), random.uniform(60, 120, 3), species, random.uniform(0, 1, (n, 3)))


def ragged(rows: Sequence[Sequence[int] | np.ndarray]) -> Int[np.ndarray, "rows width"]:
    """Rows of different lengths as a table that EMPTY fills."""
    table = np.full((len(rows), max((len(r) for r in rows), default=0)), EMPTY, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
