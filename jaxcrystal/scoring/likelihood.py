"""How probable texts are to a model: log p of every token that counts, of texts packed into rows, on any mesh.

row     │ p p p c c c c │ p p p c c c c c c │ · · │     prompts, what counts, padding
        │ c c c c c c c c c c . . . . . . . . . . │     what counts comes first, and is cut into blocks;
          logits ──▶        none                        none is made where nothing counts
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Float64, Int

from jaxcrystal.errors import UserError
from jaxcrystal.mesh import constrain
from jaxcrystal.model.llama import Llama, project
from jaxcrystal.texts.writer import Rows
from jaxcrystal.weights.saved import SavedModel

T = TypeVar("T")

BLOCK = 128  #: tokens of each row that have logits at a time
ROW = 1024  #: tokens of a row; a longer text has one of the next power of two, and so has the longest of few texts
AT_ONCE = 8  #: rows that a copy of the model reads together


def log_probabilities(module: Llama, variables: Any, rows: Rows) -> Float32[Array, "rows length"]:
    """log p of each token that `loss_mask` counts, given those before it in its own text, in nats; 0 of all others.

    Under `jit`. The softmax is over the whole vocabulary, in float32. The first token of a text has no probability.
    """
    hidden, _ = module.apply(variables, rows.tokens, rows.positions, rows.segments, method="hidden")
    head = module.apply(variables, method="head")

    def after(x: Array) -> Array:  # nothing follows a row's last token
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    counted = after(rows.loss_mask & (rows.segments > 0)) & (after(rows.segments) == rows.segments)
    order = jnp.argsort(~counted, axis=1, stable=True)
    length = order.shape[1]
    whole = ((0, 0), (0, -length % BLOCK))
    hidden = jnp.pad(jnp.take_along_axis(hidden, order[..., None], axis=1), (*whole, (0, 0)))
    targets = jnp.pad(jnp.take_along_axis(after(rows.tokens), order, axis=1), whole)

    def block(number: Int[Array, ""], found: Float32[Array, "rows length"]) -> Float32[Array, "rows length"]:
        cut = [jax.lax.dynamic_slice_in_dim(x, number * BLOCK, BLOCK, axis=1) for x in (hidden, targets)]
        logits = project(cut[0], head, module.config.vocab_size)
        # A sum over the vocabulary, and no look-up: each device adds what its part of the vocabulary holds.
        chosen = jnp.where(cut[1][..., None] == jnp.arange(logits.shape[-1]), logits, 0.0).sum(-1)
        log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(found, log_p, number * BLOCK, axis=1)

    blocks = -(-counted.sum(1).max() // BLOCK)
    found = jax.lax.fori_loop(0, blocks, block, constrain(jnp.zeros(targets.shape, jnp.float32), "batch", None))
    found = jnp.take_along_axis(found[:, :length], jnp.argsort(order, axis=1), axis=1)
    return jnp.pad(jnp.where(counted, found, 0.0)[:, :-1], ((0, 0), (1, 0)))


@dataclass(frozen=True)
class Text:
    """A prompt and what stands behind it, of which alone the probability is asked."""

    tokens: Sequence[int]  #: the beginning of sequence included
    answer: int  #: how many of them, at the end, are behind the prompt


class Likelihood:
    """Reads texts by `model`, so many rows of a copy on `mesh` together.

    A program is compiled for rows of `ROW` tokens, and others where a text is longer, or where few texts are asked in
    all. What a text is found to be does not depend on its neighbours but for the last digits of float32.
    """

    def __init__(self, model: SavedModel, mesh: Mesh, at_once: int = AT_ONCE) -> None:
        if at_once < 1:
            raise UserError(f"at_once is {at_once}; it must be at least 1")
        self.model, self.mesh = model, mesh
        self._copies = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = self._copies * at_once
        self._read = jax.jit(lambda variables, rows: log_probabilities(model.module, variables, rows))

    def read(self, groups: Iterable[tuple[T, Sequence[Text]]]) -> Iterator[tuple[T, Float64[np.ndarray, "texts"]]]:
        """Each item with log p of its texts behind their prompts, in nats, in their order; some are taken ahead.

        Raises UserError where the model's numbers are none.
        """
        waiting: deque[tuple[T, int]] = deque()
        known: deque[float] = deque()

        def texts() -> Iterator[Text]:
            for item, own in groups:
                waiting.append((item, len(own)))
                yield from own

        for found in self._batches(texts()):
            known.extend(found)
            while waiting and len(known) >= waiting[0][1]:
                item, count = waiting.popleft()
                yield item, np.array([known.popleft() for _ in range(count)], np.float64)
        for item, _ in waiting:  # those at the end that have no text
            yield item, np.zeros(0)

    def _batches(self, texts: Iterable[Text]) -> Iterator[list[float]]:
        """log p of the texts of each batch; the next is made ready while the device is at work."""
        ahead: deque[tuple[_Batch, Array]] = deque()
        used, waiting = 0, iter(texts)
        first = list(islice(waiting, self.rows))
        longest = max((len(text.tokens) for text in first), default=0)
        length = ROW if len(first) == self.rows else _power(max(longest, BLOCK))
        for batch in _packed(chain(first, waiting), self.rows, length):
            used = max(used, self._used(batch))  # the first may be cut short by a long text
            with jax.set_mesh(self.mesh):
                ahead.append((batch, self._read(self.model.variables, batch.arrays(used))))
            if len(ahead) > 1:
                yield _summed(*ahead.popleft())
        for batch, found in ahead:
            yield _summed(batch, found)

    def _used(self, batch: _Batch) -> int:
        """Rows of a program for such a batch."""
        each = -(-len(batch.rows) // self._copies)
        return min(self._copies * _power(each), self.rows)


@dataclass(frozen=True)
class _Batch:
    length: int  #: of its rows
    rows: list[list[Text]]
    order: list[tuple[int, int]]  #: row of each text, and where it ends there

    def arrays(self, count: int) -> Rows:
        """In so many rows."""
        tokens, segments, positions = np.zeros((3, count, self.length), np.int32)
        counts = np.zeros(tokens.shape, bool)
        for row, texts in enumerate(self.rows):
            start = 0
            for number, text in enumerate(texts, start=1):
                end = start + len(text.tokens)
                tokens[row, start:end], segments[row, start:end] = text.tokens, number
                positions[row, start:end] = np.arange(end - start)
                counts[row, end - text.answer : end] = True
                start = end
        return Rows(tokens, segments, positions, counts)


def _power(least: int) -> int:
    """The power of two that is so large, so that few programs serve all."""
    return 1 << (least - 1).bit_length()


def _packed(texts: Iterable[Text], most: int, length: int) -> Iterator[_Batch]:
    """Texts in as many rows at most, each in the first that has room for it; a text longer than `length` makes the rows
    of its batch longer."""
    batch, ends = _Batch(length, [], []), []

    for text in texts:
        size = len(text.tokens)
        row = next((i for i, end in enumerate(ends) if end + size <= batch.length), len(ends))
        if row == most or size > batch.length:
            if batch.rows:
                yield batch
            batch, ends, row = _Batch(max(length, _power(size)), [], []), [], 0
        if row == len(ends):
            batch.rows.append([])
            ends.append(0)
        batch.rows[row].append(text)
        ends[row] += size
        batch.order.append((row, ends[row]))
    if batch.rows:
        yield batch


def _summed(batch: _Batch, found: Array) -> list[float]:
    places, log_p = [0] * len(batch.rows), np.asarray(jax.device_get(found), np.float64)
    if np.isnan(log_p[: len(batch.rows)]).any():
        raise UserError("the model's logits are not numbers (nan): its weights are damaged")
    sums = []
    for row, end in batch.order:
        sums.append(float(log_p[row, places[row] : end].sum()))
        places[row] = end
    return sums
