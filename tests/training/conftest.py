"""A small data set and a small model, for every test of training."""

from pathlib import Path

import pytest
from small import crystal_set

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.dataset import store
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.texts.writer import Writer


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Paths of a stored training and validation set."""
    folder: Path = tmp_path_factory.mktemp("data")
    store(crystal_set(60), folder / "train.parquet", {})
    store(crystal_set(20, seed=1), folder / "validation.parquet", {})
    return {"train": str(folder / "train.parquet"), "validation": str(folder / "validation.parquet")}


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("compact")


@pytest.fixture(scope="session")
def writer(tokenizer) -> Writer:
    return Writer.of(tokenizer, TextFormat(), Augment())
