"""LLaMA (arXiv 2302.13971, 2307.09288) and its kin: tokens -> logits, in the order in which it is computed.

Modules and parameters bear the names that Hugging Face gives them; kernels are [in, out]; the parameters of all
layers are stacked along a leading axis. Activations and matrix products have the dtype of the config, statistics of
norms, softmax and logits are float32, parameters stay in the dtype in which they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from jaxcrystal.config import LlamaConfig, LoraConfig
from jaxcrystal.mesh import constrain, gathered, sharding
from jaxcrystal.model import attention_kernels, kernels
from jaxcrystal.model.attention import View, attend
from jaxcrystal.model.cache import Cache
from jaxcrystal.model.lora import Linear
from jaxcrystal.model.rotary import Rotation, rotary, rotate

HEAD_AXES = ("embed", "vocab")

#: What each layer keeps from forward to backward beside its input, by `config.remat`; "none" keeps everything.
REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(kernels.PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Llama(nn.Module):
    """The whole model; `variables` are {"params": ...} and, with `lora`, {"lora": ...}."""

    config: LlamaConfig
    lora: LoraConfig | None = None

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = Embedding(config.padded_vocab_size, config.hidden_size)
        layer = Layer
        if config.remat != "none":
            # Argument 5 is `deterministic`, a Python bool; a loop's body needs no optimization barrier against CSE.
            layer = nn.remat(Layer, policy=REMAT[config.remat], static_argnums=5, prevent_cse=not config.scan_layers)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, nn.broadcast),
            length=config.num_hidden_layers,
            unroll=1 if config.scan_layers else config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # nothing is written in the loop: a layer is traced once instead of twice
        )(config, self.lora)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config.hidden_size, config.padded_vocab_size)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        segments: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float32[Array, "batch time vocab"], Cache | None]:
        """Logits of the next token after each of `tokens`, and the cache with these tokens appended.

        `positions` count from 0 in each sequence, a cached prefix and tail included. Tokens attend within equal
        `segments`, 0 being padding; None makes each row one segment. Without `deterministic`, layers and
        adapters draw their dropout from the rng `dropout`.
        """
        hidden, cache = self.hidden(tokens, positions, segments, cache, deterministic)
        return self.logits(hidden), cache

    def hidden(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        segments: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch time embed"], Cache | None]:
        """What `logits` reads: the last layer's output, normed."""
        x = self.embed_tokens(tokens).astype(self.config.dtype)
        x = constrain(x, "batch", None, None)
        rotation = rotary(self.config, positions)
        implementation = "xla"  # takes the one token that initialization is shown
        if cache is None and not self.is_initializing():
            implementation, _ = attention_kernels.choose(self.config, *tokens.shape)
        view = View.of(implementation, tokens.shape[1], segments, cache)
        number = None if cache is None else jnp.arange(self.config.num_hidden_layers)
        x, written = self.layers(x, rotation, view, number, deterministic)
        return self.norm(x), None if cache is None else cache.append(*written)

    def logits(self, hidden: Float[Array, "batch time embed"]) -> Float32[Array, "batch time vocab"]:
        """The scalar product with each column of the head."""
        return project(hidden, self.head(), self.config.vocab_size)

    def head(self) -> Float[Array, "embed vocab"]:
        """The head's own kernel, or the embedding's transpose where they are tied; gathered over fsdp."""
        kernel = self.embed_tokens.embedding.T if self.config.tie_word_embeddings else self.lm_head()
        return gathered(kernel, HEAD_AXES)


def project(
    hidden: Float[Array, "batch time embed"], head: Float[Array, "embed vocab"], pieces: int
) -> Float32[Array, "batch time vocab"]:
    """Logits, from products in the dtype of `hidden`; -inf in columns beyond `pieces`."""
    logits = kernels.to_float32(hidden, head)
    if head.shape[1] > pieces:
        logits = jnp.where(jnp.arange(head.shape[1]) < pieces, logits, -jnp.inf)
    return constrain(logits, "batch", None, "vocab")


class Embedding(nn.Module):
    """One row for each piece of the vocabulary."""

    vocab: int
    width: int

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab, self.width))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time embed"]:
        # Rows are made whole before they are looked up: the compiler cannot pass from divided rows to a divided batch.
        return gathered(self.embedding, ("vocab", "embed"))[tokens]


class Head(nn.Module):
    """One column for each piece of the vocabulary, where these are not the embedding's rows."""

    width: int
    vocab: int

    @nn.compact
    def __call__(self) -> Float[Array, "embed vocab"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), HEAD_AXES)
        return self.param("kernel", init, (self.width, self.vocab))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); also its keys and values, if there is a cache.

    `number` counts layers from 0 and indexes the cache's first axis.
    """

    config: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        rotation: Rotation,
        view: View,
        number: Int[Array, ""] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time embed"], tuple[Array, Array] | None]:
        eps = self.config.rms_norm_eps
        h = RMSNorm(eps, name="input_layernorm")(x)
        h, written = Attention(self.config, self.lora, name="self_attn")(h, rotation, view, number, deterministic)
        dropout = nn.Dropout(self.config.dropout)
        x = x + dropout(h, deterministic)
        h = RMSNorm(eps, name="post_attention_layernorm")(x)
        x = x + dropout(FeedForward(self.config, self.lora, name="mlp")(h, deterministic), deterministic)
        # Constrained in every layer: left alone, the compiler may divide the activations' width as the parameters' is.
        return constrain(x, "batch", None, None), None if number is None else written


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time embed"],
        rotation: Rotation,
        view: View,
        number: Int[Array, ""] | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time embed"], tuple[Array, Array]]:
        config = self.config
        linear = partial(Linear, lora=self.lora, weights=config.weights)

        adapted = jnp.copy(x)  # see `Linear`

        def heads(name: str, count: int, axis: str) -> Float[Array, "batch time heads head_dim"]:
            project = linear(count * config.head_dim, ("embed", axis), name=f"{name}_proj", bias=config.qkv_bias)
            y = project(x, deterministic, adapted).reshape(*x.shape[:2], count, config.head_dim)
            if config.qk_norm and name != "v":
                y = RMSNorm(config.rms_norm_eps, name=f"{name}_norm")(y)
            return y

        queries = rotate(heads("q", config.num_attention_heads, "heads"), rotation)
        keys = rotate(heads("k", config.num_key_value_heads, "kv_heads"), rotation)
        values = heads("v", config.num_key_value_heads, "kv_heads")
        y = attend(queries, keys, values, view, number).reshape(*x.shape[:2], -1)
        y = linear(config.hidden_size, ("heads", "embed"), name="o_proj")(y, deterministic)
        return y, (keys, values)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x))."""

    config: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time embed"], deterministic: bool) -> Float[Array, "batch time embed"]:
        config = self.config
        linear = partial(Linear, lora=self.lora, weights=config.weights)
        adapted = jnp.copy(x)  # see `Linear`
        gate = linear(config.intermediate_size, ("embed", "mlp"), name="gate_proj")(x, deterministic, adapted)
        up = linear(config.intermediate_size, ("embed", "mlp"), name="up_proj")(x, deterministic, adapted)
        down = linear(config.hidden_size, ("mlp", "embed"), name="down_proj")
        return down(nn.silu(gate) * up, deterministic)


class RMSNorm(nn.Module):
    """scale · x / √(mean x² + eps) (arXiv 1910.07467), the mean taken in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*n embed"]) -> Float[Array, "*n embed"]:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


def abstract_variables(model: Llama, mesh: Mesh) -> dict[str, Any]:
    """Shape, dtype (float32) and sharding of every variable, as jax.ShapeDtypeStruct; nothing is computed.

    Raises UserError where the mesh does not fit the model, naming the parameter, its axis and the sizes.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), token, token)

    def place(path: Any, box: nn.LogicallyPartitioned) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = box.value
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(mesh, box.names, value.shape, name))

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def param_shardings(model: Llama, mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding for every variable: {"params": ..., "lora": ...}. Raises as `abstract_variables` does."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_variables(model, mesh))


def initialize(model: Llama, key: Array, mesh: Mesh, collections: Sequence[str] | None = None) -> dict[str, Any]:
    """Random variables, of these collections (default: all), made where they belong on `mesh`.

    Their values depend on neither the mesh nor `collections`; those not named take no memory.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    places = param_shardings(model, mesh)
    chosen = {name: places[name] for name in collections or places}

    def draw(key: Array) -> dict[str, Any]:
        variables = nn.unbox(model.init(key, token, token))
        return {name: variables[name] for name in chosen}

    return jax.jit(draw, out_shardings=chosen)(key)
