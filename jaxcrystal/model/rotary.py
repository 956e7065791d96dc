"""Rotary positions (RoPE, arXiv 2104.09864): pairs of a head's channels turn by angles that grow with the position."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxcrystal.config import LlamaConfig, RopeScaling

#: Cosine and sine of each token's angles.
Rotation = tuple[Float32[Array, "batch time 1 half"], Float32[Array, "batch time 1 half"]]


def rotary(config: LlamaConfig, positions: Int[Array, "batch time"]) -> Rotation:
    """Cosine and sine of position · frequency."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: LlamaConfig) -> Float32[np.ndarray, " half"]:
    """theta^(-2i / head_dim), rescaled as the config says, in transformers' order of float32 operations."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / np.float32(scaling.factor)
    return slowed if scaling.rope_type == "linear" else _llama3(frequencies, slowed, scaling)


def _llama3(frequencies: np.ndarray, slowed: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """LLaMA 3.1: long waves slowed, short ones kept, those between blended by how often they fit the old context."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * slowed + blend * frequencies).astype(np.float32)


def rotate(
    x: Float[Array, "batch time heads head_dim"], rotation: Rotation
) -> Float[Array, "batch time heads head_dim"]:
    """Turns the pairs (i, i + head_dim / 2) by the angles of `rotation`."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
