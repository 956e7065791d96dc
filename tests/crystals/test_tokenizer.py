"""Both tokenizers encode any text and give it back; the compact one is what its trainer makes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcrystal.crystals import prompts
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.tokenizer import COMPACT, load_tokenizer, train_compact
from jaxcrystal.errors import UserError

#: SentencePiece writes a space as ▁, so it cannot tell the two apart; NUL ends its strings.
ANY_TEXT = st.text(st.characters(exclude_characters="▁\x00", exclude_categories=["Cs"]), max_size=60)


def test_the_shipped_model_is_what_the_trainer_makes():
    assert train_compact() == COMPACT.read_bytes()


def test_compact_has_a_piece_for_each_digit_element_and_word():
    tokenizer = load_tokenizer("compact")
    assert 200 <= tokenizer.vocab_size <= 512
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3
    for piece in [*"0123456789.\n", *ELEMENTS[1:], "[MASK]", *prompts.words()]:
        assert piece in tokenizer.pieces
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
