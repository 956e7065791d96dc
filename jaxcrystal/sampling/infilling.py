"""Which element could stand where one is masked: the exact probability of each, by the model.

An element's probability is that of its tokens behind the prompt, and then of the end, as training texts write it. A
symbol may be one token or several, so that those of all elements are a trie, and each of its nodes is a question to the
model: what follows this prefix?

    prompt ─┬─ C ─┬─ end             P(C)  = P(C | prompt) · P(end | prompt C)
            │     ├─ a ─── end       P(Ca) = P(C | prompt) · P(a | prompt C) · P(end | prompt C a)
            │     └─ l ─── end
            └─ Fe ─── end

A prompt is read once, into pages of the cache, and all leaves of the trie follow it as rows of one more call. What a
node gives to other tokens than its branches is outside the elements; with that, the probabilities sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Float64, Int

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.masking import Masked
from jaxcrystal.errors import UserError
from jaxcrystal.model.cache import BLOCK, Cache, whole_blocks
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.pieces import ragged
from jaxcrystal.texts.prompts import infilling_prompt
from jaxcrystal.texts.token_tables import TokenTables
from jaxcrystal.weights.saved import SavedModel

AT_ONCE = 8  #: prompts that a copy of the model reads together
LOGITS = 2**27  #: that exist at once in a copy at most, so that a large vocabulary takes fewer prompts


@dataclass(frozen=True)
class Answer:
    """What the model says behind one prompt."""

    log_probabilities: Float64[np.ndarray, "118"]  #: of the elements, hydrogen first; not renormalised
    outside: float  #: probability of all that is no element

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Answer:
        """What `row` gave."""
        return cls(np.array(row["log_probabilities"], np.float64), row["outside"])

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"log_probabilities": self.log_probabilities.tolist(), "outside": self.outside}


@dataclass(frozen=True, eq=False)
class Trie:
    """The tokens of all elements, each with the end behind it. Node 0 is the prompt; the others are prefixes."""

    leaves: Int[np.ndarray, "leaves width"]  #: tokens of the prefixes that no other continues, padded with zeros
    places: Int[np.ndarray, "prefixes"]  #: of each other node's last token among those of the leaves, row by row
    nodes: Int[np.ndarray, "branches"]  #: where each branch begins
    tokens: Int[np.ndarray, "branches"]  #: that it adds
    elements: Int[np.ndarray, "118 steps"]  #: branches that lead to the end of each element, padded with EMPTY
    prefixes: Int[np.ndarray, "nodes steps"]  #: branches that lead to each node, likewise

    @classmethod
    def of(cls, spelled: Sequence[Sequence[int]], end: int) -> Trie:
        """Of the tokens of each element, and of the token that ends a text."""
        nodes: dict[tuple[int, ...], int] = {}
        branches: dict[tuple[int, int], int] = {}
        ways = [
            [
                branches.setdefault((nodes.setdefault(tuple(symbol[:i]), len(nodes)), token), len(branches))
                for i, token in enumerate([*symbol, end])
            ]
            for symbol in spelled
        ]
        prefixes = list(nodes)
        leaves = [one for one in prefixes if not any(one == other[:-1] for other in prefixes[1:])]
        width = max(map(len, leaves))
        row = {prefix: i for i, leaf in enumerate(leaves) for prefix in (leaf[:n] for n in range(1, len(leaf) + 1))}
        begun, added = np.array(list(branches), np.int32).T
        return cls(
            leaves=np.array([[*leaf, *[0] * (width - len(leaf))] for leaf in leaves], np.int32),
            places=np.array([row[one] * width + len(one) - 1 for one in prefixes[1:]], np.int32),
            nodes=begun,
            tokens=added,
            elements=ragged(ways),
            prefixes=ragged([[branches[nodes[one[:i]], one[i]] for i in range(len(one))] for one in prefixes]),
        )

    def answer(self, branches: Float32[np.ndarray, "branches"], others: Float32[np.ndarray, "nodes"]) -> Answer:
        """From the log-probability of each branch where it begins, and of all that is none at each node."""
        logs = np.append(branches.astype(np.float64), 0.0)  # where EMPTY leads
        reached = logs[self.prefixes].sum(1)
        return Answer(logs[self.elements].sum(1), float(np.exp(reached + others).sum()))


class Infiller:
    """Answers prompts by `model`, `at_once` of them together; `tables` are those of its texts.

    A program is compiled for prompts of up to 64 tokens, one for up to 128, one for 256, and so on; and others where
    fewer prompts are asked in all.
    """

    def __init__(self, model: SavedModel, tables: TokenTables, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.form = form_of(model.text)
        self.trie = Trie.of([tables.symbol_tokens(symbol) for symbol in ELEMENTS[1:]], tables.eos)
        logits = len(self.trie.prefixes) * model.config.padded_vocab_size
        self._copies = mesh.shape["data"] * mesh.shape["fsdp"]
        self.at_once = self._copies * max(1, min(AT_ONCE, LOGITS // logits))
        self._read = jax.jit(self._log_probabilities)

    def prompt(self, masked: Masked) -> str:
        """The text that asks for the hidden element. Raises UserError for a crystal that the form cannot write."""
        return infilling_prompt(self.form, masked.crystal, masked.stand_in)

    def tokens(self, name: str, prompt: str) -> list[int]:
        """Token ids of the prompt of the crystal that messages call so.

        Raises UserError where the context does not hold it and an element.
        """
        tokens = [*self.model.tokenizer.begin, *self.model.tokenizer.encode(prompt)]
        context, longest = self.model.config.max_position_embeddings, self.trie.leaves.shape[1]
        if len(tokens) + longest > context:
            raise UserError(
                f"{name} has a prompt of {len(tokens)} tokens and an element has up to {longest}, but the model's "
                f"context holds {context}: leave it out"
            )
        return tokens

    def answers(self, prompts: Iterable[Sequence[int]]) -> Iterator[Answer]:
        """The answer to each prompt, which holds token ids, the beginning of sequence included; in their order.

        Raises UserError where the model's numbers are none.
        """
        waiting, rows = iter(prompts), 0
        while batch := list(islice(waiting, self.at_once)):
            rows = rows or self._rows(len(batch))
            blocks = 1 << (whole_blocks(max(map(len, batch))) - 1).bit_length()
            tokens, lengths = np.zeros((rows, blocks * BLOCK), np.int32), np.ones(rows, np.int32)
            for row, prompt in enumerate(batch):
                tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
            with jax.set_mesh(self.mesh):
                branches, others = jax.device_get(self._read(self.model.variables, tokens, lengths))
            if np.isnan(branches[: len(batch)]).any():
                raise UserError("the model's logits are not numbers (nan): its weights are damaged")
            yield from map(self.trie.answer, branches[: len(batch)], others)

    def _rows(self, prompts: int) -> int:
        """Of a program that reads so many prompts: a power of two in each copy, so that few programs serve all."""
        each = 1 << (-(-prompts // self._copies) - 1).bit_length()
        return min(self._copies * each, self.at_once)

    def _log_probabilities(
        self, variables: Any, prompts: Int[Array, "prompts time"], lengths: Int[Array, "prompts"]
    ) -> tuple[Float32[Array, "prompts branches"], Float32[Array, "prompts nodes"]]:
        """As `Trie.answer` takes them."""
        module, config, trie = self.model.module, self.model.config, self.trie
        count, time = prompts.shape
        (leaves, width), blocks = trie.leaves.shape, whole_blocks(time)

        positions = jnp.broadcast_to(jnp.arange(time), prompts.shape)
        cache = Cache.empty(config, count, time)
        hidden, read = module.apply(variables, prompts, positions, cache=cache, method="hidden")
        last = hidden[jnp.arange(count), lengths - 1][:, None]

        # What the rows have read as their own becomes the pages of prompts.
        keys, values = (x.reshape(x.shape[0], count * blocks, *x.shape[3:]) for x in (read.keys, read.values))
        cache = Cache.empty(config, count * leaves, width).replace(
            prompt_keys=keys,
            prompt_values=values,
            prompt_pages=jnp.arange(count * blocks).reshape(count, blocks),
            prompt_lengths=lengths,
            prompt=jnp.repeat(jnp.arange(count), leaves),
        )
        rows = jnp.tile(trie.leaves, (count, 1))
        positions = jnp.repeat(lengths, leaves)[:, None] + jnp.arange(width)
        hidden, _ = module.apply(variables, rows, positions, cache=cache, method="hidden")
        hidden = hidden.reshape(count, leaves * width, -1)[:, trie.places]

        logits = module.apply(variables, jnp.concatenate([last, hidden], axis=1), method="logits")
        logs = jax.nn.log_softmax(logits)
        others = logs.at[:, trie.nodes, trie.tokens].set(-jnp.inf)
        return logs[:, trie.nodes, trie.tokens], jax.nn.logsumexp(others, axis=-1)
