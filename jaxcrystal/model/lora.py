"""Low-rank adapters (arXiv 2106.09685): what they do to a matrix, and how they melt into it.

        x ──────────────┬──────────────────────────┐
                        │                          │ dropout
              ┌─────────┴─────────┐              ┌─┴─┐
              │                   │              │   │
              │  kernel [in, out] │         in × │ a │ rank        a: uniform in ±1/√in
              │      frozen       │              │   │
              │                   │              └─┬─┘
              └─────────┬─────────┘     ┌──────────┴────────┐
                        │        rank × │      b   out      │      b: zero
                        │               └──────────┬────────┘
                        │                          │ · alpha / rank
        y ◀─────────────+──────────────────────────┘

Adapters are variables of their own collection, `lora`, at the path of the kernel that they adapt: gradients and
optimizers that are given that collection touch nothing else.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcrystal.config import LoraConfig, Weights
from jaxcrystal.errors import UserError
from jaxcrystal.model import kernels


class Linear(nn.Module):
    """x W, plus the adapter where `lora` names this module, plus a bias where there is one."""

    features: int
    axes: tuple[str, str]  #: logical names of the kernel's two axes
    lora: LoraConfig | None = None
    weights: Weights = "float"  #: how the kernel is stored
    bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n in"], deterministic: bool = True, adapted: Float[Array, "*n in"] | None = None
    ) -> Float[Array, "*n out"]:
        """`adapted` is what the adapter reads if not x itself: a copy of x, where several kernels read the same x.

        Backward then adds up what these kernels give to the gradient of x before the adapters' parts come to it: that
        sum is reduced once over the devices that share the kernels, where each part would be by itself.
        """
        kernel = self.param("kernel", kernels.init(self.weights, self.axes), (x.shape[-1], self.features))
        y = kernels.multiply(x, kernel, self.axes)
        if self.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y += self.param("bias", init, (self.features,)).astype(y.dtype)
        if self.lora is None or self.name not in self.lora.targets:
            return y
        # PEFT's kaiming_uniform(a=√5) is this distribution.
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        # Whole along the axis that fsdp divides: their bytes are few, their gathers would be messages for every layer.
        first, last = (None if name == "embed" else name for name in self.axes)
        narrow, wide = (first, "rank"), ("rank", last)
        a = self._adapter("a", uniform, narrow, (x.shape[-1], self.lora.rank))
        b = self._adapter("b", nn.initializers.zeros, wide, (self.lora.rank, self.features))
        x = nn.Dropout(self.lora.dropout)(x if adapted is None else adapted, deterministic)
        low = kernels.multiply(x, a, narrow)
        return y + kernels.multiply(low, b, wide) * (self.lora.alpha / self.lora.rank)

    def _adapter(self, name: str, init: Any, axes: tuple[str, str], shape: tuple[int, int]) -> Float[Array, "m n"]:
        init = nn.with_logical_partitioning(init, axes)
        return self.variable("lora", name, lambda: init(self.make_rng("params"), shape, jnp.float32)).value


def merge(params: dict[str, Any], adapters: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Parameters of a model without adapters that computes the same: W + (alpha / rank) a b, in W's own dtype.

    Raises UserError for a quantized W: its codes are too coarse for what the adapters add.
    """
    if "a" in adapters:
        if kernels.is_codes(params["kernel"]):
            raise UserError(
                f"adapters cannot be merged into {next(iter(params['kernel']))} weights; "
                "`dequantize` the parameters first, or take the float model that they were converted from"
            )
        delta = (adapters["a"] @ adapters["b"]) * (config.alpha / config.rank)
        return params | {"kernel": (params["kernel"] + delta).astype(params["kernel"].dtype)}
    return {name: merge(value, adapters[name], config) if name in adapters else value for name, value in params.items()}
