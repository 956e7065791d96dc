"""Text to tokens and back, by the library that the tokenizer was made for: on the host only.

    tokenizer.model    SentencePiece: LLaMA-2, TinyLlama, Mistral, and what ships with the package
    tokenizer.json     byte-level BPE (`tokenizers`): SmolLM2, LLaMA-3, Qwen, Mistral's Tekken

`token_tables` reads off either what the device needs to write crystals by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, as_path

SENTENCE_PIECES, BYTE_PAIRS = "tokenizer.model", "tokenizer.json"
FILES = (SENTENCE_PIECES, BYTE_PAIRS)  #: the first that a directory has is its tokenizer's


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    path: AnyPath  #: from where it was read
    file: bytes  #: what is there
    file_name: str  #: of `FILES`: how a model directory calls it
    ends: Mapping[str, Any]  #: `begin` and `end` for `load_tokenizer`, where the file does not say
    vocab_size: int  #: ids are below
    begin: tuple[int, ...]  #: tokens that stand in front of every text; none for some
    eos_id: int  #: ends every text
    pad_id: int  #: fills rows where no loss is taken; any valid id
    sha256: str  #: hash of the file: models and samples name the tokenizer that they belong to
    special: dict[str, tuple[str, int]]  #: pieces that are no text and their ids, by role: bos, eos, unk, pad

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without beginning and end of sequence."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the inverse of `encode`."""
        ...


def load_tokenizer(path: str | AnyPath, begin: Sequence[int] | None = None, end: int | None = None) -> Tokenizer:
    """The tokenizer of a file, of a model's directory, or of the name `compact` or `compact-symmetry`.

    A tokenizer.json does not say which token ends a text: `begin` and `end` are those of a model's description, or the
    files beside it are asked. A tokenizer.model says it itself.

    Raises UserError if there is none, or if its file is no tokenizer's.
    """
    from jaxcrystal.texts.byte_pairs import BytePairTokenizer
    from jaxcrystal.texts.sentence_pieces import NAMED, SentencePieceTokenizer

    path = NAMED.get(str(path)) or as_path(path)
    path = next((path / name for name in FILES if (path / name).exists()), path)
    if not path.exists() or path.is_dir():
        names = " or ".join(f"`{name}`" for name in NAMED)
        raise UserError(
            f"no tokenizer at {path}; give a {' or a '.join(FILES)}, a directory with one, or one of {names}"
        )
    return BytePairTokenizer(path, begin, end) if path.suffix == ".json" else SentencePieceTokenizer(path)
