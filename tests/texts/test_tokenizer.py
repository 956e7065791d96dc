"""Both tokenizers encode any text and give it back; the compact one is what its trainer makes."""

import dataclasses

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.texts import prompts
from jaxcrystal.texts.p1.tables import build
from jaxcrystal.texts.p1.text import REQUEST
from jaxcrystal.texts.sentence_pieces import (
    COMPACT,
    COMPACT_SYMMETRY,
    train_compact,
    train_compact_symmetry,
    with_pad,
    without_pad,
)
from jaxcrystal.texts.tokenizer import load_tokenizer

#: SentencePiece writes a space as ▁, so it cannot tell the two apart; NUL ends its strings.
ANY_TEXT = st.text(st.characters(exclude_characters="▁\x00", exclude_categories=["Cs"]), max_size=60)


def pieces_of(tokenizer) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.file)
    return [model.id_to_piece(i) for i in range(model.vocab_size())]


def test_the_shipped_model_is_what_the_trainer_makes():
    assert train_compact() == COMPACT.read_bytes()
    assert train_compact_symmetry() == COMPACT_SYMMETRY.read_bytes()


def test_compact_has_a_piece_for_each_digit_element_and_word():
    tokenizer = load_tokenizer("compact")
    assert 200 <= tokenizer.vocab_size <= 512
    assert len({*tokenizer.begin, tokenizer.eos_id, tokenizer.pad_id}) == 3
    for piece in [*"0123456789.\n", *ELEMENTS[1:], "[MASK]", *prompts.words(REQUEST)]:
        assert piece.replace(" ", "▁") in pieces_of(tokenizer)
    # An element, a line feed, nine digits and points, two spaces.
    assert len(tokenizer.encode("\nMn\n0.00 0.50 0.25")) == len(tokenizer.encode("")) + len("\n") + 1 + 1 + 12 + 2 + 1


@pytest.mark.parametrize("name", ["compact", "llama2"])
@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(request, name, text):
    path = "compact" if name == "compact" else request.getfixturevalue("shared") / "tokenizer/llama2/tokenizer.model"
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")


def test_pad_is_a_piece_behind_all_others(shared, tmp_path):
    """LLaMA-2's tokenizer has no padding until it is added; no token of a text changes, nor any table but one entry."""
    path = shared / "tokenizer" / "llama2" / "tokenizer.model"
    before = load_tokenizer(path)
    (tmp_path / "padded.model").write_bytes(with_pad(path.read_bytes()))
    after = load_tokenizer(tmp_path / "padded.model")
    assert (before.vocab_size, before.pad_id, "pad" in before.special) == (32000, 0, False)
    assert (after.vocab_size, after.pad_id, after.special["pad"]) == (32001, 32000, ("[PAD]", 32000))
    assert before.special == {"unk": ("<unk>", 0), "bos": ("<s>", 1), "eos": ("</s>", 2)}
    assert pieces_of(after) == [*pieces_of(before), "[PAD]"]
    old, new = (dataclasses.asdict(build(tokenizer)) for tokenizer in (before, after))
    assert (old.pop("pad"), new.pop("pad")) == (0, 32000)
    for name, table in old.items():
        np.testing.assert_array_equal(new[name], table)
    padded = (tmp_path / "padded.model").read_bytes()
    assert with_pad(padded) == padded and without_pad(padded) == without_pad(path.read_bytes()) == path.read_bytes()
    assert with_pad(COMPACT.read_bytes()) == without_pad(COMPACT.read_bytes()) == COMPACT.read_bytes()
