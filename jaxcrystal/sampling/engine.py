"""The slot engine: many crystals decode together in one compiled loop, and a slot that is done takes the next at once.

    prompts           each is read once, one cache entry a token, and shared by all slots that follow it
       │
       ├─ slot 0   ▓▓▓▓▓▓▓▓▓▓ crystal 0 ▓▓▓▓│▓▓▓▓ crystal 4 ▓▓▓▓▓▓│▓▓ …        each slot keeps the keys and
       ├─ slot 1   ▓▓▓▓▓▓ crystal 1 ▓▓│▓▓▓▓▓▓▓▓▓▓ crystal 3 ▓▓▓▓▓▓▓▓│▓ …       values of its own crystal only
       └─ slot 2   ▓▓▓▓▓▓▓▓ crystal 2 ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│▓▓ crystal 5 …

    desk              one page a crystal, used in turn: its tokens, log-probability and ending; the host reads it now
                      and then, hands finished pages out in their order and frees them

The key of a crystal is fold_in(seed, index), that of its t-th token fold_in(key of the crystal, t), and rows of a batch
never mix: which crystal a prompt and an index give does not depend on slots, order, neighbours, other prompts or
devices. (In float32; in bfloat16 a matrix product may round differently for another number of rows.)

With guidance each slot has two rows of the cache: one behind its prompt and one behind the prompt that states nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

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
from jaxcrystal.model.cache import BLOCK, PROMPT_AXES, TAIL_AXES, Cache, whole_blocks
from jaxcrystal.sampling.methods import Guidance, Method, pick
from jaxcrystal.weights.saved import SavedModel

STEPS_PER_CALL = 64  #: tokens of each slot between two looks of the host
WORKING = 8  #: copies of all logits that a step takes at most, as compiled programs tell
PAGES_PER_SLOT = 4  #: how far fast crystals may run ahead of a slow one


class Ending(IntEnum):
    """How a crystal's text ended."""

    FINISHED = 0  # with the end of sequence
    TRUNCATED = 1  # at the limit of tokens
    NAN_LOGITS = 2  # where the model's logits were no numbers


class Task(NamedTuple):
    """A crystal that is asked for."""

    prompt: int  #: its number
    index: int


@dataclass(frozen=True)
class Draw:
    """What was drawn for one task."""

    prompt: int
    index: int
    tokens: Int[np.ndarray, "drawn"]  #: the end of sequence included, if it came
    log_probability: float  #: of the tokens, by the model alone: temperature 1, before any method; NaN for NAN_LOGITS
    grammar_log_probability: float  #: Σ log of the probability that the model alone gave to the allowed tokens; ≤ 0
    ending: Ending


@struct.dataclass
class Slots:
    """Crystals that are being written, one a slot."""

    cache: Cache  #: slot s has the rows s · rows_per_slot and, with guidance, the one behind it
    logits: Float32[Array, "slots rows_per_slot vocab"]  #: of the next token
    crystal: Int32[Array, "slots"]  #: which of the crystals asked for, counted from 0; -1 in an idle slot
    log_probability: Float32[Array, "slots"]
    grammar_log_probability: Float32[Array, "slots"]
    grammar: State | None  #: None exactly if the engine has no grammar
    next: Int32[Array, ""]  #: the first crystal that no slot has taken yet

    @property
    def lengths(self) -> Int32[Array, "slots"]:
        """Tokens of each crystal so far."""
        return self.cache.lengths.reshape(len(self.crystal), -1)[:, 0]


@struct.dataclass
class Desk:
    """Where crystals are written down: crystal n on page n % pages, once the page's former one was read."""

    crystal: Int32[Array, "pages"]  #: whose finished text the page holds; -1 if none yet
    tokens: Int32[Array, "pages limit"]
    length: Int32[Array, "pages"]
    log_probability: Float32[Array, "pages"]
    grammar_log_probability: Float32[Array, "pages"]
    ending: Int32[Array, "pages"]


@struct.dataclass
class Orders:
    """What is to be written on each page."""

    index: UInt32[Array, "pages"]
    place: Int32[Array, "pages"]  #: of the prompt, in the cache
    constraints: Int32[Array, "pages"]  #: which of the grammar's


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
    before; first of all comes `guidance`, away from what the model says behind `unconditional`, a prompt's token ids.
    `end_id` ends a text, and so does the `max_new_tokens`-th token. Keys and values are kept as `cache_dtype` (default:
    the model's; int8 has a scale for each head of each token). Programs are compiled when first needed and serve every
    later call with as many prompts, or one, that are no longer, rounded up to a multiple of 64 tokens.

    Raises UserError if `slots` or `max_new_tokens` is not positive, or if the mesh does not divide slots or heads.
    """

    def __init__(
        self,
        model: SavedModel,
        *,
        end_id: int,
        methods: Sequence[Method] = (),
        grammar: Grammar | None = None,
        guidance: Guidance | None = None,
        unconditional: Sequence[int] = (),
        slots: int = 64,
        max_new_tokens: int,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self._model = model
        self._end_id = end_id
        self._methods = tuple(methods)
        self._grammar = grammar
        self._guidance = guidance
        self._always = [tuple(unconditional)] if guidance else []  # prompts that every task follows beside its own
        self._limit = max_new_tokens
        self._cache_dtype = cache_dtype
        self._mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
        parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self.slots = -(-slots // parts) * parts
        self._pages = PAGES_PER_SLOT * self.slots
        slots_sharding, whole = self._shardings()
        self._start = jax.jit(self._open, static_argnums=(0, 1), out_shardings=(slots_sharding, whole, whole))
        self._read_prompt = jax.jit(self._prefill, donate_argnums=(1, 2), out_shardings=(slots_sharding, whole))
        self._run = jax.jit(self._decode, donate_argnums=1, out_shardings=(slots_sharding, whole))

    def draw(self, prompt: Sequence[int], seed: int, indices: Sequence[int]) -> Iterator[Draw]:
        """The draw of each of `indices` behind one prompt, as `draw_all`."""
        return self.draw_all([prompt], seed, [Task(0, index) for index in indices])

    def draw_all(self, prompts: Sequence[Sequence[int]], seed: int, tasks: Sequence[Task]) -> Iterator[Draw]:
        """The draw of each of `tasks`, in their order, each as soon as it and all before it are done.

        A prompt holds token ids, the beginning of sequence included; the grammar's constraints of the same number apply
        to what follows it. Tasks of one prompt are best asked for one after the other: there is room for as many
        prompts as the slots follow at a time. Raises UserError if a prompt and `max_new_tokens` exceed the model's
        context, or if the seed or an index is not in [0, 2³²).
        """
        for prompt in (*prompts, *self._always):
            check_context(self._model.config, len(prompt), self._limit)
        for name, values in (("seed", [seed]), ("index", (task.index for task in tasks))):
            for value in values:
                if not 0 <= value < 2**32:
                    raise UserError(f"the {name} {value} does not lie between 0 and 2³² - 1")
        return self._draw([tuple(prompt) for prompt in prompts], jax.random.key(np.uint32(seed)), tasks)

    def compile_decode(self, prompt_tokens: int) -> Compiled:
        """The program behind `draw`, for a prompt of about so many tokens; the model's arrays may be abstract."""
        variables, whole = self._model.variables, replicated(self._mesh)

        def placed(x: Any, sharding: NamedSharding = whole) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        with jax.set_mesh(self._mesh):
            opened = jax.eval_shape(partial(self._open, 1, whole_blocks(prompt_tokens)))
            slots, desk, first = jax.tree.map(
                placed, opened, jax.tree.broadcast((self._shardings()[0], whole, whole), opened)
            )
            key = placed(jax.eval_shape(jax.random.key, 0))
            orders = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._no_orders())
            allowed = jax.ShapeDtypeStruct((), jnp.int32)
            return self._run.lower(variables, slots, desk, first, key, orders, allowed).compile()

    def memory(self, prompt_tokens: int, prompts: int = 1) -> int:
        """Bytes on each device beside the model's, for so many prompts at once of up to so many tokens.

        What is kept is counted exactly, and what a step takes in between as `WORKING` float32 for each row and token
        of the vocabulary; parameters that lie divided over `fsdp` take more when they are gathered.
        """
        opened = jax.eval_shape(partial(self._open, prompts, whole_blocks(prompt_tokens)))
        slots_sharding, whole = self._shardings()
        shardings = jax.tree.leaves(jax.tree.broadcast((slots_sharding, whole, whole), opened))
        kept = sum(
            math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x, sharding in zip(jax.tree.leaves(opened), shardings, strict=True)
        )
        logits = slots_sharding.logits.shard_shape(opened[0].logits.shape)
        return kept + 4 * WORKING * math.prod(logits)

    def _draw(self, prompts: list[tuple[int, ...]], key: Key[Array, ""], tasks: Sequence[Task]) -> Iterator[Draw]:
        places = most_at_once(tasks, 2 * self.slots)
        blocks = whole_blocks(max(map(len, (*prompts, *self._always)), default=0))
        with jax.set_mesh(self._mesh):
            slots, desk, first = self._start(places, blocks)

        def read_prompt(prompt: tuple[int, ...], place: int) -> None:
            nonlocal slots, first
            tokens = np.zeros((blocks, BLOCK), np.int32)
            tokens.flat[: len(prompt)] = prompt
            with jax.set_mesh(self._mesh):
                slots, first = self._read_prompt(
                    self._model.variables, slots, first, tokens, np.int32(len(prompt)), np.int32(place)
                )

        for place, prompt in enumerate(self._always, start=places):
            read_prompt(prompt, place)
        place_of: dict[tuple[int, ...], int] = {}  # prompt -> place
        waiting: deque[int] = deque(range(places))  # places that nobody follows any more, longest first
        finished: list[Draw] = []
        read = allowed = 0  # crystals handed out or in `finished`; crystals whose prompt has a place
        orders = self._no_orders()
        while read < len(tasks):
            while allowed < min(len(tasks), read + self._pages):
                number, index = tasks[allowed]
                prompt = prompts[number]
                if prompt not in place_of:
                    if not waiting:
                        break
                    place = waiting.popleft()
                    place_of = {other: at for other, at in place_of.items() if at != place} | {prompt: place}
                    read_prompt(prompt, place)
                elif place_of[prompt] in waiting:
                    waiting.remove(place_of[prompt])
                page = allowed % self._pages
                orders.index[page], orders.place[page], orders.constraints[page] = index, place_of[prompt], number
                allowed += 1
            with jax.set_mesh(self._mesh):
                slots, desk = self._run(
                    self._model.variables, slots, desk, first, key, jax.tree.map(np.copy, orders), np.int32(allowed)
                )
            yield from finished  # while the device goes on
            finished = []
            pages = jax.device_get(desk)
            while read < allowed and pages.crystal[page := read % self._pages] == read:
                finished.append(
                    Draw(
                        *tasks[read],
                        tokens=pages.tokens[page, : pages.length[page]].copy(),
                        log_probability=float(pages.log_probability[page]),
                        grammar_log_probability=float(pages.grammar_log_probability[page]),
                        ending=Ending(pages.ending[page]),
                    )
                )
                read += 1
            followed = {place_of[prompts[task.prompt]] for task in tasks[read:allowed]}
            waiting.extend(place for place in place_of.values() if place not in followed and place not in waiting)
        yield from finished

    def _no_orders(self) -> Orders:
        return Orders(
            np.zeros(self._pages, np.uint32), np.zeros(self._pages, np.int32), np.zeros(self._pages, np.int32)
        )

    def _open(self, places: int, blocks: int) -> tuple[Slots, Desk, Float32[Array, "places vocab"]]:
        """Idle slots, an empty desk, and room for prompts and for the logits behind them."""
        config = self._model.config
        everyone = places + len(self._always)
        rows = 1 + len(self._always)
        cache = Cache.empty(config, self.slots * rows, self._limit, everyone, blocks * BLOCK, dtype=self._cache_dtype)
        follows = jnp.zeros((self.slots, rows), jnp.int32).at[:, 1:].set(places)
        slots = Slots(
            cache=cache.replace(prompt=follows.reshape(-1)),
            logits=jnp.zeros((self.slots, rows, config.padded_vocab_size)),
            crystal=jnp.full(self.slots, -1, jnp.int32),
            log_probability=jnp.zeros(self.slots),
            grammar_log_probability=jnp.zeros(self.slots),
            grammar=self._grammar and self._grammar.start(jnp.zeros(self.slots, jnp.int32)),
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
        return slots, desk, jnp.zeros((everyone, config.padded_vocab_size))

    def _prefill(
        self,
        variables: Any,
        slots: Slots,
        first: Float32[Array, "places vocab"],
        prompt: Int32[Array, "blocks block"],
        length: Int32[Array, ""],
        place: Int32[Array, ""],
    ) -> tuple[Slots, Float32[Array, "places vocab"]]:
        """The model reads a prompt, a block at a time: into the cache, and its logits behind the last token."""
        module = self._model.module
        blocks = len(prompt)
        empty = Cache.empty(self._model.config, 1, blocks * BLOCK, dtype=self._cache_dtype)

        def read(block: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            positions = block * BLOCK + jnp.arange(BLOCK)
            hidden, cache = module.apply(
                variables, prompt[block][None], positions[None], cache=carry[0], method="hidden"
            )
            return cache, jnp.where(positions[:, None] == length - 1, hidden[0], 0).sum(0) + carry[1]

        last = jnp.zeros(self._model.config.hidden_size, self._model.config.dtype)
        cache, last = jax.lax.fori_loop(0, whole_blocks(length), read, (empty, last))
        logits = module.apply(variables, last[None, None], method="logits")[0, 0]
        cache = slots.cache.with_prompt(place, cache.replace(lengths=length[None]))
        return slots.replace(cache=cache), first.at[place].set(logits)

    def _decode(
        self,
        variables: Any,
        slots: Slots,
        desk: Desk,
        first: Float32[Array, "places vocab"],
        key: Key[Array, ""],
        orders: Orders,
        allowed: Int32[Array, ""],
    ) -> tuple[Slots, Desk]:
        """Up to `STEPS_PER_CALL` tokens in every slot; fewer when the crystals before number `allowed` are all done."""

        def unfinished(carry: tuple[Array, Slots, Desk]) -> Array:
            step, slots, _ = carry
            return (step < STEPS_PER_CALL) & ((slots.next < allowed) | (slots.crystal >= 0).any())

        def step(carry: tuple[Array, Slots, Desk]) -> tuple[Array, Slots, Desk]:
            step, slots, desk = carry
            slots = self._refill(slots, first, orders, allowed)
            page = jnp.where(slots.crystal >= 0, slots.crystal % self._pages, self._pages)  # an idle slot has no page
            index = orders.index.at[page].get(mode="fill", fill_value=0)
            token, normalizer, kept = self._choose(slots, jax.vmap(partial(jax.random.fold_in, key))(index))
            slots, desk = self._write(slots, desk, page, token, normalizer, kept)
            return step + 1, self._read(variables, slots, token), desk

        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, desk))[1:]

    def _refill(
        self, slots: Slots, first: Float32[Array, "places vocab"], orders: Orders, allowed: Int32[Array, ""]
    ) -> Slots:
        """Idle slots take the next crystals, in order, as far as these are allowed."""
        idle = slots.crystal < 0
        waiting = slots.next + jnp.cumsum(idle) - 1
        taken = idle & (waiting < allowed)
        page = waiting % self._pages
        prompt = slots.cache.prompt.reshape(self.slots, -1)
        prompt = prompt.at[:, 0].set(jnp.where(taken, orders.place[page], prompt[:, 0]))
        rows = prompt.shape[1]

        def reset(start: Array, now: Array) -> Array:
            return jnp.where(jnp.expand_dims(taken, tuple(range(1, now.ndim))), start, now)

        grammar = self._grammar and jax.tree.map(reset, self._grammar.start(orders.constraints[page]), slots.grammar)
        lengths = jnp.where(jnp.repeat(idle, rows), 0, slots.cache.lengths)
        return slots.replace(
            cache=slots.cache.replace(lengths=lengths, prompt=prompt.reshape(-1)),
            logits=jax.lax.cond(
                taken.any(), lambda x: jnp.where(taken[:, None, None], first[prompt], x), lambda x: x, slots.logits
            ),
            crystal=jnp.where(taken, waiting, slots.crystal),
            log_probability=jnp.where(taken, 0, slots.log_probability),
            grammar_log_probability=jnp.where(taken, 0, slots.grammar_log_probability),
            grammar=grammar,
            next=slots.next + taken.sum(),
        )

    def _choose(
        self, slots: Slots, keys: Key[Array, "slots"]
    ) -> tuple[Int32[Array, "slots"], Float32[Array, "slots"], Float32[Array, "slots"]]:
        """Each slot's next token; log Σ exp of all its logits, finite unless these are unusable; of those allowed."""
        logits = slots.logits[:, 0]
        normalizer = kept = jax.nn.logsumexp(logits, axis=-1)
        if self._grammar is not None:
            allowed = self._model.module.rules.constrain(self._grammar.allowed(slots.grammar), "batch", "vocab")
            logits = jnp.where(allowed, logits, -jnp.inf)
            kept = jnp.minimum(jax.nn.logsumexp(logits, axis=-1), normalizer)
        if self._guidance is not None:
            logits = self._guidance(logits, slots.logits[:, 1])
            normalizer += 0 * jax.nn.logsumexp(slots.logits[:, 1], axis=-1)  # NaN there is NaN here
        for method in self._methods:
            logits = method(logits)
        return pick(jax.vmap(jax.random.fold_in)(keys, slots.lengths), logits), normalizer, kept

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
        length = slots.lengths + usable
        logit = jnp.take_along_axis(slots.logits[:, 0], token[:, None], axis=1)[:, 0]
        log_probability = slots.log_probability + logit - normalizer
        grammar_log_probability = slots.grammar_log_probability + kept - normalizer
        ended = ~usable | (token == self._end_id) | (length == self._limit)
        ending = jnp.where(token == self._end_id, Ending.FINISHED, Ending.TRUNCATED)
        ending = jnp.where(usable, ending, Ending.NAN_LOGITS)
        done = jnp.where(ended, page, self._pages)
        desk = desk.replace(
            crystal=desk.crystal.at[done].set(slots.crystal, mode="drop"),
            tokens=desk.tokens.at[page, slots.lengths].set(token, mode="drop"),
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
        """The model reads each slot's new token, in each of its rows."""
        token = jnp.repeat(token, slots.logits.shape[1])
        logits, cache = self._model.module.apply(
            variables, token[:, None], slots.cache.positions[:, None], cache=slots.cache
        )
        return slots.replace(cache=cache, logits=logits.reshape(slots.logits.shape))

    def _shardings(self) -> tuple[Slots, NamedSharding]:
        """How the slots lie on the mesh, and what is whole on every device."""
        config, rules, whole = self._model.config, self._model.module.rules, replicated(self._mesh)
        rules.check_divides(self._mesh, "kv_heads", config.num_key_value_heads, "the cache")
        prompt, tail = (NamedSharding(self._mesh, rules.spec(axes)) for axes in (PROMPT_AXES, TAIL_AXES))
        logits = NamedSharding(self._mesh, rules.spec(("batch", None, "vocab")))
        cache = Cache(prompt, prompt, whole, tail, tail, lengths=whole, prompt=whole)
        return Slots(cache, logits, whole, whole, whole, self._grammar and whole, whole), whole


def most_at_once(tasks: Sequence[Task], window: int) -> int:
    """The most prompts that any so many tasks in a row follow, as a power of two: few programs serve all numbers."""
    last: deque[int] = deque()
    counts: dict[int, int] = {}
    most = 1
    for task in tasks:
        last.append(task.prompt)
        counts[task.prompt] = counts.get(task.prompt, 0) + 1
        if len(last) > window:
            counts[(old := last.popleft())] -= 1
            if not counts[old]:
                del counts[old]
        most = max(most, len(counts))
    return 1 << (most - 1).bit_length()
