"""What the sampler runs on the devices: a loop of steps in which every slot appends tokens to its crystal.

A step draws one token in each slot, among the grammar's letters, and appends the tokens behind it that the grammar
leaves no choice about (half of a text): the model reads them all in one call of a fixed number of tokens. They cost no
step of their own, and count in the log-probabilities as any token does. What finds no room waits for a later step;
which tokens share a step depends on the neighbours, what comes of them does not.

With guidance each slot has two rows of the cache: one behind its prompt and one behind the prompt that states nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from jaxcrystal.mesh import check_divides, replicated, spec
from jaxcrystal.model.cache import BLOCK, POOL_AXES, TAIL_AXES, Cache, Ragged, whole_blocks
from jaxcrystal.sampling.formula_table import FormulaTable
from jaxcrystal.sampling.methods import Guidance, Method, pick
from jaxcrystal.sampling.slots import Ending, Orders, Pages, Scores, Slots
from jaxcrystal.texts.forms import Grammar, State
from jaxcrystal.weights.saved import SavedModel

STEPS_PER_CALL = 64  #: steps between two looks of the host
STEPS_LOOP = "steps"  #: scope of the loop over them, in the metadata of a compiled program
TOKENS_PER_SLOT = 2  #: that a step reads, on average over the slots
WHOLE_ROWS = 8  #: a multiple of what fills registers
MOST_REDRAWS = 1000  #: of a composition that is known
REDRAWN = np.uint32(1 << 31)  #: from here on numbers fold a redraw into a crystal's key; below they are its tokens
PAGES_PER_SLOT = 4  #: how far fast crystals may run ahead of a slow one
PROMPT_PAGES_PER_SLOT = 2  #: of the pool; it lies whole on the devices of every copy, and so counts a copy's slots


@struct.dataclass
class Step:
    """What every slot appends in a step."""

    letters: Int32[Array, "slots jump"]  #: the first one drawn, the others the only ones allowed
    count: Int32[Array, "slots"]  #: how many of them
    usable: Bool[Array, "slots"]  #: whether there were numbers to draw by
    log_probability: Float32[Array, "slots"]  #: of the drawn one, by the model alone
    grammar_log_probability: Float32[Array, "slots"]  #: log of what the model alone gave to those allowed


@dataclass(frozen=True, eq=False)
class Decoder:
    """The programs: `open` makes the state, `prefill` reads a prompt into it, `decode` takes steps.

    The fields are those of `Engine`, checked.
    """

    model: SavedModel
    end_id: int
    methods: tuple[Method, ...]
    composition_methods: tuple[Method, ...] | None  #: None: the same
    grammar: Grammar | None
    guidance: Guidance | None
    always: list[tuple[int, ...]]  #: prompts that every task follows beside its own: with guidance, one
    slots: int  #: a multiple of `parts`
    limit: int  #: tokens of a text
    cache_dtype: str | None
    jump: int  #: tokens that a slot appends in a step at most
    mesh: Mesh

    @property
    def parts(self) -> int:
        """Groups of slots, on devices of their own."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def pages(self) -> int:
        """That crystals are written on."""
        return PAGES_PER_SLOT * self.slots

    @cached_property
    def letters(self) -> Int[np.ndarray, "letters"] | None:
        """The tokens that are drawn among; None: the whole vocabulary, in its order."""
        return None if self.grammar is None else self.grammar.tokens

    @property
    def tokens(self) -> int:
        """Tokens that a step reads, of all slots.

        Rows of a matrix product that fill no register may be rounded in another way than the others: with jumps, whose
        tokens lie now here, now there, there are none.
        """
        if self.jump == 1:
            return self.slots
        each = self.slots // self.parts * TOKENS_PER_SLOT
        return self.parts * -(-each // WHOLE_ROWS) * WHOLE_ROWS

    def pool(self, blocks: int) -> int:
        """Pages for prompts of up to so many blocks: of any length there is room for one, beside those always there."""
        return PROMPT_PAGES_PER_SLOT * (self.slots // self.parts) + blocks * (1 + len(self.always))

    def no_orders(self) -> Orders:
        each = None if self.grammar is None else self.grammar.limits()
        return Orders(
            np.zeros(self.pages, np.uint32),
            np.zeros(self.pages, np.uint32),
            np.zeros(self.pages, np.int32),
            jax.tree.map(lambda x: np.stack([x] * self.pages), each),
        )

    def open(self, blocks: int) -> tuple[Slots, Pages, Scores]:
        """Idle slots, empty pages, and room for prompts and for what the model says behind them.

        The prompt that is always followed is number 0, as long as all are.
        """
        config = self.model.config
        rows, pool = 1 + len(self.always), self.pool(blocks)
        cache = Cache.empty(config, self.slots * rows, self.limit, pool, blocks * BLOCK, dtype=self.cache_dtype)
        each = None if self.grammar is None else self.grammar.limits()
        limits = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.slots, *x.shape)), each)
        slots = Slots(
            cache=cache,
            scores=self._nothing(self.slots, rows),
            crystal=jnp.full(self.slots, -1, jnp.int32),
            log_probability=jnp.zeros(self.slots),
            grammar_log_probability=jnp.zeros(self.slots),
            redraws=jnp.zeros(self.slots, jnp.int32),
            grammar=self.grammar and self.grammar.start(limits),
            next=jnp.int32(0),
        )
        pages = Pages(
            crystal=jnp.full(self.pages, -1, jnp.int32),
            tokens=jnp.zeros((self.pages, self.limit), jnp.int32),
            length=jnp.zeros(self.pages, jnp.int32),
            log_probability=jnp.zeros(self.pages),
            grammar_log_probability=jnp.zeros(self.pages),
            redraws=jnp.zeros(self.pages, jnp.int32),
            ending=jnp.zeros(self.pages, jnp.int32),
        )
        return slots, pages, self._nothing(pool)

    def _nothing(self, *shape: int) -> Scores:
        letters = self.model.config.padded_vocab_size if self.letters is None else len(self.letters)
        return Scores(jnp.zeros((*shape, letters)), jnp.zeros(shape))

    def _scores(self, variables: Any, hidden: Float[Array, "tokens one embed"]) -> Scores:
        """Of the token behind each: all logits are summed up, and those of the letters are kept."""
        logits = self.model.module.apply(variables, hidden, method="logits")[:, 0]
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        return Scores(logits if self.letters is None else logits[:, self.letters], normalizer)

    def prefill(
        self,
        variables: Any,
        slots: Slots,
        first: Scores,
        prompt: Int32[Array, "blocks block"],
        length: Int32[Array, ""],
        pages: Int32[Array, "blocks"],
    ) -> tuple[Slots, Scores]:
        """The model reads a prompt, a block at a time: into these pages, and what it says behind the last token."""
        module, number = self.model.module, pages[0]

        def read(block: Array, carry: tuple[Cache, Array]) -> tuple[Cache, Array]:
            cache, last = carry
            positions = block * BLOCK + jnp.arange(BLOCK)
            reader = cache.reader(number, block)
            hidden, reader = module.apply(
                variables, prompt[block][None], positions[None], cache=reader, method="hidden"
            )
            last += jnp.where(positions[:, None] == length - 1, hidden[0], 0).sum(0)
            return cache.with_page(pages[block], reader), last

        last = jnp.zeros(self.model.config.hidden_size, self.model.config.dtype)
        cache = slots.cache.with_prompt(number, pages, length)
        cache, last = jax.lax.fori_loop(0, whole_blocks(length), read, (cache, last))
        scores = self._scores(variables, last[None, None])
        return slots.replace(cache=cache), jax.tree.map(lambda x, y: x.at[number].set(y[0]), first, scores)

    def decode(
        self,
        variables: Any,
        slots: Slots,
        pages: Pages,
        first: Scores,
        key: Key[Array, ""],
        orders: Orders,
        ready: Int32[Array, ""],
        known: FormulaTable | None = None,
    ) -> tuple[Slots, Pages]:
        """Up to `STEPS_PER_CALL` steps; fewer when the tasks before number `ready` are all done.

        A text whose composition is `known` is begun again, with other draws.
        """

        def unfinished(carry: tuple[Array, Slots, Pages]) -> Array:
            number, slots, _ = carry
            return (number < STEPS_PER_CALL) & ((slots.next < ready) | (slots.crystal >= 0).any())

        def step(carry: tuple[Array, Slots, Pages]) -> tuple[Array, Slots, Pages]:
            number, slots, pages = carry
            slots = self._refill(slots, first, orders, ready)
            page = jnp.where(slots.crystal >= 0, slots.crystal % self.pages, self.pages)  # an idle slot has no page
            prompt_hash, index = (x.at[page].get(mode="clip") for x in (orders.prompt_hash, orders.index))
            keys = jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(key, a), b))(prompt_hash, index)
            if known is not None:
                again = jax.vmap(jax.random.fold_in)(keys, REDRAWN + slots.redraws.astype(jnp.uint32))
                keys = jnp.where(slots.redraws > 0, again, keys)
            chosen = self._choose(slots, keys)
            if self.jump > 1:
                chosen = chosen.replace(count=self._shares(chosen.count, slots.crystal >= 0, number))
            slots, pages = self._read(variables, slots, pages, page, chosen, known)
            return number + 1, slots, pages

        with jax.named_scope(STEPS_LOOP):
            return jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots, pages))[1:]

    def _refill(self, slots: Slots, first: Scores, orders: Orders, ready: Int32[Array, ""]) -> Slots:
        """Idle slots take the next tasks, in order, as far as these are ready; texts without a token begin."""
        idle = slots.crystal < 0
        waiting = slots.next + jnp.cumsum(idle) - 1
        taken = idle & (waiting < ready)
        crystal = jnp.where(taken, waiting, slots.crystal)
        begins = taken | (~idle & (slots.lengths == 0))
        page = crystal % self.pages
        prompt = slots.cache.prompt.reshape(self.slots, -1)
        prompt = prompt.at[:, 0].set(jnp.where(taken, orders.prompt[page], prompt[:, 0]))
        rows = prompt.shape[1]

        def reset(start: Array, now: Array) -> Array:
            return jnp.where(jnp.expand_dims(begins, tuple(range(1, now.ndim))), start, now)

        grammar = slots.grammar
        if self.grammar is not None:
            begun = self.grammar.start(jax.tree.map(lambda x: jnp.asarray(x)[page], orders.limits))
            grammar = jax.tree.map(reset, begun, grammar)
        lengths = jnp.where(jnp.repeat(idle, rows), 0, slots.cache.lengths)
        return slots.replace(
            cache=slots.cache.replace(lengths=lengths, prompt=prompt.reshape(-1)),
            scores=jax.tree.map(lambda x, now: reset(x[prompt], now), first, slots.scores),
            crystal=crystal,
            log_probability=jnp.where(begins, 0, slots.log_probability),
            grammar_log_probability=jnp.where(begins, 0, slots.grammar_log_probability),
            redraws=jnp.where(taken, 0, slots.redraws),
            grammar=grammar,
            next=slots.next + taken.sum(),
        )

    def _choose(self, slots: Slots, keys: Key[Array, "slots"]) -> Step:
        """Draws each slot's next letter, and appends those that must follow."""
        logits, normalizer = slots.scores.logits[:, 0], slots.scores.normalizer[:, 0]
        free, kept = logits, normalizer
        if self.grammar is not None:
            allowed = self.grammar.allowed(slots.grammar)
            logits = jnp.where(allowed, logits, -jnp.inf)
            # An only letter counts, to the last bit, as one that was appended to the letter before.
            several = jax.nn.logsumexp(logits, axis=-1)
            kept = jnp.minimum(jnp.where(allowed.sum(-1) == 1, logits.max(-1), several), normalizer)
        if self.guidance is not None:
            logits = self.guidance(logits, slots.scores.logits[:, 1])
        logits = self._shaped(slots, logits)
        letter = pick(jax.vmap(jax.random.fold_in)(keys, slots.lengths), logits)
        # With guidance, what is no number behind either prompt is none; nor may the methods leave none.
        usable = jnp.isfinite(slots.scores.normalizer).all(-1) & jnp.isfinite(logits.max(-1))
        letters, count = self._forced(slots, letter, usable)
        drawn = jnp.take_along_axis(free, letter[:, None], axis=1)[:, 0]
        return Step(letters, count, usable, drawn - normalizer, kept - normalizer)

    def _shaped(self, slots: Slots, logits: Float[Array, "slots letters"]) -> Float[Array, "slots letters"]:
        """By the methods of what is being written."""
        shaped = reduce(lambda x, method: method(x), self.methods, logits)
        if self.composition_methods is None:
            return shaped
        composition = reduce(lambda x, method: method(x), self.composition_methods, logits)
        return jnp.where(self.grammar.composing(slots.grammar)[:, None], composition, shaped)

    def _forced(
        self, slots: Slots, letter: Int32[Array, "slots"], usable: Bool[Array, "slots"]
    ) -> tuple[Int32[Array, "slots jump"], Int32[Array, "slots"]]:
        """The letter, and behind it the only ones that the grammar allows; how many there are."""

        def follow(carry: tuple[State, Array, Array], number: Array) -> tuple[tuple[State, Array, Array], Array]:
            state, letter, goes_on = carry
            state = self.grammar.advance(state, letter)
            allowed = self.grammar.allowed(state)
            goes_on &= ~self._ends(letter) & (slots.lengths + number < self.limit) & (allowed.sum(-1) == 1)
            letter = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
            return (state, letter, goes_on), (letter, goes_on)

        letter = letter.astype(jnp.int32)
        count = jnp.ones(self.slots, jnp.int32)
        if self.jump == 1:
            return letter[:, None], count
        numbers = jnp.arange(1, self.jump)
        letters, there = jax.lax.scan(follow, (slots.grammar, letter, usable), numbers)[1]
        return jnp.concatenate([letter[None], letters]).T, count + there.sum(0)

    def _shares(
        self, wanted: Int32[Array, "slots"], active: Bool[Array, "slots"], number: Int32[Array, ""]
    ) -> Int32[Array, "slots"]:
        """Tokens of each slot in this step: one, and of those that must follow what there is room for, in turn.

        What finds no room is drawn in a later step, where nothing else is allowed.
        """
        shape = (self.parts, -1)
        extra, active = jnp.where(active, wanted - 1, 0).reshape(shape), active.reshape(shape)
        spare = self.tokens // self.parts - active.sum(1, keepdims=True)
        extra = jnp.roll(extra, -number, axis=1)
        given = jnp.clip(spare - (jnp.cumsum(extra, axis=1) - extra), 0, extra)
        return (active + jnp.roll(given, number, axis=1)).reshape(-1).astype(jnp.int32)

    def _read(
        self,
        variables: Any,
        slots: Slots,
        pages: Pages,
        page: Int32[Array, "slots"],
        chosen: Step,
        known: FormulaTable | None,
    ) -> tuple[Slots, Pages]:
        """The model reads what the slots append; it is written onto their pages, and crystals that end leave them."""
        count, rows = chosen.count, 1 + len(self.always)
        tokens = chosen.letters if self.letters is None else jnp.asarray(self.letters)[chosen.letters]
        slot, offset, ragged, place = self._flat(count, rows)
        row = (slot[:, None] * rows + jnp.arange(rows)).reshape(-1)
        token = jnp.repeat(tokens[slot, offset], rows)
        positions = slots.cache.positions[row] + jnp.repeat(offset, rows)
        hidden, cache = self.model.module.apply(
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
        there = jnp.cumprod((jnp.arange(1, self.jump) < count[:, None]) & usable, axis=1) > 0
        read = jnp.where(chosen.usable, 1 + there.sum(1), 0)
        lost = ~chosen.usable | (read < count)
        before = place[:, :-1]
        forced = scores.logits[before, 0, chosen.letters[:, 1:]] - scores.normalizer[before, 0]
        forced = jnp.where(there, forced, 0)
        log_probability = _added(slots.log_probability, chosen.log_probability, forced, lost)
        kept = _added(slots.grammar_log_probability, chosen.grammar_log_probability, jnp.minimum(forced, 0), lost)
        number = jnp.arange(self.jump)
        written = number < read[:, None]
        finished = (written & self._ends(chosen.letters)).any(1)
        length = slots.lengths + read
        grammar, again = self._advanced(slots.grammar, chosen), jnp.zeros_like(lost)
        if known is not None:
            composed = self.grammar.composing(slots.grammar) & ~self.grammar.composing(grammar)
            again = composed & ~lost & known.contains(*self.grammar.composition(grammar))
        # What such a row holds is nothing: how far its text had come depends on what else had room in the step.
        given_up = again & (slots.redraws == MOST_REDRAWS)
        length = jnp.where(given_up, 0, length)
        log_probability, kept = (jnp.where(given_up, jnp.nan, x) for x in (log_probability, kept))
        ended = lost | finished | (length == self.limit) | given_up
        ending = jnp.select(
            [lost, given_up, finished], [Ending.NAN_LOGITS, Ending.KNOWN_FORMULA, Ending.FINISHED], Ending.TRUNCATED
        )
        done = jnp.where(ended, page, self.pages)
        at = jnp.where(written, page[:, None], self.pages)
        pages = pages.replace(
            crystal=pages.crystal.at[done].set(slots.crystal, mode="drop"),
            tokens=pages.tokens.at[at, slots.lengths[:, None] + number].set(tokens, mode="drop"),
            length=pages.length.at[done].set(length, mode="drop"),
            log_probability=pages.log_probability.at[done].set(log_probability, mode="drop"),
            grammar_log_probability=pages.grammar_log_probability.at[done].set(kept, mode="drop"),
            redraws=pages.redraws.at[done].set(slots.redraws, mode="drop"),
            ending=pages.ending.at[done].set(ending, mode="drop"),
        )
        last = jnp.take_along_axis(place, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        lengths = jnp.where(jnp.repeat(again, rows), 0, cache.lengths)
        slots = slots.replace(
            cache=cache.replace(lengths=lengths),
            scores=jax.tree.map(lambda x: x[last], scores),
            crystal=jnp.where(ended, -1, slots.crystal),
            log_probability=log_probability,
            grammar_log_probability=kept,
            redraws=slots.redraws + again,
            grammar=grammar,
        )
        return slots, pages

    def _flat(
        self, count: Int32[Array, "slots"], rows: int
    ) -> tuple[Int32[Array, "tokens"], Int32[Array, "tokens"], Ragged | None, Int32[Array, "slots jump"]]:
        """Slot and offset of each token that is read, each device's own first to last; how the cache sees them; and
        where among them those of each slot are."""
        if self.jump == 1:
            each = jnp.arange(self.slots)
            return each, jnp.zeros_like(each), None, each[:, None]
        tokens, slots = self.tokens // self.parts, self.slots // self.parts  # of a device
        ends = jnp.cumsum(count.reshape(self.parts, -1), axis=1)
        token = jnp.arange(tokens)
        own = (token[:, None] >= ends[:, None]).sum(-1)  # [parts, tokens]: the slot, or their number in padding
        slot = jnp.minimum(own, slots - 1)
        starts = ends - count.reshape(self.parts, -1)
        offset = jnp.clip(token - jnp.take_along_axis(starts, slot, axis=1), 0, self.jump - 1)
        local = jnp.where(own < slots, slot, slots + token) * rows
        ragged = Ragged(
            row=(local.reshape(-1, 1) + jnp.arange(rows)).reshape(-1),
            offset=jnp.repeat(offset.reshape(-1), rows),
            count=jnp.repeat(count, rows),
            width=self.jump,
        )
        part = jnp.arange(self.parts)[:, None]
        place = (starts + part * tokens).reshape(-1, 1) + jnp.arange(self.jump)
        return (
            (slot + part * slots).reshape(-1),
            offset.reshape(-1),
            ragged,
            jnp.minimum(place, self.parts * tokens - 1),
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

            return jax.tree.map(moved, self.grammar.advance(state, letter), state), None

        return jax.lax.scan(advance, state, (chosen.letters.T, jnp.arange(self.jump)))[0]

    def _ends(self, letter: Int32[Array, "*n"]) -> Bool[Array, "*n"]:
        token = letter if self.letters is None else jnp.asarray(self.letters)[letter]
        return token == self.end_id

    def shardings(self) -> tuple[Slots, NamedSharding, Scores]:
        """How slots, pages and the scores behind prompts lie on the mesh."""
        config, whole = self.model.config, replicated(self.mesh)
        check_divides(self.mesh, "kv_heads", config.num_key_value_heads, "the cache")
        pool, tail = (NamedSharding(self.mesh, spec(axes)) for axes in (POOL_AXES, TAIL_AXES))
        letters = "vocab" if self.letters is None else None
        scores, first = (
            Scores(*(NamedSharding(self.mesh, spec(axes)) for axes in ((*rows, letters), rows)))
            for rows in (("batch", None), (None,))
        )
        cache = Cache(pool, pool, whole, whole, tail, tail, lengths=whole, prompt=whole)
        return Slots(cache, scores, whole, whole, whole, whole, self.grammar and whole, whole), whole, first


def _added(
    total: Float32[Array, "slots"],
    drawn: Float32[Array, "slots"],
    forced: Float32[Array, "slots behind"],
    lost: Bool[Array, "slots"],
) -> Float32[Array, "slots"]:
    """Token after token, so that it does not depend on which of them a step has; NaN where numbers ended."""
    return reduce(jnp.add, forced.T, total + jnp.where(lost, jnp.nan, drawn))
