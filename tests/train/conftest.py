"""A small data set and a small model, for every test of training."""

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small import crystal_set

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.dataset import store
from jaxcrystal.crystals.tokenizer import load_tokenizer
from jaxcrystal.crystals.writer import TokenTables, Writer


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


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Within a module, a program that was compiled before is read from disk: a test of training mostly compiles."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield
