"""One step of training, as one compiled program: draw, write, forward, backward, update.

    examples, key ──writer──▶ rows ──Llama──▶ loss ──grad──▶ sum over micro-batches ──▶ optimizer ──▶ state

What is trained is one collection of the model's variables: `lora` on a frozen `params`, or `params` themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec, Sharding
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from jaxcrystal.config import LlamaConfig, OptimizerConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import constrain, replicated, spec
from jaxcrystal.model import attention_kernels
from jaxcrystal.model.llama import Llama
from jaxcrystal.texts.writer import Examples, Rows, Writer
from jaxcrystal.training.loss import next_token_loss

T = TypeVar("T")

#: Layers up to which a step on one CPU device has each by itself: 4 layers of 128 take 0.92 of the scan's time, 8 take
#: 0.97, and 1.3 times as long to compile.
UNROLLED = 4


@struct.dataclass
class TrainState:
    """All that changes in training, and the frozen weights beside it."""

    step: Int[Array, ""]
    trained: dict[str, Any]  #: the collection that is trained
    frozen: dict[str, Any]  #: the other variables of the model, {"params": ...} or {}
    optimizer: optax.OptState


@struct.dataclass
class StepMetrics:
    """What is measured of one step."""

    loss: Float32[Array, ""]  #: mean over counted tokens, nats
    tokens: Int[Array, ""]  #: tokens that the loss counted
    written: Int[Array, ""]  #: tokens that are not padding
    crystals: Int[Array, ""]
    grad_norm: Float32[Array, ""]  #: before clipping

    #: What else a run tells of its steps, by the names of fields.
    TOLD: ClassVar[tuple[str, ...]] = ()

    @property
    def counted(self) -> Int[Array, ""]:
        """What the loss is a mean over."""
        return self.tokens

    def mean(self) -> StepMetrics:
        """With means in the place of a loss, and of what else is told, that are still sums."""
        means = {name: getattr(self, name) / jnp.maximum(self.counted, 1) for name in ("loss", *self.TOLD)}
        return self.replace(**means)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Of each of `steps` steps, by its number: linear warm-up, then cosine to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, max(steps - 1, 1)),
        decay_steps=max(steps, 2),
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer `config.name` at `learning_rate`, gradients clipped by global norm.

    `adamw` is AdamW (arXiv 1711.05101). `muon` is Muon (Jordan 2024; its step's size as arXiv 2502.16982, eq. 4) for
    `is_layer_kernel`, each layer's matrix by itself, and AdamW for embedding, head and norms.
    """
    rate = learning_rate(config, steps)
    optimizer = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    if config.name == "muon":
        muon = optax.contrib.muon(
            rate,
            beta=config.muon_beta,
            weight_decay=config.weight_decay,
            consistent_rms=config.muon_rms,
            # The axes of a kernel; the one before them, along which layers are stacked, is a batch of matrices.
            muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1),
        )
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, _optimizer_names)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def is_layer_kernel(path: tuple[Any, ...]) -> bool:
    """Whether the variable at this path is a matrix of a layer: a kernel, or an adapter's a or b."""
    names = [key.key for key in path]
    return "layers" in names and names[-1] in ("kernel", "a", "b")


def _optimizer_names(variables: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map_with_path(lambda path, _: "muon" if is_layer_kernel(path) else "adamw", variables)


def unrolls(config: LlamaConfig, mesh: Mesh) -> bool:
    """Whether a step's program has every layer by itself; parameters are stacked either way.

    `config.scan_layers: false` unrolls anywhere. On one CPU device up to `UNROLLED` layers are unrolled too: a loop
    copies each layer's weights out of the stack, and what backward needs into one. Not with `remat` or codes: without
    the loop the compiler keeps what backward should repeat, and decodes the codes of all layers at once.
    """
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    plain = config.weights == "float" and config.remat == "none"
    return not config.scan_layers or (alone and plain and config.num_hidden_layers <= UNROLLED)


@dataclass(frozen=True, eq=False)
class Trainer:
    """The compiled steps of one model, writer and optimizer on one mesh."""

    model: Llama
    writer: Writer
    optimizer: optax.GradientTransformation
    mesh: Mesh
    row_length: int
    loss_block: int = 256  #: tokens of each row whose logits exist at the same time
    accumulate: int = 1  #: micro-batches of a batch

    def __post_init__(self) -> None:
        if self.collection == "params" and self.model.config.weights != "float":
            raise UserError(
                f"{self.model.config.weights} weights are frozen, only adapters on them can be trained: set lora.rank, "
                "or train a float model"
            )

    @property
    def collection(self) -> str:
        """The variables that are trained."""
        return "params" if self.model.lora is None else "lora"

    def start(self, variables: dict[str, Any]) -> TrainState:
        """The state before the first step; the optimizer's moments live where the variables do."""
        wanted = self.abstract_start(variables)
        optimizer = jax.jit(self.optimizer.init, out_shardings=jax.tree.map(lambda x: x.sharding, wanted.optimizer))(
            variables[self.collection]
        )
        step = jax.device_put(jnp.int32(0), wanted.step.sharding)
        return TrainState(step, variables[self.collection], wanted.frozen, optimizer)

    def abstract_start(self, variables: dict[str, Any]) -> TrainState:
        """`start`, computing nothing: shapes and places of the step and the optimizer, beside the variables given.

        Enough to compile for, as `variables` may be abstract too (jax.ShapeDtypeStruct with a sharding).
        """
        frozen = {name: value for name, value in variables.items() if name != self.collection}
        trained = variables[self.collection]
        whole = replicated(self.mesh)

        def masked(x: Any) -> bool:  # stands where a weight belongs to the other of two optimizers
            return isinstance(x, optax.MaskedNode)

        def placed(x: Array, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return x if masked(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        optimizer = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda moment, weight: placed(moment, weight.sharding),
            jax.eval_shape(self.optimizer.init, trained),
            trained,
            transform_non_params=lambda x: placed(x, whole),
            is_leaf=masked,
        )
        return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), trained, frozen, optimizer)

    def variables(self, state: TrainState) -> dict[str, Any]:
        """The model's variables, as `Llama.apply` takes them."""
        return {**state.frozen, self.collection: state.trained}

    def attention(self, rows: int) -> str:
        """What computes the attention of batches of `rows`, and why."""
        with jax.set_mesh(self.mesh):
            chosen = attention_kernels.choose(self.model.config, rows // self.accumulate, self.row_length)
        return ": ".join(chosen)

    def compile_train(self, state: TrainState, examples: Examples) -> Callable[..., tuple[TrainState, StepMetrics]]:
        """`step(state, examples, key) -> (state, metrics)` for these shapes and places; it consumes its state."""
        placed = jax.tree.map(lambda x: x.sharding, state)
        return self._compile(self._train_step, state, examples, (placed, replicated(self.mesh)), donate_argnums=0)

    def compile_eval(self, state: TrainState, examples: Examples) -> Callable[..., StepMetrics]:
        """`step(state, examples, key) -> metrics` for these shapes and places."""
        return self._compile(self._eval_step, state, examples, replicated(self.mesh))

    def _compile(self, step: Callable, state: TrainState, examples: Examples, out: Any, **options: Any) -> Callable:
        def like(x: Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        key = jax.eval_shape(jax.random.key, 0)
        jitted = jax.jit(step, out_shardings=out, **options)
        with jax.set_mesh(self.mesh):  # the model says how its activations are divided only where a mesh is set
            return jitted.lower(*jax.tree.map(like, (state, examples)), key).compile()

    def _rows(self, writer: Writer, examples: Examples, key: PRNGKeyArray) -> Rows:
        """Drawn and written, by each device for its own rows: they need nothing of another's."""

        def own(examples: Examples, key: PRNGKeyArray) -> Rows:
            return writer.write(examples, writer.draw(key, examples), self.row_length)

        batch = spec(("batch",))
        return jax.shard_map(own, in_specs=(batch, PartitionSpec()), out_specs=batch, check_vma=False)(examples, key)

    def _hidden(
        self, model: Llama, variables: dict[str, Any], rows: Rows, dropout: PRNGKeyArray | None
    ) -> tuple[Float[Array, "rows length embed"], Float[Array, "embed vocab"]]:
        """What logits are the product of."""
        config = model.config
        model = model.clone(config=replace(config, scan_layers=not unrolls(config, self.mesh)))
        hidden, _ = model.apply(
            variables,
            rows.tokens,
            rows.positions,
            rows.segments,
            deterministic=dropout is None,
            rngs={} if dropout is None else {"dropout": dropout},
            method="hidden",
        )
        return hidden, model.apply(variables, method="head")

    def _sums(
        self, variables: dict[str, Any], examples: Examples, key: PRNGKeyArray, dropout: PRNGKeyArray | None
    ) -> tuple[Float32[Array, ""], StepMetrics]:
        """The loss of some rows as a sum over its tokens, alone and among their counts."""
        rows = self._rows(self.writer, examples, key)
        hidden, head = self._hidden(self.model, variables, rows, dropout)
        sums = next_token_loss(hidden, head, rows, self.loss_block, self.model.config.vocab_size)
        metrics = StepMetrics(sums.nats, sums.targets, sums.tokens, sums.crystals, grad_norm=jnp.float32(0))
        return sums.nats, metrics

    def _objective(
        self, variables: dict[str, Any], examples: Examples, key: PRNGKeyArray, dropout: PRNGKeyArray
    ) -> tuple[Float32[Array, ""], StepMetrics]:
        """What training descends, as a sum over what `StepMetrics.counted` counts, alone and among the counts."""
        return self._sums(variables, examples, key, dropout)

    def _accumulated(self, compute: Callable[[Examples, Int[Array, ""]], T], examples: Examples) -> T:
        """The sum of `compute(rows, number)` over micro-batches; each device takes every n-th of its own rows."""
        n = self.accumulate
        if n == 1:  # not as a loop of one: the whole step would be traced twice, for its shapes and for the loop
            return compute(examples, jnp.int32(0))

        def divide(x: Array) -> Array:
            x = jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)
            return constrain(x, None, "batch")

        def add(total: T, numbered: tuple[Examples, Int[Array, ""]]) -> tuple[T, None]:
            return jax.tree.map(jnp.add, total, compute(*numbered)), None

        parts = jax.tree.map(divide, examples), jnp.arange(n)
        first = jax.tree.map(lambda x: x[0], parts)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, *first))
        return jax.lax.scan(add, nothing, parts)[0]

    def _train_step(self, state: TrainState, examples: Examples, key: PRNGKeyArray) -> tuple[TrainState, StepMetrics]:
        dropout = jax.random.fold_in(jax.random.fold_in(key, 0xD809), state.step)

        def gradient(rows: Examples, number: Int[Array, ""]) -> tuple[dict[str, Any], StepMetrics]:
            def loss(trained: dict[str, Any]) -> tuple[Float32[Array, ""], StepMetrics]:
                variables = {**state.frozen, self.collection: trained}
                return self._objective(variables, rows, key, jax.random.fold_in(dropout, number))

            return jax.grad(loss, has_aux=True)(state.trained)

        grads, metrics = self._accumulated(gradient, examples)
        grads = jax.tree.map(lambda x: x / jnp.maximum(metrics.counted, 1), grads)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        state = state.replace(step=state.step + 1, trained=trained, optimizer=optimizer)
        return state, metrics.mean().replace(grad_norm=optax.global_norm(grads))

    def _eval_step(self, state: TrainState, examples: Examples, key: PRNGKeyArray) -> StepMetrics:
        variables = self.variables(state)
        return self._accumulated(lambda rows, _: self._sums(variables, rows, key, None)[1], examples).mean()
