"""How fast training is, against what the machine could do.

    MFU = useful FLOPs per second / peak FLOPs per second of all devices              (arXiv 2204.02311, appendix B)
    useful FLOPs of a token = 2 N forward + 2 N for the gradient of activations + 2 M for that of weights
                              + 12 · layers · heads · head_dim · context / 2 for attention

N weights are multiplied with each token (the embedding is looked up, not multiplied), M of them are trained. Only
tokens of crystals are useful, padding is not; `context` is the mean length of a crystal's text, halved by causality.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxcrystal.config import LlamaConfig
from jaxcrystal.model.kernels import count_weights

FORMULA = "(2 N + 2 N + 2 M + 6 layers heads head_dim context) tokens/s / (peak FLOP/s of all devices)"

#: Peak bfloat16 FLOP/s of one device, by a part of its `device_kind` (vendors' data sheets, dense).
PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,  # v5p too, by its compiler; v5e is "TPU v5 lite", above
    "TPU v6": 918e12,
}


@dataclass(frozen=True)
class Multiplied:
    """What a token is multiplied with."""

    config: LlamaConfig
    weights: int  #: N
    trained: int  #: M

    @classmethod
    def of(cls, config: LlamaConfig, variables: dict[str, Any], trained: str) -> Multiplied:
        """Counts the weights of `variables`, of which the collection `trained` is trained."""
        sizes = {name: count_weights(tree) for name, tree in variables.items()}
        if not config.tie_word_embeddings:
            sizes["params"] -= config.padded_vocab_size * config.hidden_size  # looked up
        return cls(config, sum(sizes.values()), sizes[trained])

    def flops_per_token(self, context: float) -> float:
        """Useful FLOPs of one token of training, in texts of mean length `context`, by the formula above."""
        c = self.config
        attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context
        return 4 * self.weights + 2 * self.trained + attention


def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the figure is from: a data sheet, of bfloat16 whatever the dtype, or a
    matrix product of this dtype timed here."""
    for part, peak in PEAK.items():
        if part in device.device_kind:
            return peak, f"data sheet, {part}, bfloat16"
    n, repeats = 1024, 8
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds), f"best of {repeats} products of {n} x {n} {dtype}, timed here"
