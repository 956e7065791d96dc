"""The slot engine: many crystals decode together in one compiled loop, and a slot that is done takes the next at once.

    prompt            read once, one cache entry a token, shared by all slots
       │
       ├─ slot 0   ▓▓▓▓▓▓▓▓▓▓ crystal 0 ▓▓▓▓│▓▓▓▓ crystal 4 ▓▓▓▓▓▓│▓▓ …        each slot keeps the keys and
       ├─ slot 1   ▓▓▓▓▓▓ crystal 1 ▓▓│▓▓▓▓▓▓▓▓▓▓ crystal 3 ▓▓▓▓▓▓▓▓│▓ …       values of its own crystal only
       └─ slot 2   ▓▓▓▓▓▓▓▓ crystal 2 ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│▓▓ crystal 5 …

    desk              one page a crystal, used in turn: its tokens, log-probability and ending; the host reads it now
                      and then, hands finished pages out in their order and frees them

The key of a crystal is fold_in(seed, index), that of its t-th token fold_in(key of the crystal, t), and rows of a batch
never mix: which crystal an index gives does not depend on slots, order, neighbours or devices. (In float32; in bfloat16
a matrix product may round differently for another number of rows.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.stages import Compiled
from jaxtyping import Array, Float32, Int, Int32, Key, UInt32

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.crystals.grammar import Grammar, State
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh, replicated
from jaxcrystal.model.attention import Cache
from jaxcrystal.model.saved import SavedModel
from jaxcrystal.sample.methods import Method

PROMPT_STEP = 64  #: prompts are padded to a multiple of this, so that those of similar length share one program
STEPS_PER_CALL = 64  #: tokens of each slot between two looks of the host
PAGES_PER_SLOT = 4  #: how far fast crystals may run ahead of a slow one


class Ending(IntEnum):
    """How a crystal's text ended."""

    FINISHED = 0  # with the end of sequence
    TRUNCATED = 1  # at the limit of tokens
    NAN_LOGITS = 2  # where the model's logits were no numbers


@dataclass(frozen=True)
class Draw:
    """What was drawn for one index."""

    index: int
    tokens: Int[np.ndarray, "drawn"]  #: the end of sequence included, if it came
    log_probability: float  #: of the tokens, by the model alone: temperature 1, before any method; NaN for NAN_LOGITS
    grammar_log_probability: float  #: Σ log of the probability that the model alone gave to the allowed tokens; ≤ 0
    ending: Ending


@struct.dataclass
class Slots:
    """Crystals that are being written, one a slot. A slot's number of tokens so far is its cache's `lengths`."""

    cache: Cache
    logits: Float32[Array, "slots vocab"]  #: of the next token
    crystal: Int32[Array, "slots"]  #: which of the crystals asked for, counted from 0; -1 in an idle slot
    log_probability: Float32[Array, "slots"]
    grammar_log_probability: Float32[Array, "slots"]
    grammar: State | None  #: None exactly if the engine has no grammar
    next: Int32[Array, ""]  #: the first crystal that no slot has taken yet


@struct.dataclass
class Desk:
    """Where crystals are written down: crystal n on page n % pages, once the page's former one was read."""

    crystal: Int32[Array, "pages"]  #: whose finished text the page holds; -1 if none yet
    tokens: Int32[Array, "pages limit"]
    length: Int32[Array, "pages"]
    log_probability: Float32[Array, "pages"]
    grammar_log_probability: Float32[Array, "pages"]
    ending: Int32[Array, "pages"]


def check_context(config: LlamaConfig, prompt: int, max_new_tokens: int) -> None:
    """Raises UserError where so many tokens of the prompt, and then so many new ones, exceed the model's context."""
    context = config.max_position_embeddings
    if prompt + max_new_tokens > context:
        left = context - prompt
        remedy = f"set max_new_tokens to at most {left}" if left > 0 else "shorten the prompt"
        raise UserError(
            f"the prompt has {prompt} tokens and {max_new_tokens} may follow, but the model's context holds {context}: "
            f"{remedy}"
        )


class Engine:
    """Draws texts from `model`, `slots` at a time (rounded up to what the mesh can divide).

    `methods` are applied in order to the logits of every token, of which those that `grammar` does not allow are -inf
    before. `end_id` ends a text, and so does the `max_new_tokens`-th token. Programs are compiled when first needed and
    serve every later call whose prompt has the same length, rounded up to a multiple of 64.

    Raises UserError if `slots` or `max_new_tokens` is not positive.
    """

    def __init__(
        self,
        model: SavedModel,
        *,
        end_id: int,
        methods: Sequence[Method] = (),
        grammar: Grammar | None = None,
        slots: int = 64,
        max_new_tokens: int,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self._model = model
        self._end_id = end_id
        self._methods = tuple(methods)
        self._grammar = grammar
        self._limit = max_new_tokens
        self._mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
        parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self.slots = -(-slots // parts) * parts
        self._pages = PAGES_PER_SLOT * self.slots
        slots_sharding, whole = self._shardings()
        self._start = jax.jit(self._open, out_shardings=(slots_sharding, whole, whole))
        self._run = jax.jit(self._decode, donate_argnums=1, out_shardings=(slots_sharding, whole))

    def draw(self, prompt: Sequence[int], seed: int, indices: Sequence[int]) -> Iterator[Draw]:
        """The draw of each of `indices`, in their order, each as soon as it and all before it are done.

        `prompt` holds token ids, the beginning of sequence included. Raises UserError if it and `max_new_tokens`
        exceed the model's context, or if the seed or an index is not in [0, 2³²).
        """
        check_context(self._model.config, len(prompt), self._limit)
        for name, values in (("seed", [seed]), ("index", indices)):
            for value in values:
                if not 0 <= value < 2**32:
                    raise UserError(f"the {name} {value} does not lie between 0 and 2³² - 1")
        return self._draw(prompt, jax.random.key(np.uint32(seed)), np.asarray(indices, np.uint32))

    def compile_decode(self, prompt_tokens: int) -> Compiled:
        """The program behind `draw`, for a prompt of about so many tokens; the model's arrays may be abstract."""
        variables, whole = self._model.variables, replicated(self._mesh)

        def placed(x: Any, sharding: NamedSharding = whole) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        prompt = jax.ShapeDtypeStruct((1, -(-prompt_tokens // PROMPT_STEP) * PROMPT_STEP), jnp.int32)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        with jax.set_mesh(self._mesh):
            slots, desk, first_logits = jax.eval_shape(self._open, variables, prompt, number)
            slots = jax.tree.map(placed, slots, self._shardings()[0])
            desk, first_logits, key = jax.tree.map(
                placed, (desk, first_logits, jax.eval_shape(jax.random.key, 0)), is_leaf=lambda x: hasattr(x, "dtype")
            )
            page_index = jax.ShapeDtypeStruct((self._pages,), jnp.uint32)
            return self._run.lower(variables, slots, desk, first_logits, key, page_index, number).compile()

    def _draw(self, prompt: Sequence[int], key: Key[Array, ""], indices: UInt32[np.ndarray, "n"]) -> Iterator[Draw]:
        padded = np.zeros((1, -(-len(prompt) // PROMPT_STEP) * PROMPT_STEP), np.int32)
        padded[0, : len(prompt)] = prompt
        with jax.set_mesh(self._mesh):
            slots, desk, first_logits = self._start(self._model.variables, padded, np.int32(len(prompt)))
        finished: list[Draw] = []
        read = 0  # crystals handed out or in `finished`
        while read < len(indices):
            allowed = min(len(indices), read + self._pages)
            page_index = np.zeros(self._pages, np.uint32)
            page_index[np.arange(read, allowed) % self._pages] = indices[read:allowed]
            with jax.set_mesh(self._mesh):
                slots, desk = self._run(
                    self._model.variables, slots, desk, first_logits, key, page_index, np.int32(allowed)
                )
            yield from finished  # while the device goes on
            finished = []
            pages = jax.device_get(desk)
            while read < allowed and pages.crystal[page := read % self._pages] == read:
                finished.append(
                    Draw(
                        index=int(indices[read]),
                        tokens=pages.tokens[page, : pages.length[page]].copy(),
                        log_probability=float(pages.log_probability[page]),
                        grammar_log_probability=float(pages.grammar_log_probability[page]),
                        ending=Ending(pages.ending[page]),
                    )
                )
                read += 1
        yield from finished

    def _open(
        self, variables: Any, prompt: Int32[Array, "1 padded"], length: Int32[Array, ""]
    ) -> tuple[Slots, Desk, Float32[Array, "vocab"]]:
        """Reads the prompt: idle slots that share it, an empty desk, and the logits of every crystal's first token."""
        config = self._model.config
        padded = prompt.shape[1]
        cache = Cache.empty(config, batch=1, tail=padded)
        logits, cache = self._model.module.apply(variables, prompt, jnp.arange(padded)[None], cache=cache)
        cache = cache.replace(lengths=length[None]).as_prefix(self.slots, self._limit)
        slots = Slots(
            cache=cache,
            logits=jnp.zeros((self.slots, config.padded_vocab_size)),
            crystal=jnp.full(self.slots, -1, jnp.int32),
            log_probability=jnp.zeros(self.slots),
            grammar_log_probability=jnp.zeros(self.slots),
            grammar=self._grammar and self._grammar.start(self.slots),
            next=jnp.int32(0),
        )
        desk = Desk(
            crystal=jnp.full(self._pages, -1, jnp.int32),
            tokens=jnp.zeros((self._pages, self._limit), jnp.int32),
            length=jnp.zeros(self._pages, jnp.int32),
            log_probability=jnp.zeros(self._pages),
            grammar_log_probability=jnp.zeros(self._pages),
            ending=jnp.zeros(self._pages, jnp.int32),
        )
        return slots, desk, logits[0, length - 1]

    def _decode(
        self,
        variables: Any,
        slots: Slots,
        desk: Desk,
        first_logits: Float32[Array, "vocab"],
        key: Key[Array, ""],
        page_index: UInt32[Array, "pages"],
        allowed: Int32[Array, ""],
    ) -> tuple[Slots, Desk]:
        """Up to `STEPS_PER_CALL` tokens in every slot; fewer when the crystals before number `allowed` are all done.

        `page_index` holds the index that the crystal on each page is drawn for.
        """

        def unfinished(carry: tuple[Array, Slots, Desk]) -> Array:
            step, slots, _ = carry
            return (step < STEPS_PER_CALL) & ((slots.next < allowed) | (slots.crystal >= 0).any())

        def step(carry: tuple[Array, Slots, Desk]) -> tuple[Array, Slots, Desk]:
            step, slots, desk = carry
            slots = self._refill(slots, first_logits, allowed)
            page = jnp.where(slots.crystal >= 0, slots.crystal % self._pages, self._pages)  # an idle slot has no page
            index = page_index.at[page].get(mode="fill", fill_value=0)
            token, normalizer, kept = self._choose(slots, jax.vmap(partial(jax.random.fold_in, key))(index))
            slots, desk = self._write(slots, desk, page, token, normalizer, kept)
            return step + 1, self._read(variables, slots, token), desk

        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, desk))[1:]

    def _refill(self, slots: Slots, first_logits: Float32[Array, "vocab"], allowed: Int32[Array, ""]) -> Slots:
        """Idle slots take the next crystals, in order, as far as these are allowed."""
        idle = slots.crystal < 0
        waiting = slots.next + jnp.cumsum(idle) - 1
        taken = idle & (waiting < allowed)

        def reset(start: Array, now: Array) -> Array:
            return jnp.where(jnp.expand_dims(taken, tuple(range(1, now.ndim))), start, now)

        return slots.replace(
            cache=slots.cache.replace(lengths=jnp.where(idle, 0, slots.cache.lengths)),
            logits=jnp.where(taken[:, None], first_logits, slots.logits),
            crystal=jnp.where(taken, waiting, slots.crystal),
            log_probability=jnp.where(taken, 0, slots.log_probability),
            grammar_log_probability=jnp.where(taken, 0, slots.grammar_log_probability),
            grammar=self._grammar and jax.tree.map(reset, self._grammar.start(self.slots), slots.grammar),
            next=slots.next + taken.sum(),
        )

    def _choose(
        self, slots: Slots, keys: Key[Array, "slots"]
    ) -> tuple[Int32[Array, "slots"], Float32[Array, "slots"], Float32[Array, "slots"]]:
        """Each slot's next token; log Σ exp of all its logits, finite unless these are unusable; of those allowed."""
        logits = slots.logits
        normalizer = kept = jax.nn.logsumexp(logits, axis=-1)
        if self._grammar is not None:
            allowed = self._model.module.rules.constrain(self._grammar.allowed(slots.grammar), "batch", "vocab")
            logits = jnp.where(allowed, logits, -jnp.inf)
            kept = jnp.minimum(jax.nn.logsumexp(logits, axis=-1), normalizer)
        for method in self._methods:
            logits = method(logits)
        keys = jax.vmap(jax.random.fold_in)(keys, slots.cache.lengths)
        token = jax.vmap(jax.random.categorical)(keys, logits)
        return token.astype(jnp.int32), normalizer, kept

    def _write(
        self,
        slots: Slots,
        desk: Desk,
        page: Int32[Array, "slots"],
        token: Int32[Array, "slots"],
        normalizer: Float32[Array, "slots"],
        kept: Float32[Array, "slots"],
    ) -> tuple[Slots, Desk]:
        """Tokens onto their pages; crystals that end with them leave their slots."""
        usable = jnp.isfinite(normalizer)
        length = slots.cache.lengths + usable
        logit = jnp.take_along_axis(slots.logits, token[:, None], axis=1)[:, 0]
        log_probability = slots.log_probability + logit - normalizer
        grammar_log_probability = slots.grammar_log_probability + kept - normalizer
        ended = ~usable | (token == self._end_id) | (length == self._limit)
        ending = jnp.where(token == self._end_id, Ending.FINISHED, Ending.TRUNCATED)
        ending = jnp.where(usable, ending, Ending.NAN_LOGITS)
        done = jnp.where(ended, page, self._pages)
        desk = desk.replace(
            crystal=desk.crystal.at[done].set(slots.crystal, mode="drop"),
            tokens=desk.tokens.at[page, slots.cache.lengths].set(token, mode="drop"),
            length=desk.length.at[done].set(length, mode="drop"),
            log_probability=desk.log_probability.at[done].set(log_probability, mode="drop"),
            grammar_log_probability=desk.grammar_log_probability.at[done].set(grammar_log_probability, mode="drop"),
            ending=desk.ending.at[done].set(ending, mode="drop"),
        )
        slots = slots.replace(
            crystal=jnp.where(ended, -1, slots.crystal),
            log_probability=log_probability,
            grammar_log_probability=grammar_log_probability,
            grammar=self._grammar and self._grammar.advance(slots.grammar, token),
        )
        return slots, desk

    def _read(self, variables: Any, slots: Slots, token: Int32[Array, "slots"]) -> Slots:
        """The model reads each slot's new token."""
        positions = slots.cache.prefix_length + slots.cache.lengths
        logits, cache = self._model.module.apply(variables, token[:, None], positions[:, None], cache=slots.cache)
        return slots.replace(cache=cache, logits=logits[:, 0])

    def _shardings(self) -> tuple[Slots, NamedSharding]:
        """How the slots lie on the mesh, and what is whole on every device."""
        config, rules, whole = self._model.config, self._model.module.rules, replicated(self._mesh)
        entries = (config.num_hidden_layers, self.slots, config.num_key_value_heads, self._limit, config.head_dim)
        tail = rules.sharding(self._mesh, (None, "batch", "kv_heads", None, None), entries, "the cache")
        prefix = NamedSharding(self._mesh, rules.spec((None, "kv_heads", None, None)))
        logits = NamedSharding(self._mesh, rules.spec(("batch", "vocab")))
        cache = Cache(prefix, prefix, whole, keys=tail, values=tail, lengths=whole)
        grammar = self._grammar and jax.tree.map(lambda _: whole, self._grammar.start(1))
        return Slots(cache, logits, whole, whole, whole, grammar, whole), whole
