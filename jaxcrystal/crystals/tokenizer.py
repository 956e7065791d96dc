"""Text to tokens and back: LLaMA-2's SentencePiece model, or the compact one that ships with the package.

Both are SentencePiece models behind one class. The compact tokenizer (448 pieces: digits, separators, elements, the
words of the prompts, bytes for all the rest) is for models trained from scratch, whose embedding would otherwise be
most of their weights. `train_compact` builds it, reproducibly.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import sentencepiece

from jaxcrystal.crystals import prompts
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.text import MASK
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, as_path

COMPACT = Path(__file__).with_name("compact.model")
PAD = "[PAD]"  #: the piece that crystal-text-llm adds to LLaMA-2's vocabulary


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int  #: fills rows where no loss is taken; any valid id

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without beginning and end of sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the inverse of `encode`."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model file."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._file = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor(model_proto=self._file)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        # LLaMA-2 has none until `with_pad` adds it: <unk> stands in, under the loss mask.
        self.pad_id: int = max(self._model.pad_id(), 0)
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"{path} has no beginning- or end-of-sequence piece; jaxcrystal needs both")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    @cached_property
    def pieces(self) -> list[str]:
        """What each id stands for, as text; empty for control and unknown pieces, a character for a byte piece."""

        def piece(i: int) -> str:
            if self._model.is_control(i) or self._model.is_unknown(i):
                return ""
            text = self._model.id_to_piece(i)
            return chr(int(text[3:5], 16)) if self._model.is_byte(i) else text.replace("▁", " ")

        return [piece(i) for i in range(self.vocab_size)]

    @cached_property
    def special(self) -> dict[str, tuple[str, int]]:
        """The pieces that are no text and their ids, by role: bos, eos, unk and, where there is one, pad."""
        ids = {role: getattr(self._model, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
        return {role: (self._model.id_to_piece(i), i) for role, i in ids.items() if i >= 0}

    @cached_property
    def sha256(self) -> str:
        """Hash of the model file: models and samples name the tokenizer that they belong to."""
        return hashlib.sha256(self._file).hexdigest()


def load_tokenizer(path: str | AnyPath) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model file, or of the name `compact`. Raises UserError if there is none."""
    path = COMPACT if str(path) == "compact" else as_path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"no tokenizer at {path}; give a SentencePiece file (LLaMA-2: tokenizer.model) or `compact`")
    try:
        return SentencePieceTokenizer(path)
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a SentencePiece model") from None


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


def train_compact() -> bytes:
    """The compact tokenizer's model file, built anew: `compact.model` is exactly this."""
    words = [word.replace(" ", "▁") for word in prompts.words()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["0123456789", ' .,:()-"']),
        model_writer=model,
        model_type="char",
        vocab_size=512,
        hard_vocab_limit=False,
        user_defined_symbols=["\n", MASK, *ELEMENTS[1:], *words],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
