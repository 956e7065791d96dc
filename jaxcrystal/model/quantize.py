"""The parameters of a whole model, quantized and back: the kernels of the layers' seven linear maps.

Embeddings, norms and the head stay as they are. One parameter at a time, so that no device holds two models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxcrystal.config import LlamaConfig
from jaxcrystal.model.kernels import Kernel, decode, encode, is_codes
from jaxcrystal.model.llama import Llama, param_shardings


def quantizer(config: LlamaConfig, mesh: Mesh) -> Callable[[str, jax.Array], Kernel]:
    """`store(path, parameter)`: the parameter as `config.weights` stores it, at its place on `mesh`.

    `path` joins the names by `/`, from `layers`. A parameter that becomes codes is deleted. Raises UserError where the
    mesh does not fit the quantized model, naming the parameter, its axis and the sizes.
    """
    places = param_shardings(Llama(config), mesh)["params"]

    def store(path: str, parameter: jax.Array) -> Kernel:
        place = places
        for name in path.split("/"):
            place = place[name]
        if not isinstance(place, dict):
            return parameter
        stored = jax.jit(encode, static_argnums=1, out_shardings=place)(parameter, config.weights)
        jax.block_until_ready(stored)
        parameter.delete()
        return stored

    return store


def quantize(params: dict[str, Any], config: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
    """`params` of the float model, as `config.weights` stores them; those that become codes are deleted meanwhile.

    Raises as `quantizer`.
    """
    store = quantizer(config, mesh)
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: store(path, parameter) for path, parameter in flat.items()}, sep="/")


def dequantize(params: dict[str, Any], dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """`params` of the float model that computes the same: codes become kernels of `dtype`, laid out as they were."""

    def restore(node: Any) -> Any:
        if not is_codes(node):
            return node
        (codes,) = (array for name, array in node.items() if name != "scale")
        return jax.jit(decode, static_argnums=1, out_shardings=codes.sharding)(node, jnp.dtype(dtype))

    return jax.tree.map(restore, params, is_leaf=is_codes)
