"""Byte-level BPE: texts are cut as the models' own tokenizer.json cut them, and a file that is none is one line."""

import json

import byte_pair_tokenizers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from jaxcrystal.errors import UserError
from jaxcrystal.texts.byte_pairs import tokenizer_json
from jaxcrystal.texts.tokenizer import load_tokenizer


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: As the tokenizer.json of each release has it: SmolLM2, LLaMA-3, Qwen2.5, Mistral Nemo, GPT-2.
THEIRS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": split(rf"{WORDS}|\p{{N}}{{1,3}}|{MARKS}"),
    "qwen2": split(rf"{WORDS}|\p{{N}}|{MARKS}"),
    "tekken": split(TEKKEN),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


@pytest.mark.parametrize("pre", THEIRS)
@given(
    text=st.lists(
        st.sampled_from(["a", "B", "é", "ǅ", "中", "7", "٣", "²", "'s", "'LL", ".", ":", "]", " ", "\n", "\r"])
    )
)
@settings(max_examples=300, deadline=None)
def test_patterns_cut_as_the_releases_do(pre, text):
    tokens, merges = byte_pair_tokenizers.vocabulary("smollm")
    ours = Tokenizer.from_str(tokenizer_json(tokens, merges, pre, {}, [])).pre_tokenizer
    text = "".join(text)
    assert ours.pre_tokenize_str(text) == THEIRS[pre].pre_tokenize_str(text)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eos_token": 5}, "does not say what ends a text"),
        ({"eos_token": None}, "does not say what ends a text: put the tokenizer_config.json .* beside it"),
        ({"eos_token": "<|none|>"}, r"has no token '<\|none\|>', the eos_token of tokenizer_config.json"),
        ([], "tokenizer_config.json must hold keys and values, found list"),
    ],
)
def test_what_ends_a_text_must_be_said(change, message, tmp_path):
    path = byte_pair_tokenizers.write(tmp_path, "smollm")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize("stated, end", [([7, 8], 7), (9, 9), ([], None), ("x", None), (99999, None)])
def test_the_end_is_that_of_the_config_beside(stated, end, tmp_path):
    path = byte_pair_tokenizers.write(tmp_path, "smollm")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stated}))
    if end is None:
        with pytest.raises(UserError, match=r"does not say what ends a text|99999, the end of a text, is none"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).eos_id == load_tokenizer(path).eos_id == end


@pytest.mark.parametrize(
    "model, message",
    [
        ({"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "?"}, "has no tokens for 'a' "),
        ({"type": "BPE", "vocab": {}, "merges": []}, "is not a tokenizer.json .it has no tokens"),
        ({"type": "BPE", "vocab": {"b": 0}, "merges": []}, "has no token for the letter a"),
        ({"type": "none"}, r"is not a tokenizer.json \("),
    ],
)
def test_what_is_no_tokenizer_is_one_line(model, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
