"""What computes attention where there is no cache: the kernels of two platforms, and the choice of what can run.

xla      anywhere; `attention.attend` itself, the reference, and the only one that reads a cache
blocks   anywhere; XLA's own products, one block of queries after the other (`attention_blocks`)
cudnn    NVIDIA GPUs: cuDNN's flash attention (arXiv 2307.08691). Segments reach it as a mask of [rows, time,
         time], one for all heads and layers
splash   TPUs: Pallas' splash attention, which reads segment ids and skips the blocks that causality hides; on
         any other platform it is interpreted, exact and slow
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float, Int

from jaxcrystal.config import LlamaConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import MESH_AXES, parts, platform, spec

Implementation = Literal["xla", "blocks", "cudnn", "splash"]

#: The kernel that `auto` takes on a platform, where it can.
KERNELS: dict[str, Implementation] = {"gpu": "cudnn", "tpu": "splash"}
SPLASH_BLOCK = 512  #: queries, and keys, that the TPU's kernel holds at a time, or the largest part that divides a row


def choose(config: LlamaConfig, rows: int, time: int) -> tuple[Implementation, str]:
    """The implementation that `config.attention` means for calls of this shape on the mesh that is set, and why.

    Raises UserError where the one that the config names cannot run.
    """
    if config.attention == "auto":
        kernel = KERNELS.get(platform())
        if kernel is None:
            return "blocks", f"{platform()} has no kernel of its own"
        if obstacle := _obstacle(kernel, config, rows, time):
            return "blocks", f"not {kernel}, because {obstacle}"
        return kernel, f"the kernel of {platform()}"
    if config.attention in KERNELS.values() and (obstacle := _obstacle(config.attention, config, rows, time)):
        raise UserError(f"model.attention is {config.attention!r}, but {obstacle}; 'auto' takes what can run")
    return config.attention, "model.attention names it"


def _obstacle(kernel: Implementation, config: LlamaConfig, rows: int, time: int) -> str | None:
    """What keeps `kernel` from running, if anything."""
    mesh = jax.sharding.get_abstract_mesh()
    for name, size in (
        ("batch", rows),
        ("heads", config.num_attention_heads),
        ("kv_heads", config.num_key_value_heads),
    ):
        if size % parts(mesh, name):
            axes = " x ".join(MESH_AXES[name])
            return f"{name} of size {size} cannot be divided over the mesh axis {axes} of {parts(mesh, name)}"
    if kernel == "splash":
        return f"rows of {time} tokens are no multiple of 128" if time % 128 else None
    if platform() != "gpu":
        return f"cudnn runs on gpu, and this is {platform()}"
    if config.dtype != "bfloat16":
        return f"cudnn takes bfloat16, and model.dtype is {config.dtype}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"cudnn takes a head_dim that is a multiple of 8 up to 128, and model.head_dim is {config.head_dim}"
    return f"rows of {time} tokens are no multiple of 2" if time % 2 else None


def cudnn(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    mask: Bool[Array, "#batch time time"] | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Causal attention, within `mask` where there is one."""
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(queries, keys, values, mask=mask, is_causal=True, implementation="cudnn")


def splash(
    queries: Float[Array, "batch time heads head_dim"],
    keys: Float[Array, "batch time kv_heads head_dim"],
    values: Float[Array, "batch time kv_heads head_dim"],
    segments: Int[Array, "batch time"] | None,
) -> Float[Array, "batch time heads head_dim"]:
    """Causal attention within equal segments; each device computes its own rows and heads."""
    if segments is None:
        segments = jnp.ones(queries.shape[:2], jnp.int32)
    interpret = platform() != "tpu"

    def own(queries: Array, keys: Array, values: Array, segments: Array) -> Array:
        time, heads, width = queries.shape[1:]
        block = math.gcd(time, SPLASH_BLOCK)
        sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
        kernel = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([splash_attention.CausalMask((time, time))] * heads),
            block_sizes=splash_attention.BlockSizes(**dict.fromkeys(sizes, block)),
            interpret=interpret,
        )
        ids = splash_attention.SegmentIds(segments, segments)
        queries, keys, values = (jnp.moveaxis(x, 1, 2) for x in (queries * width**-0.5, keys, values))
        return jnp.moveaxis(jax.vmap(kernel)(queries, keys, values, ids), 2, 1)

    if jax.sharding.get_abstract_mesh().empty:
        return own(queries, keys, values, segments)
    heads, kv_heads = (spec(("batch", None, name, None)) for name in ("heads", "kv_heads"))
    sharded = jax.shard_map(
        own, in_specs=(heads, kv_heads, kv_heads, spec(("batch", None))), out_specs=heads, check_vma=False
    )  # check_vma: Pallas does not say over which axes its results vary
    return sharded(queries, keys, values, segments)
