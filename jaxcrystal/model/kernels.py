"""How the kernel of a linear map is stored: in floating point, or as codes of 8 or 4 bits beside their scales.

    float   kernel        [in, out]
    int8    kernel/int8   [in, out]        w ≈ scale · code            -127 ≤ code ≤ 127
            kernel/scale  [out]            float32, the largest |w| of an output, over 127
    nf4     kernel/nf4    [in / 2, out]    w ≈ scale · LEVELS[code]    two codes a byte, see below
            kernel/scale  [in / 64, out]   bfloat16, the largest |w| of a block of 64 inputs of an output

                        ┌ inputs 32 … 63 of a block: high 4 bits
    a block's 32 bytes  ┤
                        └ inputs  0 … 31 of a block: low 4 bits

NF4 is QLoRA's data type (arXiv 2305.14314, section 3 and appendix E). The paper quantizes the scales a second time, to
0.13 bits a weight instead of 0.5; in bfloat16 they take 0.25, and are more exact. Halves of a block share bytes, not
neighbours, so that unpacking moves whole tiles; bytes never leave their block, so that blocks may be divided over a
mesh. A stored kernel is constant: it has no gradient, but the gradient of x flows through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from jaxcrystal.config import NF4_BLOCK, Weights
from jaxcrystal.mesh import constrain, gather, platform

#: Name of a float kernel's product, by which `jax.checkpoint` may keep it: policies do not see into its own gradient.
PRODUCT = "product"

#: An array, or the codes (named after their format) and their `scale`.
Kernel = Array | Mapping[str, Array]

#: Quantiles of the normal distribution, of its negative and positive half apart so that 0 is one of them.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ],
    np.float32,
)


def _midpoints() -> Float[np.ndarray, "15"]:
    """Between levels, as float32 rounded down: `x > midpoint` is then exactly "nearer to the upper level"."""
    exact = (LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-1)), rounded)


MIDPOINTS = _midpoints()


def encode(kernel: Float[Array, "*n in out"], weights: Weights) -> Kernel:
    """The kernel as `weights` stores it: each weight as its nearest code, ties to even (int8) or to the lower (nf4)."""
    if weights == "float":
        return kernel
    kernel = kernel.astype(jnp.float32)
    if weights == "int8":
        scale = jnp.abs(kernel).max(axis=-2) * (1 / 127)
        return {"int8": jnp.round(_relative(kernel, scale)).astype(jnp.int8), "scale": scale}
    *n, width, out = kernel.shape
    blocks = kernel.reshape(*n, width // NF4_BLOCK, NF4_BLOCK, out)
    scale = jnp.abs(blocks).max(axis=-2).astype(jnp.bfloat16)
    relative = _relative(blocks, scale.astype(jnp.float32))
    codes = sum((relative > midpoint).astype(jnp.uint8) for midpoint in MIDPOINTS)
    return {"nf4": _pack(codes).reshape(*n, width // 2, out), "scale": scale}


def _relative(blocks: Float[Array, "*n in out"], scale: Float[Array, "*n out"]) -> Float[Array, "*n in out"]:
    """Weights over their scale; 0 where all weights of a scale are 0.

    Products with inverses, as the compiler makes of divisions: said here, codes are the same compiled or not.
    """
    return blocks * jnp.where(scale == 0, 0, 1 / scale)[..., None, :]


def _pack(codes: UInt8[Array, "*n block out"]) -> UInt8[Array, "*n block/2 out"]:
    low, high = jnp.split(codes, 2, axis=-2)
    return low | (high << 4)


def _unpack(packed: UInt8[Array, "*n block/2 out"]) -> UInt8[Array, "*n block out"]:
    return jnp.concatenate([packed & 15, packed >> 4], axis=-2)


def decode(kernel: Kernel, dtype: DTypeLike) -> Float[Array, "*n in out"]:
    """The kernel in floating point, rounded once, to `dtype`."""
    match kernel:
        case {"int8": codes, "scale": scale}:
            return (codes * scale[..., None, :]).astype(dtype)
        case {"nf4": packed, "scale": scale}:
            *n, half, out = packed.shape
            codes = _unpack(packed.reshape(*n, -1, NF4_BLOCK // 2, out))
            # Scaled before they are chosen: whole arrays of one level each would be hoisted out of the scan of layers.
            values = [level * scale[..., None, :].astype(jnp.float32) for level in LEVELS]
            blocks = _choose(codes, values)
            return blocks.astype(dtype).reshape(*n, 2 * half, out)
    return kernel.astype(dtype)


def _choose(codes: UInt8[Array, "*n"], values: list[Float[Array, "*#n"]]) -> Float[Array, "*n"]:
    """Of 16 values the one that each code numbers: a tree of selections, which a vector unit does fast."""
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def multiply(x: Float[Array, "*n in"], kernel: Kernel, axes: tuple[str, str]) -> Float[Array, "*n out"]:
    """x times the kernel whose axes bear these logical names, in x's dtype."""
    if not is_codes(kernel):
        return checkpoint_name(_product(x, kernel, axes), PRODUCT)

    def product(x: Float[Array, "*n in"], kernel: Kernel) -> Float[Array, "*n out"]:
        kernel = {name: gather(array, axes[-array.ndim :]) for name, array in kernel.items()}
        if "int8" in kernel:  # codes are exact in bfloat16, and the scale is one for each output
            return ((x @ kernel["int8"].astype(x.dtype)) * kernel["scale"]).astype(x.dtype)
        return x @ decode(kernel, x.dtype)

    # For backward, the stored kernel is kept: gathered or decoded, those of all layers would be a whole model. The
    # optimization barrier of `prevent_cse`, not needed in a scan, would make its all-gather wait for the gradient.
    return jax.checkpoint(product, prevent_cse=False)(x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Float[Array, "*n in"], kernel: Float[Array, "in out"], axes: tuple[str, str]) -> Float[Array, "*n out"]:
    """x times a float kernel, with a gradient of its own.

    dx = dy Wᵀ      in x's dtype; W is gathered again, not kept
    dW = xᵀ dy      one product over all tokens, summed in float32 where products are bfloat16, and laid out as W
                    itself: over fsdp its parts are reduce-scattered, where the transpose of the gather
                    would all-reduce the whole of it
    """
    return _rounded("...i,io->...o", x, gather(kernel.astype(x.dtype), axes))


def _product_forward(x: Array, kernel: Array, axes: tuple[str, str]) -> tuple[Array, tuple]:
    return _product(x, kernel, axes), (x, kernel)


def _product_backward(axes: tuple[str, str], kept: tuple, dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    dx = _rounded("...o,io->...i", dy, gather(kernel.astype(dy.dtype), axes))
    dw = _summed("...i,...o->io", x, dy)
    return dx, constrain(dw, *axes).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def to_float32(x: Float[Array, "*n in"], kernel: Float[Array, "in out"]) -> Float32[Array, "*n out"]:
    """x times a kernel in the dtype of x, not rounded to it; nor is the gradient of a kernel that is wider."""
    return _summed("...i,io->...o", x, kernel.astype(x.dtype))


def _to_float32_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    dy = dy.astype(x.dtype)
    dx, dw = _summed("...o,io->...i", dy, kernel.astype(x.dtype)), _summed("...i,...o->io", x, dy)
    return dx.astype(x.dtype), dw.astype(kernel.dtype)


to_float32.defvjp(lambda x, kernel: (to_float32(x, kernel), (x, kernel)), _to_float32_backward)


def _summed(pattern: str, x: Array, y: Array) -> Array:
    """The product of two arrays of one dtype, in float32 or what is wider.

    By a pattern, not of a transpose: what is transposed before its product, XLA on CPUs multiplies as float32.
    """
    return jnp.einsum(pattern, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _rounded(pattern: str, x: Array, y: Array) -> Array:
    """The product in the dtype of its factors.

    XLA on CPUs has a fast product of bfloat16 for results in float32 only; devices of a mesh should add up bfloat16.
    """
    on_cpu = platform() == "cpu"
    return _summed(pattern, x, y).astype(x.dtype) if on_cpu else jnp.einsum(pattern, x, y)


def init(weights: Weights, axes: tuple[str, str]) -> Callable[..., Any]:
    """An initializer of N(0, 0.02²) stored as `weights`, each array with the logical names of its axes."""
    names = {"int8": {"int8": axes, "scale": axes[1:]}, "nf4": {"nf4": axes, "scale": axes}}
    normal = nn.initializers.normal(0.02)

    def draw(key: Array, shape: tuple[int, int]) -> Any:
        stored = encode(normal(key, shape), weights)
        if weights == "float":
            return nn.LogicallyPartitioned(stored, axes)
        return {name: nn.LogicallyPartitioned(array, names[weights][name]) for name, array in stored.items()}

    return draw


def is_codes(node: Any) -> bool:
    """Whether this node of a tree of parameters is a kernel stored as codes and scales."""
    return isinstance(node, Mapping) and not node.keys().isdisjoint({"int8", "nf4"})


def count_weights(variables: Mapping[str, Any]) -> int:
    """Weights that these variables stand for, however they are stored: two a byte of nf4, none for a scale of codes."""
    each = {"kernel/nf4": 2, "kernel/scale": 0}
    return sum(x.size * each.get("/".join(path[-2:]), 1) for path, x in flatten_dict(variables).items())
