"""A model and a data set small enough to be trained in a test."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxcrystal.config import LlamaConfig
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.texts.writer import Rows

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


def losses(out: str | Path) -> list[float]:
    """The loss of every step, as a run's journal has them so far."""
    journal = Path(out) / "metrics.jsonl"
    text = journal.read_text() if journal.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [loss for line in lines if line["event"] == "train" for loss in line["losses"]]


@struct.dataclass
class Numbers:
    """Stands for the examples of a batch where only `RandomRows` reads them."""

    index: jax.Array


class RandomRows:
    """Stands for the writer where only what follows it is tested: its own compilation takes most of a test's time.

    Row `index` holds random tokens, one sequence of a length of its own and padding.
    """

    def draw(self, key: jax.Array, examples: Numbers) -> None:
        return None

    def write(self, examples: Numbers, draws: None, length: int) -> Rows:
        index = examples.index[:, 0]
        at = jnp.broadcast_to(jnp.arange(length), (len(index), length))
        tokens = jax.vmap(lambda i: jax.random.randint(jax.random.key(i), (length,), 0, SMALL.vocab_size))(index)
        segments = (at < 20 + (37 * index[:, None]) % (length - 20)).astype(jnp.int32)
        return Rows(tokens, segments, at, segments > 0)
