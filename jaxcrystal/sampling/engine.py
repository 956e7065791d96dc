"""The slot engine: many crystals decode together in one compiled loop, and a slot that is done takes the next at once.

    prompts           each is read once, into pages of a pool that all slots that follow it share
       │
       ├─ slot 0   ▓▓▓▓▓▓▓▓▓▓ crystal 0 ▓▓▓▓│▓▓▓▓ crystal 4 ▓▓▓▓▓▓│▓▓ …        each slot keeps the keys and
       ├─ slot 1   ▓▓▓▓▓▓ crystal 1 ▓▓│▓▓▓▓▓▓▓▓▓▓ crystal 3 ▓▓▓▓▓▓▓▓│▓ …       values of its own crystal only
       └─ slot 2   ▓▓▓▓▓▓▓▓ crystal 2 ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│▓▓ crystal 5 …

This is the host's half, which gives prompts their pages, hands tasks out and reads what is done; the device's half is
`decoding`.

The key of a crystal is fold_in(fold_in(seed, hash of its prompt's tokens), index), after r redraws of its composition
fold_in(that, 2³¹ + r); that of its t-th token is fold_in(key of the crystal, t), and rows of a batch never mix. With as
many slots on as many devices, what a prompt and an index give does not depend on order, neighbours or other prompts, to
the last bit. With another number a matrix product may round its last bit otherwise, and two tokens that are nearly tied
may then change places.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.stages import Compiled
from jaxtyping import Array, Int, Key

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh, parts, replicated
from jaxcrystal.model.cache import BEGUN_LOOP, BLOCK, PROMPT_LOOP, TAIL_LOOP, whole_blocks
from jaxcrystal.sampling.decoding import STEPS_LOOP, STEPS_PER_CALL, Decoder
from jaxcrystal.sampling.formula_table import FormulaTable
from jaxcrystal.sampling.methods import Guidance, Method
from jaxcrystal.sampling.prompt_pool import Prompt, PromptPool
from jaxcrystal.sampling.slots import Ending
from jaxcrystal.texts.forms import Grammar, Limits
from jaxcrystal.weights.saved import SavedModel

JUMP = 4  #: tokens that a slot appends in a step at most: one drawn, and those that must follow
WORKING, WORKING_ON_LETTERS = 5, 2  #: copies of all logits that a step takes at most, as compiled programs show
LANES = 128  #: of a TPU's vector unit, along the last axis of an array's layout
LEAST_BLOCKS = 8  #: that a prompt has room for: programs differ only for longer ones


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
    redraws: int = 0  #: how often its composition was a known one, and drawn again


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
    prompt's token ids. `composition_methods`, where they are given, take their place while the grammar says that a
    composition is being written; one that is `known` is drawn again, at most `MOST_REDRAWS` times. `end_id` ends a
    text, and so does the `max_new_tokens`-th token. Keys and values are kept as `cache_dtype` (default: the model's;
    int8 has a scale for each head of each token). A slot appends up to `jump` tokens in a step: all but the first are
    those that the grammar leaves no choice about; 1 takes a step for each.

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
        composition_methods: Sequence[Method] | None = None,
        known: FormulaTable | None = None,
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
        mesh = make_mesh(MeshConfig(1, 1, 1)) if mesh is None else mesh
        copies = mesh.shape["data"] * mesh.shape["fsdp"]
        self._decoder = decoder = Decoder(
            model=model,
            end_id=end_id,
            methods=tuple(methods),
            composition_methods=None if composition_methods is None else tuple(composition_methods),
            grammar=grammar,
            guidance=guidance,
            always=[tuple(unconditional)] if guidance else [],
            slots=-(-slots // copies) * copies,
            limit=max_new_tokens,
            cache_dtype=cache_dtype,
            jump=1 if grammar is None else jump,
            mesh=mesh,
        )
        slots, pages, first = decoder.shardings()
        self._known = None if known is None else jax.device_put(known, replicated(mesh))
        self._start = jax.jit(decoder.open, static_argnums=0, out_shardings=(slots, pages, first))
        self._read_prompt = jax.jit(decoder.prefill, donate_argnums=(1, 2), out_shardings=(slots, first))
        self._run = jax.jit(decoder.decode, donate_argnums=1, out_shardings=(slots, pages))

    @property
    def slots(self) -> int:
        """Crystals that are drawn at once."""
        return self._decoder.slots

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
        for prompt in (*prompts, *self._decoder.always):
            check_context(self._decoder.model.config, len(prompt), self._decoder.limit)
        for name, values in (("seed", [seed]), ("index", (task.index for task in tasks))):
            for value in values:
                if not 0 <= value < 2**32:
                    raise UserError(f"the {name} {value} does not lie between 0 and 2³² - 1")
        if self._decoder.grammar is not None and limits is None:
            limits = [self._decoder.grammar.limits()] * len(prompts)
        return self._draw([tuple(prompt) for prompt in prompts], jax.random.key(np.uint32(seed)), tasks, limits)

    def compile_decode(self, prompt_tokens: int) -> Compiled:
        """The program behind `draw`, for prompts of up to so many tokens; the model's arrays may be abstract."""
        decoder = self._decoder
        variables, whole = decoder.model.variables, replicated(decoder.mesh)

        def placed(x: Any, sharding: NamedSharding = whole) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        with jax.set_mesh(decoder.mesh):
            opened = jax.eval_shape(partial(decoder.open, self._room(prompt_tokens)))
            slots, pages, first = jax.tree.map(placed, opened, jax.tree.broadcast(decoder.shardings(), opened))
            key = placed(jax.eval_shape(jax.random.key, 0))
            orders = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), decoder.no_orders())
            ready = jax.ShapeDtypeStruct((), jnp.int32)
            known = self._known and jax.tree.map(placed, self._known)
            return self._run.lower(variables, slots, pages, first, key, orders, ready, known).compile()

    def most_trips(self, prompt_tokens: int) -> dict[str, int]:
        """How often the loops of that program run at most whose trips depend on data, by their scope."""
        return {
            STEPS_LOOP: STEPS_PER_CALL,
            PROMPT_LOOP: whole_blocks(max(prompt_tokens, *map(len, self._decoder.always), 1)),
            TAIL_LOOP: (self._decoder.limit - 1) // BLOCK,
            BEGUN_LOOP: 1 + (self._decoder.jump > 1),
        }

    @property
    def tokens_per_call(self) -> int:
        """That the program writes at most, in all slots."""
        return STEPS_PER_CALL * self._decoder.tokens

    def memory(self, prompt_tokens: int) -> int:
        """Bytes on each device beside the model's, for prompts of up to so many tokens.

        What is kept is counted exactly, and what a step takes in between as `WORKING` float32 for each token that is
        read and each of the vocabulary, or `WORKING_ON_LETTERS` with a grammar; parameters that lie divided over `fsdp`
        take more when they are gathered, and on TPUs some kernels are there twice.
        """
        decoder = self._decoder
        opened = jax.eval_shape(partial(decoder.open, self._room(prompt_tokens)))
        shardings = jax.tree.leaves(jax.tree.broadcast(decoder.shardings(), opened))
        kept = sum(
            math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x, sharding in zip(jax.tree.leaves(opened), shardings, strict=True)
        )
        rows = decoder.tokens // decoder.parts * (1 + len(decoder.always))
        logits = rows * decoder.model.config.padded_vocab_size // parts(decoder.mesh, "vocab")
        kept += self._kernels_in_another_layout()
        return kept + 4 * (WORKING if decoder.letters is None else WORKING_ON_LETTERS) * logits

    def _kernels_in_another_layout(self) -> int:
        """Bytes on each device of what TPU's compiler copies at the beginning of a call, as compiled programs show: the
        kernels of queries and keys, which it wants with inputs last, and all whose outputs on a device are no multiple
        of 128, of which an array has inputs last unless told otherwise."""
        if self._decoder.mesh.devices.flat[0].platform != "tpu":
            return 0
        copied = 0
        for path, x in jax.tree_util.tree_leaves_with_path(self._decoder.model.params["layers"]):
            local, name = x.sharding.shard_shape(x.shape), jax.tree_util.keystr(path)
            if x.ndim == 3 and ("q_proj" in name or "k_proj" in name or local[-1] % LANES):
                copied += math.prod(local) * x.dtype.itemsize
        return copied

    def _room(self, prompt_tokens: int) -> int:
        """Blocks that a prompt may have: a power of two, so that few programs serve all."""
        least = min(LEAST_BLOCKS, whole_blocks(self._decoder.model.config.max_position_embeddings))
        return max(least, 1 << (whole_blocks(prompt_tokens) - 1).bit_length())

    def _draw(
        self,
        prompts: list[tuple[int, ...]],
        key: Key[Array, ""],
        tasks: Sequence[Task],
        limits: Sequence[Limits] | None,
    ) -> Generator[Draw, None, None]:
        decoder = self._decoder
        blocks = self._room(max(map(len, (*prompts, *decoder.always)), default=0))
        with jax.set_mesh(decoder.mesh):
            slots, pages, first = self._start(blocks)
        pool = PromptPool(decoder.pool(blocks))

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
                with jax.set_mesh(decoder.mesh):
                    slots, first = self._read_prompt(
                        decoder.model.variables, slots, first, tokens, np.int32(len(prompt)), listed
                    )
            return own[0]

        for prompt in decoder.always:
            number_of(prompt)  # of an empty pool, so that its pages are the first ones
        finished: list[Draw] = []
        read = allowed = 0  # crystals handed out or in `finished`; crystals whose prompt has pages
        orders = decoder.no_orders()
        while read < len(tasks):
            while allowed < min(len(tasks), read + decoder.pages):
                number, index = tasks[allowed]
                prompt = prompts[number]
                place = number_of(prompt)
                if place is None:
                    break
                page = allowed % decoder.pages
                orders.index[page], orders.prompt[page] = index, place
                orders.prompt_hash[page] = _hash(prompt)
                if limits is not None:
                    for all_pages, own in zip(*map(jax.tree.leaves, (orders.limits, limits[number])), strict=True):
                        all_pages[page] = own
                allowed += 1
            with jax.set_mesh(decoder.mesh):
                slots, pages = self._run(
                    decoder.model.variables,
                    slots,
                    pages,
                    first,
                    key,
                    jax.tree.map(np.copy, orders),
                    np.int32(allowed),
                    self._known,
                )
            yield from finished  # while the device goes on
            finished = []
            written = jax.device_get(pages)
            while read < allowed and written.crystal[page := read % decoder.pages] == read:
                finished.append(
                    Draw(
                        *tasks[read],
                        tokens=written.tokens[page, : written.length[page]].copy(),
                        log_probability=float(written.log_probability[page]),
                        grammar_log_probability=float(written.grammar_log_probability[page]),
                        redraws=int(written.redraws[page]),
                        ending=Ending(written.ending[page]),
                    )
                )
                pool.leave(prompts[tasks[read].prompt])
                read += 1
        yield from finished


def _hash(prompt: Sequence[int]) -> int:
    """32 bits of the tokens."""
    return int.from_bytes(hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).digest()[:4], "little")
