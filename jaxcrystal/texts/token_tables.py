"""The tokens of the pieces that texts of every form are made of, read off a tokenizer: what the device writes with.

    Below … ⏎ │ 5 │ . │ 2 │ ␣ │ … │ ⏎ │ Na │ ⏎ │ 0 │ . │ 5 │ 0 │ ␣ │ … │ ⏎ │ [MASK] ⏎ │ …

This works for a tokenizer that cuts texts where these pieces meet: no token may reach over a digit and a space, say, or
over a symbol and its line feed. A run of digits is one token each (LLaMA-2, SmolLM2, Qwen) or groups of two or three
from its left (LLaMA-3). `[MASK]` and the prompts are tokenized with the line feed behind them, which some tokenizers
join to a bracket or a colon. A scan of the vocabulary would not tell: a token that joins a space to a line feed is no
harm where no text brings it up. So a form writes texts in which every piece stands beside all that can be its
neighbours, then random crystals, and compares them with the tokenizer's own tokens (`Comparison`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.texts import prompts
from jaxcrystal.texts.conditions import Properties, known, sentence
from jaxcrystal.texts.pieces import EMPTY, ragged
from jaxcrystal.texts.prompts import MASK
from jaxcrystal.texts.tokenizer import Tokenizer

REMEDY = (
    "use a tokenizer that has every digit and letter, and keeps digits, spaces, line feeds and letters apart, as those "
    "of SmolLM2, LLaMA, Qwen and Mistral do"
)
GROUPED = 3  #: digits of a token at most

Part: TypeAlias = tuple[str, Sequence[int]]  #: of a text, and the tokens that the device has for it


@dataclass(frozen=True)
class TokenTables:
    """Tokens by piece; ragged tables are padded with EMPTY. A form that needs more of a tokenizer has more fields."""

    digits: Int[np.ndarray, "numbers"]  #: 0 to 9; where digits are grouped, then 00 to 99, and then 000 to 999
    point: int
    space: int
    newline: int
    elements: Int[np.ndarray, "119 element"]  #: by atomic number
    mask: Int[np.ndarray, "mask"]  #: with the line feed behind it
    introduction: Int[np.ndarray, "introduction"]
    request: Int[np.ndarray, "request"]  #: the form's own
    infill_introduction: Int[np.ndarray, "infill_introduction"]
    infill_request: Int[np.ndarray, "infill_request"]
    eos: int
    pad: int

    @classmethod
    def read(cls, tokenizer: Tokenizer, request: str, begins: str) -> TokenTables:
        """For a form whose prompts end with `request`, behind which a text may begin as `begins` does.

        Raises UserError if `tokenizer` has no such tokens; whether it cuts texts where they meet, a `Comparison` tells.
        """
        after = Reader(tokenizer)
        group = next((n for n in range(GROUPED, 1, -1) if len(after.tokens("\n", "1" * n)) == 1), 1)
        numbers = (f"{value:0{width}}" for width in range(1, group + 1) for value in range(10**width))
        begin = list(tokenizer.begin)
        return cls(
            digits=np.array([after.one("\n", number) for number in numbers], np.int32),
            point=after.one("\n0", "."),
            space=after.one("\n0", " ", before="0"),
            newline=after.one("\n0", "\n", before="0"),
            elements=ragged([[], *(after.tokens("\n", symbol) for symbol in ELEMENTS[1:])]),
            mask=after.tokens("\n", f"{MASK}\n", before="0"),
            introduction=np.array(begin + tokenizer.encode(prompts.INTRODUCTION), np.int32),
            request=after.tokens(prompts.INTRODUCTION, request, before=begins),
            infill_introduction=np.array(begin + tokenizer.encode(prompts.INFILL_INTRODUCTION), np.int32),
            infill_request=after.tokens("\n0", prompts.INFILL_REQUEST, before="H"),
            eos=tokenizer.eos_id,
            pad=tokenizer.pad_id,
        )

    @property
    def group(self) -> int:
        """Digits of the widest token: a run of digits is cut into such groups, from its left."""
        return len(str(len(self.digits))) - 1

    def digit_tokens(self, run: str) -> list[int]:
        """Tokens of a run of digits."""
        groups = (run[i : i + self.group] for i in range(0, len(run), self.group))
        return [int(self.digits[(10 ** len(g) - 10) // 9 + int(g)]) for g in groups]

    def symbol_tokens(self, symbol: str) -> list[int]:
        """Tokens of an element."""
        return [t for t in self.elements[ATOMIC_NUMBER[symbol]].tolist() if t != EMPTY]


@dataclass(frozen=True)
class Comparison:
    """Compares the tokens of a form's texts, piece by piece, with the tokenizer's own.

    Each method raises UserError where they differ, or where the tokenizer has no tokens of its own for a text.
    """

    tokenizer: Tokenizer
    tables: TokenTables
    request: str  #: the form's

    def generation(self, body: Part) -> None:
        """A crystal's text behind the prompt that states nothing."""
        asked = (prompts.INTRODUCTION + self.request, [*self.tables.introduction, *self.tables.request])
        self.equal([asked, body])

    def infilling(self, body: Part, answer: str) -> None:
        """A masked text, and the element that is asked for."""
        asking = (prompts.INFILL_INTRODUCTION, self.tables.infill_introduction)
        answering = (prompts.INFILL_REQUEST, self.tables.infill_request)
        self.equal([asking, body, answering, (answer, self.tables.symbol_tokens(answer))])

    def sentences(self, properties: Properties = ()) -> None:
        """Every sentence before and behind every other, and before the request."""
        values: tuple[Any, ...] = ("NaCl", ["Cl", "Na"], 225, -1.25, 8.5, 0.0)
        values += tuple("by hand" if own.decimals is None else 40.75 for own in properties)
        stated = [
            sentence(name, value, properties=properties) for name, value in zip(known(properties), values, strict=True)
        ]
        encode = self.tokenizer.encode
        begin = len(encode(prompts.INTRODUCTION))
        each = [(words, encode(prompts.INTRODUCTION + words)[begin:]) for words in stated]
        introduction, request = (prompts.INTRODUCTION, self.tables.introduction), (self.request, self.tables.request)
        for one in each:
            for other in each:
                self.equal([introduction, one, other, request])

    def equal(self, parts: Sequence[Part]) -> None:
        """A whole text, its beginning of sequence in the first part's tokens."""
        tokenizer = self.tokenizer
        ours = [int(token) for _, tokens in parts for token in tokens]
        words = "".join(part for part, _ in parts)
        theirs = [*tokenizer.begin, *tokenizer.encode(words)]
        if ours == theirs:
            self._has(theirs, words)
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

    def _has(self, tokens: Sequence[int], words: str) -> None:
        """A piece that a tokenizer lacks has the token of all that it lacks, which says nothing."""
        again = self.tokenizer.decode(tokens[len(self.tokenizer.begin) :])
        if again != words:
            at = next((i for i, (a, b) in enumerate(zip(words, again, strict=False)) if a != b), len(again))
            near = slice(max(0, at - 10), at + 10)
            raise UserError(
                f"{self.tokenizer.path} cannot write {words[at : at + 1]!r}: its tokens of {words[near]!r} say "
                f"{again[near]!r}; {REMEDY}"
            )


class Reader:
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
