"""A small data set and a small model, for every test of training."""

from pathlib import Path

import numpy as np
import pytest

from jaxcrystal.config import Augment, LlamaConfig, TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.dataset import CrystalSet, store
from jaxcrystal.crystals.tokenizer import load_tokenizer
from jaxcrystal.crystals.writer import TokenTables, Writer

SMALL = LlamaConfig(
    vocab_size=448,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)


def crystal_set(count: int, seed: int = 0) -> CrystalSet:
    rng = np.random.default_rng(seed)
    crystals = [
        Crystal(rng.uniform(3, 12, 3), rng.uniform(80, 100, 3), rng.integers(1, 90, n), rng.random((n, 3)))
        for n in rng.integers(1, 9, count)
    ]
    labels = [{"pretty_formula": "".join(c.symbols), "band_gap": float(rng.random())} for c in crystals]
    return CrystalSet.from_crystals([f"crystal-{i}" for i in range(count)], crystals, labels)


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
    return Writer(TokenTables.build(tokenizer), TextFormat(), Augment())
