"""Sampling methods: each maps the logits of the next token to other logits, and the engine draws from their softmax.

A method is a frozen dataclass that is called with `[rows, vocabulary]` logits and returns logits of the same shape,
-inf where a token may not come. Methods compose by being applied one after the other: `(Temperature(0.9), TopP(0.9))`
is the paper's setting. Rows never mix, so what a crystal becomes does not depend on its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, Shaped, UInt32

from jaxcrystal.errors import UserError

GROUPS = 128  #: of tokens whose probabilities `pick` adds up first; devices that share a vocabulary share whole groups


class Method(Protocol):
    """Anything that turns logits into logits; hashable, because the compiled engine depends on it."""

    def __call__(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]: ...


@dataclass(frozen=True)
class Temperature:
    """p_i ∝ exp(z_i / t): t < 1 sharpens, t > 1 flattens. t = 1 is the model's own distribution.

    Raises UserError unless t is positive and finite.
    """

    t: float

    def __post_init__(self) -> None:
        if not 0 < self.t < float("inf"):
            raise UserError(f"the temperature is {self.t}; it must be above 0 (greedy decoding is a method of its own)")

    def __call__(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        return logits / self.t


@dataclass(frozen=True)
class TopP:
    """Nucleus sampling (arXiv 1904.09751): only the most probable tokens that together hold probability p.

    With m(θ) = Σ_{p_i ≥ θ} p_i, the tokens kept are {i : p_i ≥ θ*}, where θ* = max {θ : m(θ) ≥ p}. That is the shortest
    head of the sorted vocabulary whose mass reaches p, and tokens tied with its last one are kept with it (a sort would
    keep some of them, by accident of their order).

    Nothing is sorted: m only falls as θ rises, and float32 numbers from 0 to 1 are ordered as the integers of their 30
    bits are, so 30 halvings find θ* exactly. Raises UserError unless 0 < p ≤ 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"top-p is {self.p}; it must lie above 0 and be at most 1 (1 keeps every token)")

    def __call__(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        if self.p == 1:
            return logits  # even those tokens whose probability float32's sum does not notice
        probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        bits = jax.lax.bitcast_convert_type(probability, jnp.uint32)
        kept = _head(bits, probability, self.p * probability.sum(-1), halvings=30)
        return jnp.where(kept, logits, -jnp.inf)


@dataclass(frozen=True)
class TopK:
    """Only the k most probable tokens (arXiv 1805.04833), and those that tie with the last of them.

    Found as `TopP` finds its head, with a weight of one for each token. Raises UserError unless k is a positive whole
    number.
    """

    k: int

    def __post_init__(self) -> None:
        if not (isinstance(self.k, int) and self.k >= 1):
            raise UserError(f"top-k is {self.k}; it must be a whole number, at least 1 (1 is greedy but for ties)")

    def __call__(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32) + 0.0, jnp.uint32)  # -0 ties with 0
        bits = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))  # negative floats are ordered the other way
        return jnp.where(_head(bits, jnp.ones_like(bits), min(self.k, logits.shape[-1]), halvings=32), logits, -jnp.inf)


@dataclass(frozen=True)
class MinP:
    """Only tokens at least p times as probable as the most probable one (arXiv 2407.01082). Raises UserError unless
    0 < p ≤ 1."""

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"min-p is {self.p}; it must lie above 0 and be at most 1 (1 is greedy but for ties)")

    def __call__(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        least = logits.max(-1, keepdims=True) + math.log(self.p)
        return jnp.where(logits >= least, logits, -jnp.inf)


@dataclass(frozen=True)
class Greedy:
    """Always the most probable token, the first of those that tie."""

    def __call__(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, -jnp.inf)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2306.17806, equation 7): z = z₀ + w (z₁ - z₀).

    z₁ are the logits behind the prompt that states what is asked for, z₀ those behind the prompt that states nothing.
    w = 1 is the model as it is, w > 1 presses what was asked for, w = 0 forgets it. Raises UserError unless w is finite
    and not negative.
    """

    w: float

    def __post_init__(self) -> None:
        if not 0 <= self.w < float("inf"):
            raise UserError(f"the guidance weight is {self.w}; it must be at least 0 (1 is the model without guidance)")

    def __call__(
        self, conditional: Float[Array, "rows vocab"], unconditional: Float[Array, "rows vocab"]
    ) -> Float[Array, "rows vocab"]:
        guided = unconditional + self.w * (conditional - unconditional)
        return jnp.where(conditional == -jnp.inf, -jnp.inf, guided)  # -inf in the columns beyond the vocabulary


def pick(keys: Key[Array, "rows"], logits: Float[Array, "rows vocab"]) -> Int32[Array, "rows"]:
    """A token of each row, drawn from the softmax: where the running sum of the probabilities passes a random share.

    One random number a row, where Gumbel's way needs one for each token. The sum runs over groups of tokens, and then
    over the tokens of one group. A token of logit -inf never comes, whatever the sums' rounding.
    """
    weights = jnp.exp(logits.astype(jnp.float32) - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -logits.shape[1] % GROUPS))).reshape(len(logits), GROUPS, -1)

    def passes(weights: Float32[Array, "rows n"], share: Float32[Array, "rows"]) -> tuple[Array, Array]:
        """The first of `weights` with which their sum is above `share`, and the sum before it."""
        total = jnp.cumsum(weights, axis=-1)
        there = weights > 0
        above = there & (total > share[:, None])
        last = weights.shape[1] - 1 - jnp.argmax(there[:, ::-1], axis=-1)
        first = jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last)[:, None]
        return first[:, 0], jnp.take_along_axis(total - weights, first, axis=1)[:, 0]

    groups = weights.sum(-1)
    share = jax.vmap(jax.random.uniform)(keys) * groups.sum(-1)
    group, before = passes(groups, share)
    token, _ = passes(jnp.take_along_axis(weights, group[:, None, None], axis=1)[:, 0], share - before)
    return weights.shape[2] * group + token


def _head(
    bits: UInt32[Array, "rows vocab"],
    weight: Shaped[Array, "rows vocab"],
    target: Shaped[Array, "*rows"],
    halvings: int,
) -> Bool[Array, "rows vocab"]:
    """The fewest tokens of highest `bits` whose weights add up to `target`, and what ties with the last of them."""

    def halve(i: Array, threshold: UInt32[Array, "rows"]) -> UInt32[Array, "rows"]:
        higher = threshold | (jnp.uint32(1 << (halvings - 1)) >> i.astype(jnp.uint32))
        total = jnp.where(bits >= higher[:, None], weight, 0).sum(-1)
        return jnp.where(total >= target, higher, threshold)

    threshold = jax.lax.fori_loop(0, halvings, halve, jnp.zeros(bits.shape[0], jnp.uint32))
    return bits >= threshold[:, None]
