"""A tokenizer that spells numbers two digits at a time, from the left of each run: 120 is 12 0."""

from pathlib import Path

from jaxcrystal.texts.sentence_pieces import train_compact
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer


def load(directory: Path) -> Tokenizer:
    """Kin of the compact one, written to `directory`."""
    (directory / "tokenizer.model").write_bytes(train_compact(*(f"{number:02}" for number in range(100))))
    return load_tokenizer(directory)
