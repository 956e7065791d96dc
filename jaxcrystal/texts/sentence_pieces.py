"""SentencePiece models: LLaMA-2's and its kin's, and the compact one that ships with the package.

The compact tokenizers (digits, separators, elements, the words of the prompts, bytes for all the rest) are for models
trained from scratch, whose embedding would otherwise be most of their weights: `compact` (448 pieces) for P1 texts,
`compact-symmetry` with a piece for two digits, an element behind a space, a Wyckoff letter, a sentence of the prompts.
They are built anew alike.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sentencepiece

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.wyckoff import LETTERS
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.texts import conditions, prompts
from jaxcrystal.texts.p1.text import REQUEST
from jaxcrystal.texts.prompts import INFILL_INTRODUCTION, INFILL_REQUEST, INTRODUCTION, MASK
from jaxcrystal.texts.symmetry import text as symmetry

COMPACT = Path(__file__).with_name("compact.model")
COMPACT_SYMMETRY = Path(__file__).with_name("compact-symmetry.model")
NAMED = {"compact": COMPACT, "compact-symmetry": COMPACT_SYMMETRY}  #: that come with the package
PAD = "[PAD]"  #: the piece that crystal-text-llm adds to LLaMA-2's vocabulary


class SentencePieceTokenizer:
    """A SentencePiece model file. Raises UserError if it is none."""

    file_name = "tokenizer.model"
    ends: Mapping[str, Any] = MappingProxyType({})  #: the file says them

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.file = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.file)
        except (RuntimeError, OSError):
            raise UserError(f"{path} is not a SentencePiece model{_instead(self.file)}") from None
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        # LLaMA-2 has none until `with_pad` adds it: <unk> stands in, under the loss mask.
        self.pad_id: int = max(self._model.pad_id(), 0)
        bos = self._model.bos_id()
        if bos < 0 or self.eos_id < 0:
            raise UserError(f"{path} has no beginning- or end-of-sequence piece; jaxcrystal needs both")
        self.begin: tuple[int, ...] = (bos,)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    @cached_property
    def special(self) -> dict[str, tuple[str, int]]:
        """The pieces that are no text and their ids, by role: bos, eos, unk and, where there is one, pad."""
        ids = {role: getattr(self._model, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
        return {role: (self._model.id_to_piece(i), i) for role, i in ids.items() if i >= 0}

    @cached_property
    def sha256(self) -> str:
        """Hash of the model file: models and samples name the tokenizer that they belong to."""
        return hashlib.sha256(self.file).hexdigest()


def _instead(file: bytes) -> str:
    """What it may be."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file):
        return (
            ", but tiktoken's list of tokens, which Meta ships with LLaMA-3 under this name; take the tokenizer.json "
            "of the Hugging Face release"
        )
    return ""


def with_pad(model: bytes) -> bytes:
    """A SentencePiece model file with the control piece [PAD] behind all others; itself if it has a piece for padding.

    Tokens of texts stay as they are: no text holds a control piece.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    return model if tokenizer.pad_id() >= 0 else model + _pad_piece(tokenizer.vocab_size())


def without_pad(model: bytes) -> bytes:
    """The opposite of `with_pad`; a model to which that added nothing is returned as it is."""
    last = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size() - 1
    return model.removesuffix(_pad_piece(last))


def _pad_piece(i: int) -> bytes:
    """What, appended to a model file, makes piece `i` the padding.

    Protocol buffers merge when they are joined: `pieces` (field 1 of the model) grows by one, and what `trainer_spec`
    (field 2) then states of padding is added to what it stated of all else.
    """

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def text(field: int, value: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(value)) + value

    def integer(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    piece = text(1, PAD.encode()) + varint(2 << 3 | 5) + bytes(4) + integer(3, 3)  # score 0.0; 3: a control piece
    return text(1, piece) + text(2, integer(43, i) + text(48, PAD.encode()))  # pad_id, pad_piece


def train_compact_symmetry() -> bytes:
    """`compact-symmetry.model`, built anew: it is exactly this."""
    numbers = [*"0123456789", *(f"{value:02}" for value in range(100))]
    behind_a_space = [f"▁{piece}" for piece in (*ELEMENTS[1:], *LETTERS)]
    # What every prompt says is one piece: a model from scratch reads it once, not word by word.
    said = [f" {INTRODUCTION}", symmetry.REQUEST, f" {INFILL_INTRODUCTION}", INFILL_REQUEST]
    said += [f" {subject}" for subject in conditions.subjects()]
    sentences = [sentence.replace(" ", "▁") for sentence in said]
    return train_compact(*numbers, *behind_a_space, *sentences, request=symmetry.REQUEST)


def train_compact(*pieces: str, request: str = REQUEST) -> bytes:
    """The compact tokenizer's model file, built anew: `compact.model` is exactly this. Its kin have further pieces."""
    words = [word.replace(" ", "▁") for word in prompts.words(request)]
    pieces = tuple(piece for piece in dict.fromkeys(pieces) if piece not in words)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["0123456789", ' .,:()-"']),
        model_writer=model,
        model_type="char",
        vocab_size=512 + len(pieces),
        hard_vocab_limit=False,
        user_defined_symbols=["\n", MASK, *ELEMENTS[1:], *words, *pieces],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
