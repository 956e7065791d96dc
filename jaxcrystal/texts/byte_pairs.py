"""Byte-level BPE, as the models of today have it: a `tokenizer.json`, or the tokens and merges of a GGUF.

A text is first cut by a pattern (into words, runs of digits, runs of marks), then each part is put together from bytes
by merges. Which pattern decides how numbers are spelled: digit by digit (SmolLM2, Qwen, Tekken) or in groups of three
(LLaMA-3). A GGUF gives the pattern's name alone; `PATTERNS` has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

#: `tokenizer.ggml.pre`, as llama.cpp calls them, and the patterns that cut a text, one after the other.
PATTERNS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (rf"{LETTERS}|\p{{N}}{{1,3}}|{MARKS}",),
    "qwen2": (rf"{LETTERS}|\p{{N}}|{MARKS}",),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "gpt-2": (GPT2,),
}

#: Those whose texts begin with a token unless their file says no, and in which a word that is a token needs no merges.
TIKTOKEN = ("llama-bpe", "tekken")

#: Files beside a tokenizer.json, and by which key they say what ends a text: of a model directory, of Hugging Face's.
ENDS = (("model.json", "end"), ("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id"))


class BytePairTokenizer:
    """A `tokenizer.json`, read by the library that made it.

    `begin` and `end` are the tokens around every text; by default what the tokenizer itself puts in front, and what the
    files beside it call the end of a sequence. Raises UserError if it is no such file, or if nothing says what ends.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: AnyPath, begin: Sequence[int] | None = None, end: int | None = None) -> None:
        try:
            import tokenizers  # here: only models that have such a tokenizer need it
        except ImportError:
            raise UserError(f"{path} needs the package tokenizers; pip install 'jaxcrystal[gguf]'") from None

        self.path = path
        self.file = path.read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self.file)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer.json ({_reason(error)})") from None
        if not (tokens := self._model.get_vocab(with_added_tokens=True)):
            raise UserError(f"{path} is not a tokenizer.json (it has no tokens)")
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # what looks like one in a text is text
        self.vocab_size: int = max(tokens.values()) + 1
        self.begin = tuple(self._in_front() if begin is None else begin)
        self.eos_id: int = self._end_beside() if end is None else end
        if not 0 <= self.eos_id < self.vocab_size:
            raise UserError(f"{path} has tokens 0 to {self.vocab_size - 1}; {self.eos_id}, the end of a text, is none")
        self.pad_id = self.eos_id  # an existing one: nothing is added to such a vocabulary

    @property
    def ends(self) -> dict[str, Any]:
        return {"begin": self.begin, "end": self.eos_id}

    def encode(self, text: str) -> list[int]:
        try:
            return self._model.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as above; of a kind without bytes, for what it has no token
            raise UserError(f"{self.path} has no tokens for {text[:20]!r} ({_reason(error)})") from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def special(self) -> dict[str, tuple[str, int]]:
        """The tokens that are no text and their ids, by role: eos and, where texts begin with one, bos."""
        ids = {"bos": self.begin[-1]} if self.begin else {}
        return {role: (self._model.id_to_token(i), i) for role, i in (ids | {"eos": self.eos_id}).items()}

    @cached_property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.file).hexdigest()

    def _in_front(self) -> list[int]:
        text = self.encode("a")
        whole = self._model.encode("a", add_special_tokens=True).ids
        if not text or text[0] not in whole:
            raise UserError(f"{self.path} has no token for the letter a; it is no tokenizer of a language model")
        return whole[: whole.index(text[0])]

    def _end_beside(self) -> int:
        stated = read_beside(self.path.parent / "tokenizer_config.json").get("eos_token")
        token = stated.get("content") if isinstance(stated, dict) else stated
        if isinstance(token, str):
            if (found := self._model.token_to_id(token)) is None:
                raise UserError(f"{self.path} has no token {token!r}, the eos_token of tokenizer_config.json beside it")
            return found
        for name, key in ENDS:
            found = read_beside(self.path.parent / name).get(key)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int):
                return found
        raise UserError(
            f"{self.path} does not say what ends a text: put the tokenizer_config.json (eos_token) or the config.json "
            "(eos_token_id) of the model beside it"
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_beside(path: AnyPath) -> dict[str, Any]:
    """A JSON file; nothing where there is none. Raises UserError if it is not one of keys and values."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold keys and values, found {type(found).__name__}")
    return found


def tokenizer_json(
    tokens: Sequence[str], merges: Sequence[str], pre: str, special: Mapping[int, str], begin: Sequence[int]
) -> str:
    """The `tokenizer.json` of a GGUF's vocabulary: `tokens` by id, of which `special` are no text.

    Raises UserError for a `pre` that `PATTERNS` does not have, and for merges that do not fit the tokens.
    """
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError:
        raise UserError("its tokenizer needs the package tokenizers; pip install 'jaxcrystal[gguf]'") from None

    if pre not in PATTERNS:
        raise UserError(f"tokenizer.ggml.pre is {pre!r}, which is not known here; known are {', '.join(PATTERNS)}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=pre in TIKTOKEN)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"its tokens and merges make no tokenizer ({_reason(error)})") from None
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    if begin:
        names = [tokens[i] for i in begin]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*names, "$A"]), special_tokens=list(zip(names, begin, strict=True))
        )
    return tokenizer.to_str()
