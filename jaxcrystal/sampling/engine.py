"""The slot engine: many crystals decode together in one compiled loop, and a slot that is done takes the next at once.

    prompts           each is read once, into pages of a pool that all slots that follow it share
       │
       ├─ slot 0   ▓▓▓▓▓▓▓▓▓▓ crystal 0 ▓▓▓▓│▓▓▓▓ crystal 4 ▓▓▓▓▓▓│▓▓ …        each slot keeps the keys and
       ├─ slot 1   ▓▓▓▓▓▓ crystal 1 ▓▓│▓▓▓▓▓▓▓▓▓▓ crystal 3 ▓▓▓▓▓▓▓▓│▓ …       values of its own crystal only
       └─ slot 2   ▓▓▓▓▓▓▓▓ crystal 2 ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│▓▓ crystal 5 …

    pages             one a crystal, used in turn: its tokens, log-probability and ending; the host reads them now and
                      then, gives finished crystals out in their order and frees their pages

A step draws one token in each slot, among the grammar's letters, and appends the tokens behind it that the grammar
leaves no choice about (half of a text): the model reads them all in one call of a fixed number of tokens. They cost no
step of their own, and count in the log-probabilities as any token does.

The key of a crystal is fold_in(fold_in(seed, hash of its prompt's tokens), index), that of its t-th token fold_in(key
of the crystal, t), and rows of a batch never mix: which crystal a prompt and an index give does not depend on slots,
order, neighbours, other prompts or devices, but for rounding: a matrix product of another number of rows may differ in
the last bit, and two tokens that are nearly tied may then change places.

With guidance each slot has two rows of the cache: one behind its prompt and one behind the prompt that states nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.stages import Compiled
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.crystals.grammar import Grammar, Limits, State
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import check_divides, make_mesh, parts, replicated, spec
from jaxcrystal.model.cache import (
    BEGUN_LOOP,
    BLOCK,
    POOL_AXES,
    PROMPT_LOOP,
    TAIL_AXES,
    TAIL_LOOP,
    Cache,
    Ragged,
    whole_blocks,
)
from jaxcrystal.sampling.methods import Guidance, Method, pick
from jaxcrystal.sampling.prompt_pool import Prompt, PromptPool
from jaxcrystal.weights.saved import SavedModel

STEPS_PER_CALL = 64  #: steps between two looks of the host
STEPS_LOOP = "steps"  #: scope of the loop over them, in the metadata of a compiled program
JUMP = 4  #: tokens that a slot appends in a step at most: one drawn, and those that must follow
TOKENS_PER_SLOT = 2  #: that a step reads, on average over the slots
WHOLE_ROWS = 8  #: a multiple of what fills registers
WORKING, WORKING_ON_LETTERS = 5, 2  #: copies of all logits that a step takes at most, as compiled programs show
PAGES_PER_SLOT = 4  #: how far fast crystals may run ahead of a slow one
PROMPT_PAGES_PER_SLOT = 2  #: of the pool; it lies whole on the devices of every copy, and so counts a copy's slots
LANES = 128  #: of a TPU's vector unit, along the last axis of an array's layout
LEAST_BLOCKS = 8  #: that a prompt has room for: programs differ only for longer ones


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
class Scores:
    """What the model says of the next token."""

    logits: Float32[Array, "*n letters"]  #: of the grammar's letters, or, without one, of the vocabulary
    normalizer: Float32[Array, "*n"]  #: log Σ exp over the whole vocabulary


@struct.dataclass
class Slots:
    """Crystals that are being written, one a slot."""

    cache: Cache  #: slot s has the rows s · rows_per_slot and, with guidance, the one behind it
    scores: Scores  #: [slots, rows_per_slot]
    crystal: Int32[Array, "slots"]  #: which of the tasks, counted from 0; -1 in an idle slot
    log_probability: Float32[Array, "slots"]
    grammar_log_probability: Float32[Array, "slots"]
    grammar: State | None  #: None exactly if the engine has no grammar
    next: Int32[Array, ""]  #: the first task that no slot has taken yet

    @property
    def lengths(self) -> Int32[Array, "slots"]:
        """Tokens of each crystal so far."""
        return self.cache.lengths.reshape(len(self.crystal), -1)[:, 0]


@struct.dataclass
class Pages:
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
    prompt_hash: UInt32[Array, "pages"]
    prompt: Int32[Array, "pages"]  #: its number in the cache
    limits: Limits | None  #: of each page; None exactly if the engine has no grammar


@struct.dataclass
class Step:
    """What every slot appends in a step."""

    letters: Int32[Array, "slots jump"]  #: the first one drawn, the others the only ones allowed
    count: Int32[Array, "slots"]  #: how many of them
    usable: Bool[Array, "slots"]  #: whether there were numbers to draw by
    log_probability: Float32[Array, "slots"]  #: of the drawn one, by the model alone
    grammar_log_probability: Float32[Array, "slots"]  #: log of what the model alone gave to those allowed


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

    `methods` are applied in order to the logits of every token that is drawn, of which those that `grammar` does not
    allow are -inf before; first of all comes `guidance`, away from what the model says behind `unconditional`, a
    prompt's token ids. `end_id` ends a text, and so does the `max_new_tokens`-th token. Keys and values are kept as
    `cache_dtype` (default: the model's; int8 has a scale for each head of each token). A slot appends up to `jump`
    tokens in a step: all but the first are those that the grammar leaves no choice about; 1 takes a step for each.

    Programs are compiled when first needed: one that reads prompts, one that draws. They serve every later call,
    whatever its constraints, its prompts of up to 512 tokens (another pair serves longer ones) and their number. The
    pool has two pages of 64 tokens for each slot of a copy, and room for one longest prompt more: tasks whose prompt
    finds no page wait. All state of a call lies in its iterator: abandoning that leaves the engine as it was, and gives
    the memory back.

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
        jump: int = JUMP,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_new_tokens", max_new_tokens), ("jump", jump)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self._model = model
        self._end_id = end_id
        self._methods = tuple(methods)
        self._grammar = grammar
        self._guidance = guidance
        self._letters = None if grammar is None else grammar.tokens  # None: the whole vocabulary, in its order
        self._jump = 1 if grammar is None else jump
        self._always = [tuple(unconditional)] if guidance else []  # prompts that every task follows beside its own
        self._limit = max_new_tokens
        self._cache_dtype = cache_dtype
        self._mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
        self._parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]  # of the slots, on devices of their own
        self.slots = -(-slots // self._parts) * self._parts
        self._pages = PAGES_PER_SLOT * self.slots
        slots, pages, first = self._shardings()
        self._start = jax.jit(self._open, static_argnums=0, out_shardings=(slots, pages, first))
        self._read_prompt = jax.jit(self._prefill, donate_argnums=(1, 2), out_shardings=(slots, first))
        self._run = jax.jit(self._decode, donate_argnums=1, out_shardings=(slots, pages))

    def draw(
        self, prompt: Sequence[int], seed: int, indices: Sequence[int], limits: Limits | None = None
    ) -> Iterator[Draw]:
        """The draw of each of `indices` behind one prompt, as `draw_all`."""
        return self.draw_all([prompt], seed, [Task(0, index) for index in indices], limits and [limits])

    def draw_all(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        tasks: Sequence[Task],
        limits: Sequence[Limits] | None = None,
    ) -> Generator[Draw, None, None]:
        """The draw of each of `tasks`, in their order, each as soon as it and all before it are done.

        A prompt holds token ids, the beginning of sequence included; what follows it keeps to the one of `limits` of
        the same number (`Grammar.limits`; by default, to the grammar alone). Tasks of one prompt are best given one
        after the other: it is read once while tasks follow it. Raises UserError if a prompt and `max_new_tokens` exceed
        the model's context, or if the seed or an index is not in [0, 2³²).
        """
        for prompt in (*prompts, *self._always):
            check_context(self._model.config, len(prompt), self._limit)
        for name, values in (("seed", [seed]), ("index", (task.index for task in tasks))):
            for value in values:
                if not 0 <= value < 2**32:
                    raise UserError(f"the {name} {value} does not lie between 0 and 2³² - 1")
        if self._grammar is not None and limits is None:
            limits = [self._grammar.limits()] * len(prompts)
        return self._draw([tuple(prompt) for prompt in prompts], jax.random.key(np.uint32(seed)), tasks, limits)

    def compile_decode(self, prompt_tokens: int) -> Compiled:
        """The program behind `draw`, for prompts of up to so many tokens; the model's arrays may be abstract."""
        variables, whole = self._model.variables, replicated(self._mesh)

        def placed(x: Any, sharding: NamedSharding = whole) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        with jax.set_mesh(self._mesh):
            opened = jax.eval_shape(partial(self._open, self._room(prompt_tokens)))
            slots, pages, first = jax.tree.map(placed, opened, jax.tree.broadcast(self._shardings(), opened))
            key = placed(jax.eval_shape(jax.random.key, 0))
            orders = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._no_orders())
            ready = jax.ShapeDtypeStruct((), jnp.int32)
            return self._run.lower(variables, slots, pages, first, key, orders, ready).compile()

    def most_trips(self, prompt_tokens: int) -> dict[str, int]:
        """How often the loops of that program run at most whose trips depend on data, by their scope."""
        return {
            STEPS_LOOP: STEPS_PER_CALL,
            PROMPT_LOOP: whole_blocks(max(prompt_tokens, *map(len, self._always), 1)),
            TAIL_LOOP: (self._limit - 1) // BLOCK,
            BEGUN_LOOP: 1 + (self._jump > 1),
        }

    @property
    def tokens_per_call(self) -> int:
        """That the program writes at most, in all slots."""
        return STEPS_PER_CALL * self._tokens()

    def memory(self, prompt_tokens: int) -> int:
        """Bytes on each device beside the model's, for prompts of up to so many tokens.

        What is kept is counted exactly, and what a step takes in between as `WORKING` float32 for each token that is
        read and each of the vocabulary, or `WORKING_ON_LETTERS` with a grammar; parameters that lie divided over `fsdp`
        take more when they are gathered, and on TPUs some kernels are there twice.
        """
        opened = jax.eval_shape(partial(self._open, self._room(prompt_tokens)))
        shardings = jax.tree.leaves(jax.tree.broadcast(self._shardings(), opened))
        kept = sum(
            math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x, sharding in zip(jax.tree.leaves(opened), shardings, strict=True)
        )
        vocab = parts(self._mesh, "vocab")
        logits = self._tokens() // self._parts * (1 + len(self._always)) * self._model.config.padded_vocab_size // vocab
        kept += self._kernels_in_another_layout()
        return kept + 4 * (WORKING if self._letters is None else WORKING_ON_LETTERS) * logits

    def _kernels_in_another_layout(self) -> int:
        """Bytes on each device of what TPU's compiler copies at the beginning of a call, as compiled programs show: the
        kernels of queries and keys, which it wants with inputs last, and all whose outputs on a device are no multiple
        of 128, of which an array has inputs last unless told otherwise."""
        if self._mesh.devices.flat[0].platform != "tpu":
            return 0
        copied = 0
        for path, x in jax.tree_util.tree_leaves_with_path(self._model.params["layers"]):
            local, name = x.sharding.shard_shape(x.shape), jax.tree_util.keystr(path)
            if x.ndim == 3 and ("q_proj" in name or "k_proj" in name or local[-1] % LANES):
                copied += math.prod(local) * x.dtype.itemsize
        return copied

    def _room(self, prompt_tokens: int) -> int:
        """Blocks that a prompt may have: a power of two, so that few programs serve all."""
        least = min(LEAST_BLOCKS, whole_blocks(self._model.config.max_position_embeddings))
        return max(least, 1 << (whole_blocks(prompt_tokens) - 1).bit_length())

    def _pool(self, blocks: int) -> int:
        """Pages for prompts of up to so many blocks: of any length there is room for one, beside those always there."""
        return PROMPT_PAGES_PER_SLOT * (self.slots // self._parts) + blocks * (1 + len(self._always))

    def _tokens(self) -> int:
        """Tokens that a step reads, of all slots.

        Rows of a matrix product that fill no register may be rounded in another way than the others: with jumps, whose
        tokens lie now here, now there, there are none.
        """
        if self._jump == 1:
            return self.slots
        each = self.slots // self._parts * TOKENS_PER_SLOT
        return self._parts * -(-each // WHOLE_ROWS) * WHOLE_ROWS

    def _draw(
        self,
        prompts: list[tuple[int, ...]],
        key: Key[Array, ""],
        tasks: Sequence[Task],
        limits: Sequence[Limits] | None,
    ) -> Generator[Draw, None, None]:
        blocks = self._room(max(map(len, (*prompts, *self._always)), default=0))
        with jax.set_mesh(self._mesh):
            slots, pages, first = self._start(blocks)
        pool = PromptPool(self._pool(blocks))

        def number_of(prompt: Prompt) -> int | None:
            """Of a prompt that one task more follows, which is read if it is not there; None where it must wait."""
            nonlocal slots, first
            known = prompt in pool
            own = pool.follow(prompt)
            if own is None:
                return None
            if not known:
                tokens, listed = np.zeros((blocks, BLOCK), np.int32), np.zeros(blocks, np.int32)
                tokens.flat[: len(prompt)], listed[: len(own)] = prompt, own
                with jax.set_mesh(self._mesh):
                    slots, first = self._read_prompt(
                        self._model.variables, slots, first, tokens, np.int32(len(prompt)), listed
                    )
            return own[0]

        for prompt in self._always:
            number_of(prompt)  # of an empty pool, so that its pages are the first ones
        finished: list[Draw] = []
        read = allowed = 0  # crystals handed out or in `finished`; crystals whose prompt has pages
        orders = self._no_orders()
        while read < len(tasks):
            while allowed < min(len(tasks), read + self._pages):
                number, index = tasks[allowed]
                prompt = prompts[number]
                place = number_of(prompt)
                if place is None:
                    break
                page = allowed % self._pages
                orders.index[page], orders.prompt[page] = index, place
                orders.prompt_hash[page] = _hash(prompt)
                if limits is not None:
                    for all_pages, own in zip(*map(jax.tree.leaves, (orders.limits, limits[number])), strict=True):
                        all_pages[page] = own
                allowed += 1
            with jax.set_mesh(self._mesh):
                slots, pages = self._run(
                    self._model.variables, slots, pages, first, key, jax.tree.map(np.copy, orders), np.int32(allowed)
                )
            yield from finished  # while the device goes on
            finished = []
            written = jax.device_get(pages)
            while read < allowed and written.crystal[page := read % self._pages] == read:
                finished.append(
                    Draw(
                        *tasks[read],
                        tokens=written.tokens[page, : written.length[page]].copy(),
                        log_probability=float(written.log_probability[page]),
                        grammar_log_probability=float(written.grammar_log_probability[page]),
                        ending=Ending(written.ending[page]),
                    )
                )
                pool.leave(prompts[tasks[read].prompt])
                read += 1
        yield from finished

    def _no_orders(self) -> Orders:
        each = None if self._grammar is None else self._grammar.limits()
        return Orders(
            np.zeros(self._pages, np.uint32),
            np.zeros(self._pages, np.uint32),
            np.zeros(self._pages, np.int32),
            jax.tree.map(lambda x: np.stack([x] * self._pages), each),
        )

    def _open(self, blocks: int) -> tuple[Slots, Pages, Scores]:
        """Idle slots, empty pages, and room for prompts and for what the model says behind them.

        The prompt that is always followed is number 0, as long as all are.
        """
        config = self._model.config
        rows, pool = 1 + len(self._always), self._pool(blocks)
        cache = Cache.empty(config, self.slots * rows, self._limit, pool, blocks * BLOCK, dtype=self._cache_dtype)
        each = None if self._grammar is None else self._grammar.limits()
        limits = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.slots, *x.shape)), each)
        slots = Slots(
            cache=cache,
            scores=self._nothing(self.slots, rows),
            crystal=jnp.full(self.slots, -1, jnp.int32),
            log_probability=jnp.zeros(self.slots),
            grammar_log_probability=jnp.zeros(self.slots),
            grammar=self._grammar and self._grammar.start(limits),
            next=jnp.int32(0),
        )
        pages = Pages(
            crystal=jnp.full(self._pages, -1, jnp.int32),
            tokens=jnp.zeros((self._pages, self._limit), jnp.int32),
            length=jnp.zeros(self._pages, jnp.int32),
            log_probability=jnp.zeros(self._pages),
            grammar_log_probability=jnp.zeros(self._pages),
            ending=jnp.zeros(self._pages, jnp.int32),
        )
        return slots, pages, self._nothing(pool)

    def _nothing(self, *shape: int) -> Scores:
        letters = self._model.config.padded_vocab_size if self._letters is None else len(self._letters)
        return Scores(jnp.zeros((*shape, letters)), jnp.zeros(shape))

    def _scores(self, variables: Any, hidden: Float[Array, "tokens one embed"]) -> Scores:
        """Of the token behind each: all logits are summed up, and those of the letters are kept."""
        logits = self._model.module.apply(variables, hidden, method="logits")[:, 0]
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return Scores(logits if self._letters is None else logits[:, self._letters], normalizer)

    def _prefill(
        self,
        variables: Any,
        slots: Slots,
        first: Scores,
        prompt: Int32[Array, "blocks block"],
        length: Int32[Array, ""],
        pages: Int32[Array, "blocks"],
    ) -> tuple[Slots, Scores]:
        """The model reads a prompt, a block at a time: into these pages, and what it says behind the last token."""
        module, number = self._model.module, pages[0]

        def read(block: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, last = carry
            positions = block * BLOCK + jnp.arange(BLOCK)
            reader = cache.reader(number, block)
            hidden, reader = module.apply(
                variables, prompt[block][None], positions[None], cache=reader, method="hidden"
            )
            last += jnp.where(positions[:, None] == length - 1, hidden[0], 0).sum(0)
            return cache.with_page(pages[block], reader), last

        last = jnp.zeros(self._model.config.hidden_size, self._model.config.dtype)
        cache = slots.cache.with_prompt(number, pages, length)
        cache, last = jax.lax.fori_loop(0, whole_blocks(length), read, (cache, last))
        scores = self._scores(variables, last[None, None])
        return slots.replace(cache=cache), jax.tree.map(lambda x, y: x.at[number].set(y[0]), first, scores)

    def _decode(
        self,
        variables: Any,
        slots: Slots,
        pages: Pages,
        first: Scores,
        key: Key[Array, ""],
        orders: Orders,
        ready: Int32[Array, ""],
    ) -> tuple[Slots, Pages]:
        """Up to `STEPS_PER_CALL` steps; fewer when the tasks before number `ready` are all done."""

        def unfinished(carry: tuple[Array, Slots, Pages]) -> Array:
            number, slots, _ = carry
            return (number < STEPS_PER_CALL) & ((slots.next < ready) | (slots.crystal >= 0).any())

        def step(carry: tuple[Array, Slots, Pages]) -> tuple[Array, Slots, Pages]:
            number, slots, pages = carry
            slots = self._refill(slots, first, orders, ready)
            page = jnp.where(slots.crystal >= 0, slots.crystal % self._pages, self._pages)  # an idle slot has no page
            prompt_hash, index = (x.at[page].get(mode="clip") for x in (orders.prompt_hash, orders.index))
            keys = jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(key, a), b))(prompt_hash, index)
            chosen = self._choose(slots, keys)
            if self._jump > 1:
                chosen = chosen.replace(count=self._shares(chosen.count, slots.crystal >= 0, number))
            slots, pages = self._read(variables, slots, pages, page, chosen)
            return number + 1, slots, pages

        with jax.named_scope(STEPS_LOOP):
            return jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, pages))[1:]

    def _refill(self, slots: Slots, first: Scores, orders: Orders, ready: Int32[Array, ""]) -> Slots:
        """Idle slots take the next tasks, in order, as far as these are ready."""
        idle = slots.crystal < 0
        waiting = slots.next + jnp.cumsum(idle) - 1
        taken = idle & (waiting < ready)
        page = waiting % self._pages
        prompt = slots.cache.prompt.reshape(self.slots, -1)
        prompt = prompt.at[:, 0].set(jnp.where(taken, orders.prompt[page], prompt[:, 0]))
        rows = prompt.shape[1]

        def reset(start: Array, now: Array) -> Array:
            return jnp.where(jnp.expand_dims(taken, tuple(range(1, now.ndim))), start, now)

        grammar = slots.grammar
        if self._grammar is not None:
            begun = self._grammar.start(jax.tree.map(lambda x: jnp.asarray(x)[page], orders.limits))
            grammar = jax.tree.map(reset, begun, grammar)
        lengths = jnp.where(jnp.repeat(idle, rows), 0, slots.cache.lengths)
        return slots.replace(
            cache=slots.cache.replace(lengths=lengths, prompt=prompt.reshape(-1)),
            scores=jax.tree.map(lambda x, now: reset(x[prompt], now), first, slots.scores),
            crystal=jnp.where(taken, waiting, slots.crystal),
            log_probability=jnp.where(taken, 0, slots.log_probability),
            grammar_log_probability=jnp.where(taken, 0, slots.grammar_log_probability),
            grammar=grammar,
            next=slots.next + taken.sum(),
        )

    def _choose(self, slots: Slots, keys: Key[Array, "slots"]) -> Step:
        """Draws each slot's next letter, and appends those that must follow."""
        logits, normalizer = slots.scores.logits[:, 0], slots.scores.normalizer[:, 0]
        free, kept = logits, normalizer
        if self._grammar is not None:
            allowed = self._grammar.allowed(slots.grammar)
            logits = jnp.where(allowed, logits, -jnp.inf)
            # An only letter counts, to the last bit, as one that was appended to the letter before.
            several = jax.nn.logsumexp(logits, axis=-1)
            kept = jnp.minimum(jnp.where(allowed.sum(-1) == 1, logits.max(-1), several), normalizer)
        if self._guidance is not None:
            logits = self._guidance(logits, slots.scores.logits[:, 1])
        for method in self._methods:
            logits = method(logits)
        letter = pick(jax.vmap(jax.random.fold_in)(keys, slots.lengths), logits)
        # With guidance, what is no number behind either prompt is none; nor may the methods leave none.
        usable = jnp.isfinite(slots.scores.normalizer).all(-1) & jnp.isfinite(logits.max(-1))
        letters, count = self._forced(slots, letter, usable)
        drawn = jnp.take_along_axis(free, letter[:, None], axis=1)[:, 0]
        return Step(letters, count, usable, drawn - normalizer, kept - normalizer)

    def _forced(
        self, slots: Slots, letter: Int32[Array, "slots"], usable: Bool[Array, "slots"]
    ) -> tuple[Int32[Array, "slots jump"], Int32[Array, "slots"]]:
        """The letter, and behind it the only ones that the grammar allows; how many there are."""

        def follow(carry: tuple[State, Array, Array], number: Array) -> tuple[tuple[State, Array, Array], Array]:
            state, letter, goes_on = carry
            state = self._grammar.advance(state, letter)
            allowed = self._grammar.allowed(state)
            goes_on &= ~self._ends(letter) & (slots.lengths + number < self._limit) & (allowed.sum(-1) == 1)
            letter = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
            return (state, letter, goes_on), (letter, goes_on)

        letter = letter.astype(jnp.int32)
        count = jnp.ones(self.slots, jnp.int32)
        if self._jump == 1:
            return letter[:, None], count
        numbers = jnp.arange(1, self._jump)
        letters, there = jax.lax.scan(follow, (slots.grammar, letter, usable), numbers)[1]
        return jnp.concatenate([letter[None], letters]).T, count + there.sum(0)

    def _shares(
        self, wanted: Int32[Array, "slots"], active: Bool[Array, "slots"], number: Int32[Array, ""]
    ) -> Int32[Array, "slots"]:
        """Tokens of each slot in this step: one, and of those that must follow what there is room for, in turn.

        What finds no room is drawn in a later step, where nothing else is allowed.
        """
        shape = (self._parts, -1)
        extra, active = jnp.where(active, wanted - 1, 0).reshape(shape), active.reshape(shape)
        spare = self._tokens() // self._parts - active.sum(1, keepdims=True)
        extra = jnp.roll(extra, -number, axis=1)
        given = jnp.clip(spare - (jnp.cumsum(extra, axis=1) - extra), 0, extra)
        return (active + jnp.roll(given, number, axis=1)).reshape(-1).astype(jnp.int32)

    def _read(
        self, variables: Any, slots: Slots, pages: Pages, page: Int32[Array, "slots"], chosen: Step
    ) -> tuple[Slots, Pages]:
        """The model reads what the slots append; it is written onto their pages, and crystals that end leave them."""
        count, rows = chosen.count, 1 + len(self._always)
        tokens = chosen.letters if self._letters is None else jnp.asarray(self._letters)[chosen.letters]
        slot, offset, ragged, place = self._flat(count, rows)
        row = (slot[:, None] * rows + jnp.arange(rows)).reshape(-1)
        token = jnp.repeat(tokens[slot, offset], rows)
        positions = slots.cache.positions[row] + jnp.repeat(offset, rows)
        hidden, cache = self._model.module.apply(
            variables,
            token[:, None],
            positions[:, None],
            cache=slots.cache.replace(ragged=ragged),
            method="hidden",
        )
        scores = self._scores(variables, hidden)
        scores = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), scores)
        # Behind the first token stand those that had to follow, as far as the model said numbers.
        usable = jnp.isfinite(scores.normalizer).all(-1)[place[:, :-1]]
        there = jnp.cumprod((jnp.arange(1, self._jump) < count[:, None]) & usable, axis=1) > 0
        read = jnp.where(chosen.usable, 1 + there.sum(1), 0)
        lost = ~chosen.usable | (read < count)
        before = place[:, :-1]
        forced = scores.logits[before, 0, chosen.letters[:, 1:]] - scores.normalizer[before, 0]
        forced = jnp.where(there, forced, 0)
        log_probability = _added(slots.log_probability, chosen.log_probability, forced, lost)
        kept = _added(slots.grammar_log_probability, chosen.grammar_log_probability, jnp.minimum(forced, 0), lost)
        number = jnp.arange(self._jump)
        written = number < read[:, None]
        finished = (written & self._ends(chosen.letters)).any(1)
        length = slots.lengths + read
        ended = lost | finished | (length == self._limit)
        ending = jnp.where(lost, Ending.NAN_LOGITS, jnp.where(finished, Ending.FINISHED, Ending.TRUNCATED))
        done = jnp.where(ended, page, self._pages)
        at = jnp.where(written, page[:, None], self._pages)
        pages = pages.replace(
            crystal=pages.crystal.at[done].set(slots.crystal, mode="drop"),
            tokens=pages.tokens.at[at, slots.lengths[:, None] + number].set(tokens, mode="drop"),
            length=pages.length.at[done].set(length, mode="drop"),
            log_probability=pages.log_probability.at[done].set(log_probability, mode="drop"),
            grammar_log_probability=pages.grammar_log_probability.at[done].set(kept, mode="drop"),
            ending=pages.ending.at[done].set(ending, mode="drop"),
        )
        last = jnp.take_along_axis(place, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        slots = slots.replace(
            cache=cache,
            scores=jax.tree.map(lambda x: x[last], scores),
            crystal=jnp.where(ended, -1, slots.crystal),
            log_probability=log_probability,
            grammar_log_probability=kept,
            grammar=self._advanced(slots.grammar, chosen),
        )
        return slots, pages

    def _flat(
        self, count: Int32[Array, "slots"], rows: int
    ) -> tuple[Int32[Array, "tokens"], Int32[Array, "tokens"], Ragged | None, Int32[Array, "slots jump"]]:
        """Slot and offset of each token that is read, each device's own first to last; how the cache sees them; and
        where among them those of each slot are."""
        if self._jump == 1:
            each = jnp.arange(self.slots)
            return each, jnp.zeros_like(each), None, each[:, None]
        tokens, slots = self._tokens() // self._parts, self.slots // self._parts  # of a device
        ends = jnp.cumsum(count.reshape(self._parts, -1), axis=1)
        token = jnp.arange(tokens)
        own = (token[:, None] >= ends[:, None]).sum(-1)  # [parts, tokens]: the slot, or their number in padding
        slot = jnp.minimum(own, slots - 1)
        starts = ends - count.reshape(self._parts, -1)
        offset = jnp.clip(token - jnp.take_along_axis(starts, slot, axis=1), 0, self._jump - 1)
        local = jnp.where(own < slots, slot, slots + token) * rows
        ragged = Ragged(
            row=(local.reshape(-1, 1) + jnp.arange(rows)).reshape(-1),
            offset=jnp.repeat(offset.reshape(-1), rows),
            count=jnp.repeat(count, rows),
            width=self._jump,
        )
        part = jnp.arange(self._parts)[:, None]
        place = (starts + part * tokens).reshape(-1, 1) + jnp.arange(self._jump)
        return (
            (slot + part * slots).reshape(-1),
            offset.reshape(-1),
            ragged,
            jnp.minimum(place, self._parts * tokens - 1),
        )

    def _advanced(self, state: State | None, chosen: Step) -> State | None:
        """The grammar behind what every slot has appended."""
        if state is None:
            return None

        def advance(state: State, step: tuple[Array, Array]) -> tuple[State, None]:
            letter, number = step
            there = number < chosen.count

            def moved(new: Array, old: Array) -> Array:
                return jnp.where(jnp.expand_dims(there, tuple(range(1, old.ndim))), new, old)

            return jax.tree.map(moved, self._grammar.advance(state, letter), state), None

        return jax.lax.scan(advance, state, (chosen.letters.T, jnp.arange(self._jump)))[0]

    def _ends(self, letter: Int32[Array, "*n"]) -> Bool[Array, "*n"]:
        token = letter if self._letters is None else jnp.asarray(self._letters)[letter]
        return token == self._end_id

    def _shardings(self) -> tuple[Slots, NamedSharding, Scores]:
        """How slots, pages and the scores behind prompts lie on the mesh."""
        config, whole = self._model.config, replicated(self._mesh)
        check_divides(self._mesh, "kv_heads", config.num_key_value_heads, "the cache")
        pool, tail = (NamedSharding(self._mesh, spec(axes)) for axes in (POOL_AXES, TAIL_AXES))
        letters = "vocab" if self._letters is None else None
        scores, first = (
            Scores(*(NamedSharding(self._mesh, spec(axes)) for axes in ((*rows, letters), rows)))
            for rows in (("batch", None), (None,))
        )
        cache = Cache(pool, pool, whole, whole, tail, tail, lengths=whole, prompt=whole)
        return Slots(cache, scores, whole, whole, whole, self._grammar and whole, whole), whole, first


def _added(
    total: Float32[Array, "slots"],
    drawn: Float32[Array, "slots"],
    forced: Float32[Array, "slots behind"],
    lost: Bool[Array, "slots"],
) -> Float32[Array, "slots"]:
    """Token after token, so that it does not depend on which of them a step has; NaN where numbers ended."""
    return reduce(jnp.add, forced.T, total + jnp.where(lost, jnp.nan, drawn))


def _hash(prompt: Sequence[int]) -> int:
    """32 bits of the tokens."""
    return int.from_bytes(hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()[:4], "little")
