"""The error that storing a LLaMA's kernels as bfloat16, int8 or nf4 puts into its logits, against float32.

    python benchmarks/quantized_logits.py

Models are random, in two sizes, each with several seeds: kernels are N(0, 1 / inputs), so that every layer adds to its
stream as much as another, norms are 1. All is computed in float32 but the row `bfloat16`, which also computes in it, so
that the other rows show what storing alone does. A random model is the hardest case: it has no prediction that many
weights agree on. Its next tokens' distribution says how much of the error would be seen by a sampler.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.model.quantize import dequantize, quantize

MODELS = {
    "width 64, depth 2": LlamaConfig(448, 64, 192, 2, 4, 4, 16),
    "width 256, depth 4": LlamaConfig(448, 256, 704, 4, 8, 8, 32),
}
FORMATS = ("bfloat16", "int8", "nf4")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="models of each size (4)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each of 4 rows (128)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    measured = machine.facts(uses_accelerator=jax.default_backend() != "cpu")
    errors = {
        name: {
            stored: mean([error(config, stored, seed, options.tokens) for seed in range(options.seeds)])
            for stored in FORMATS
        }
        for name, config in MODELS.items()
    }
    result = {
        "benchmark": "quantized_logits",
        "claim": "error of logits against float32, means over models",
        "errors": errors,
        "seeds": options.seeds,
        "tokens": 4 * options.tokens,
        "measured": measured,
    }
    path = machine.write("quantized_logits", result, options.out)
    print(measured["machine"])
    for name, rows in errors.items():
        print(name)
        for stored, found in rows.items():
            print(f"  {stored:9}" + "".join(f"  {key} {value:.2e}" for key, value in found.items()))
    print(f"written to {path}")
    return result


def error(config: LlamaConfig, stored: str, seed: int, tokens: int) -> dict[str, float]:
    """Of one model: a kernel's error, the logits' relative to their spread and largest, and that of the next token."""
    mesh = make_mesh(MeshConfig(1, 1, 1))
    params = initialize(Llama(config), jax.random.key(seed), mesh)["params"]
    params = jax.tree.map(lambda x: x * (0.02 * x.shape[-2] ** 0.5) ** -1 if x.ndim == 3 else x, params)
    params["lm_head"]["kernel"] *= (0.02 * config.hidden_size**0.5) ** -1
    rows = np.random.default_rng(seed).integers(0, config.vocab_size, (4, tokens))
    positions = np.broadcast_to(np.arange(tokens), rows.shape)

    def logits(config: LlamaConfig, params: dict[str, Any]) -> np.ndarray:
        return np.asarray(compiled(config)({"params": params}, rows, positions)[0], np.float64)

    expected = logits(config, params)
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])
    if stored == "bfloat16":
        config = replace(config, dtype="bfloat16")
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    else:
        config = replace(config, weights=stored)
        params = quantize(params, config, mesh)
    found = logits(config, params)
    lost = np.asarray(dequantize(params)["layers"]["mlp"]["up_proj"]["kernel"], np.float32) - kernel
    difference = found - expected
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected, found))
    return {
        "weights, rms / rms": float(np.sqrt((lost**2).mean() / (kernel**2).mean())),
        "rms / spread": float(np.sqrt((difference**2).mean()) / expected.std()),
        "largest / largest": float(np.abs(difference).max() / np.abs(expected).max()),
        "KL, nats": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "same likeliest token": float((expected.argmax(-1) == found.argmax(-1)).mean()),
    }


@cache
def compiled(config: LlamaConfig) -> Any:
    return jax.jit(Llama(config).apply)


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([each[key] for each in found])) for key in found[0]}


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
