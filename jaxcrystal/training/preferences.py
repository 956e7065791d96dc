"""Verdicts as a teacher: of two crystals for one prompt the preferred one becomes likelier, the other less likely.

    pair, key ──writer──▶ rows ─┬─ model ──────▶ log π    of both texts ─┐
                                └─ reference ──▶ log π_ref              ─┴▶ loss ──grad──▶ …as in `step`

The loss of direct preference optimization (arXiv 2305.18290, eq. 7) of a preferred text w and another l is

    -log σ(m),   m = β [(log π(w) - log π_ref(w)) - (log π(l) - log π_ref(l))],

where log π is the model's own, summed over the tokens behind the prompt and the one that ends the text, and no grammar
renormalises it. It leaves open whether w becomes likelier or l alone less likely, and both texts may lose what their
difference gains; so -log π(w) a token is added, times `likelihood` (arXiv 2404.19733, eq. 1). The loss of a step is the
mean over its pairs.

The reference is the model as the run found it. With adapters that is the same model without them, which takes no second
copy of the weights; where all weights are trained, a copy of them lies frozen beside them. Neither is saved: a run that
goes on makes it again from its base and seed, and its fingerprint says whether it is the same. The reference drops
nothing out; the model does, where the recipe says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32, Int, PRNGKeyArray

from jaxcrystal.config import PreferenceConfig
from jaxcrystal.model.llama import Llama
from jaxcrystal.texts.writer import Examples, Rows
from jaxcrystal.training.loss import crystal_nats
from jaxcrystal.training.pairs import PairWriter
from jaxcrystal.training.step import StepMetrics, Trainer, TrainState

REFERENCE = "reference"  #: of the frozen weights, those that the trained ones were


@struct.dataclass
class PreferenceMetrics(StepMetrics):
    """What is measured of a step on pairs; the loss is a mean over them."""

    pairs: Int[Array, ""]
    margin: Float32[Array, ""]  #: mean of m
    accuracy: Float32[Array, ""]  #: share of pairs whose m is above 0
    preferred: Float32[Array, ""]  #: mean of log π(w) - log π_ref(w), in nats

    TOLD: ClassVar[tuple[str, ...]] = ("margin", "accuracy", "preferred")

    @property
    def counted(self) -> Int[Array, ""]:
        return self.pairs


@dataclass(frozen=True, eq=False)
class PreferenceTrainer(Trainer):
    """As `Trainer`, but steps are on pairs; what is evaluated is the likelihood of crystals all the same."""

    pair_writer: PairWriter = field(kw_only=True)
    preferences: PreferenceConfig = field(kw_only=True)

    def start(self, variables: dict[str, Any]) -> TrainState:
        if self.collection == "params":  # a copy: a step consumes its state, and the weights with it
            copy = jax.jit(lambda weights: jax.tree.map(jnp.copy, weights))
            variables = {**variables, REFERENCE: copy(variables["params"])}
        return super().start(variables)

    def variables(self, state: TrainState) -> dict[str, Any]:
        return _without_reference(super().variables(state))

    def _objective(
        self, variables: dict[str, Any], examples: Examples, key: PRNGKeyArray, dropout: PRNGKeyArray
    ) -> tuple[Float32[Array, ""], PreferenceMetrics]:
        rows = self._rows(self.pair_writer, examples, key)
        slots = examples.index.shape[1]
        frozen = {"params": variables.get(REFERENCE, variables["params"])}
        reference, _ = self._nats(self.model.clone(lora=None), frozen, rows, slots, None)
        reference = jax.lax.stop_gradient(reference)
        # The model waits for the reference: two that compute at once would send their parts in another order on each
        # device, which on CPUs is a deadlock of collectives. XLA keeps this order alone, as it cannot know of any nan.
        ready = jnp.isfinite(reference).all(axis=1, keepdims=True)
        rows = rows.replace(tokens=jnp.where(ready, rows.tokens, 0))
        nats, tokens = self._nats(self.model, _without_reference(variables), rows, slots, dropout)
        return self._compared(nats, reference, tokens, rows, examples)

    def _nats(
        self, model: Llama, variables: dict[str, Any], rows: Rows, slots: int, dropout: PRNGKeyArray | None
    ) -> tuple[Float32[Array, "rows slots"], Int[Array, "rows slots"]]:
        """-log p of each crystal's text behind its prompt, and its tokens."""
        hidden, head = self._hidden(model, variables, rows, dropout)
        return crystal_nats(hidden, head, rows, slots, self.loss_block, model.config.vocab_size)

    def _compared(
        self,
        nats: Float32[Array, "rows slots"],
        reference: Float32[Array, "rows slots"],
        tokens: Int[Array, "rows slots"],
        rows: Rows,
        examples: Examples,
    ) -> tuple[Float32[Array, ""], PreferenceMetrics]:
        """The loss as a sum over pairs, alone and among the sums of all that is told."""

        def paired(x: Array) -> Array:
            return x.reshape(len(x), -1, 2)

        there = paired(examples.index)[..., 0] >= 0
        gained = paired(reference - nats)  # log π - log π_ref
        margin = self.preferences.beta * (gained[..., 0] - gained[..., 1])
        a_token = paired(nats)[..., 0] / jnp.maximum(paired(tokens)[..., 0], 1)
        loss = jax.nn.softplus(-margin) + self.preferences.likelihood * a_token
        written = (rows.segments[..., None] == jnp.arange(1, nats.shape[1] + 1)).sum(1)
        told = (loss, margin, margin > 0, gained[..., 0], there, paired(tokens).sum(-1), paired(written).sum(-1))
        # One sum over the devices for all of them, for which the gradient waits: see above.
        sums = jnp.sum(jnp.where(there[..., None], jnp.stack(told, axis=-1), 0.0), axis=(0, 1))
        total = jnp.where(jnp.isfinite(sums[0]), sums[0], jnp.nan)
        margin, right, preferred, pairs, counted, written = jax.lax.stop_gradient(sums)[1:]
        whole = [jnp.round(x).astype(jnp.int32) for x in (counted, written, pairs)]
        metrics = PreferenceMetrics(
            loss=total,
            tokens=whole[0],
            written=whole[1],
            crystals=2 * whole[2],
            grad_norm=jnp.float32(0),
            pairs=whole[2],
            margin=margin,
            accuracy=right,
            preferred=preferred,
        )
        return total, metrics


def _without_reference(variables: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name != REFERENCE}
