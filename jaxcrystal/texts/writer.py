"""Crystals written as tokens, on the device: from arrays and one key to what the model is trained on.

A text is a list of pieces. The tokens of all pieces lie in one list for the whole batch: those of the prompts and of
each element once, those of every number where it was made. A piece says where its tokens start there and how many they
are: none for a task not chosen or an atom that is not there. What lies between the prompt and the end is for the form
to lay down; here are its pieces of P1, where a number starts behind its leading zeros.

    list     <s> Below … │ Generate … │ H ⏎ │ He ⏎ │ … │ 0 0 5 . 2 ␣ │ 1 2 0 ␣ │ … │ 0 . 5 0 ␣ 0 . 5 0 ␣ … ⏎ │ …
    text     <s> Below … │ Generate … │ 5 . 2 ␣ │ … │ Na ⏎ │ 0 . 5 0 ␣ … ⏎ │ … │ </s>

From a place in the text to its token's place in the list is a step that is the same all along a piece. It is added
where the piece begins and taken away where it ends; a cumulative sum makes the steps of all places.

This equals the tokenizer's own tokens of the text because the tokenizer cuts it where pieces meet: `Form.tables` tries
it and refuses a tokenizer that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

from jaxcrystal.config import ATTRIBUTES, Augment, TextFormat
from jaxcrystal.texts import prompts
from jaxcrystal.texts.chance import shuffled, uniform
from jaxcrystal.texts.conditions import sentence
from jaxcrystal.texts.forms import Arrays, Drawn, Form, form_of
from jaxcrystal.texts.pieces import EMPTY, Pieces, TokenList, one_after_the_other, ragged
from jaxcrystal.texts.token_tables import TokenTables
from jaxcrystal.texts.tokenizer import Tokenizer

FIRST = 4  #: words of a form that are drawn before those of the sentences


def sentence_tokens(
    tokenizer: Tokenizer,
    labels: Sequence[Mapping[str, Any]],
    text: TextFormat = TextFormat(),  # noqa: B008
) -> Int[np.ndarray, "crystals attributes width"]:
    """The tokens of every condition that could be stated of each crystal, on the host; EMPTY where none is known."""
    start = len(tokenizer.encode(prompts.INTRODUCTION))
    known: dict[str, list[int]] = {}

    def tokens(name: str, label: Mapping[str, Any]) -> list[int]:
        if label.get(name) is None:
            return []
        words = sentence(name, label[name], text.paper_compat, text.properties)
        if words not in known:
            known[words] = tokenizer.encode(prompts.INTRODUCTION + words)[start:]
        return known[words]

    flat = ragged([*(tokens(name, label) for label in labels for name in text.attributes), [EMPTY]])  # none has width 0
    return flat[:-1].reshape(len(labels), len(text.attributes), -1)


@struct.dataclass
class Examples:
    """Crystals to be written, of any leading shape: their arrays, their sentences, and their rows in the data set."""

    crystals: Arrays  #: as the form has them
    sentences: Int[Array, "*n attributes width"]  #: EMPTY-padded tokens of each condition; all EMPTY where unknown
    index: Int[Array, "*n"]  #: row of the data set: what the draws are keyed by; negative for no crystal at all


@struct.dataclass
class Draws:
    """What chance decided about one crystal (or, with a leading shape, about many)."""

    infill: Bool[Array, "*n"]  #: the infilling task instead of generation
    stated: Int[Array, "*n attributes"]  #: attributes stated in a generation prompt, in order; EMPTY for none
    body: Drawn  #: the form's own

    def __getitem__(self, index: object) -> Draws:
        return jax.tree.map(lambda x: x[index], self)


@struct.dataclass
class Rows:
    """Packed training rows. Token `t` belongs to crystal `segments[t]` of its row (from 1; 0 is padding)."""

    tokens: Int[Array, "rows length"]
    segments: Int[Array, "rows length"]
    positions: Int[Array, "rows length"]  #: within the crystal's own text
    loss_mask: Bool[Array, "rows length"]  #: tokens that the loss counts, as targets


@dataclass(frozen=True)
class Writer:
    """Draws and writes. All methods are pure and run under `jit`; the settings are compiled in."""

    form: Form
    tables: TokenTables  #: that the form has made
    augment: Augment

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: TextFormat, augment: Augment) -> Writer:
        """Raises UserError as `form_of` and `Form.check`, and as `Form.tables` for a tokenizer that cannot write it."""
        form = form_of(text)
        form.check(augment)
        return cls(form, form.tables(tokenizer), augment)

    def draw(self, key: PRNGKeyArray, examples: Examples) -> Draws:
        """Draws for each example; they depend on `key` and the example's `index` alone."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[examples.index.ndim :]), examples)
        draws = jax.vmap(self._draw, in_axes=(None, 0))(key, flat)
        return jax.tree.map(lambda x: x.reshape(*examples.index.shape, *x.shape[1:]), draws)

    def _draw(self, key: PRNGKeyArray, example: Examples) -> Draws:
        n, count = len(self.form.text.attributes), self.form.words(example.crystals, self.augment)
        words = jax.random.bits(jax.random.fold_in(key, example.index), (1 + 2 * n + count,), jnp.uint32)
        # Most of the form's words come last: those before them must not depend on how many it takes.
        task, first, chance, place, others = jnp.split(words, np.cumsum([1, FIRST, n, n]))
        return Draws(
            infill=uniform(task[0]) < self.augment.infill,
            stated=self._stated(chance, place, known=(example.sentences != EMPTY).any(-1)),
            body=self.form.draw(jnp.concatenate([first, others]), example.crystals, self.augment),
        )

    def _stated(
        self,
        chance: UInt32[Array, "attributes"],
        place: UInt32[Array, "attributes"],
        known: Bool[Array, "attributes"],
    ) -> Int[Array, "attributes"]:
        if self.augment.attribute_probability == 0:
            return jnp.full(len(self.form.text.attributes), EMPTY)
        own = [each.name for each in self.form.text.properties]
        known &= np.isin(self.form.text.attributes, [*self.augment.attributes, *own])
        if not self.form.text.paper_compat:
            stated = known & (uniform(chance) < self.augment.attribute_probability)
            order = shuffled(place, stated)
            return jnp.where(stated[order], order, EMPTY)
        # The original: a uniform number of these, chosen at random; the formula before them, if there are any.
        formula = ATTRIBUTES.index("pretty_formula")
        others = known & ~np.isin(ATTRIBUTES, ("pretty_formula", "elements"))
        number = chance[0] % (others.sum() + 1)
        stated = jnp.where(jnp.arange(len(ATTRIBUTES)) < number, shuffled(place, others), EMPTY)
        first = jnp.where(known[formula] & (number > 0), formula, EMPTY)
        return jnp.concatenate([first[None], stated[:-1]])

    def lengths(self, examples: Examples, draws: Draws) -> Int[Array, "*n"]:
        """Number of tokens of each text; what packing must know before the rows are written."""
        return self._pieces(examples, draws)[1].length.sum(-1)

    def bounds(self, examples: Examples) -> tuple[Int[np.ndarray, "crystals"], Int[np.ndarray, "crystals"]]:
        """Number of tokens of each crystal's shortest and longest possible text, whatever is drawn; on the host."""
        t = self.tables
        plain, masked = self.form.bounds(t, jax.device_get(examples.crystals))
        least, most = plain + len(t.introduction) + len(t.request) + 1
        infilling = masked + len(t.infill_introduction) + len(t.infill_request) + 1
        sentences = (np.asarray(examples.sentences) != EMPTY).sum((1, 2)) * (self.augment.attribute_probability > 0)
        if self.augment.infill == 0:
            return least, most + sentences
        if self.augment.infill == 1:
            return infilling[0], infilling[1]
        return np.minimum(least, infilling[0]), np.maximum(most + sentences, infilling[1])

    def write(self, examples: Examples, draws: Draws, length: int) -> Rows:
        """Rows of `length` tokens from examples [rows, slots]: the crystals of a row one after the other.

        Tokens beyond `length` are cut off: pack by `lengths`.
        """
        tokens, text, answer = self._pieces(examples, draws)
        rows = len(text.length)
        lengths = text.length.sum(-1)
        ends = _sum_before(lengths) + lengths
        begins = ((ends - lengths)[:, :, None] + _sum_before(text.length)).reshape(rows, -1)
        steps = text.start.reshape(rows, -1) - begins
        # A step is added where its piece begins and taken away where it ends. Rows lie in one list, with a place for
        # what is cut off behind each: XLA then needs no pairs of indices.
        added = jnp.zeros(rows * (length + 1), jnp.int32)
        for at, step in ((begins, steps), (begins + text.length.reshape(rows, -1), -steps)):
            at = jnp.minimum(at, length) + (length + 1) * jnp.arange(rows)[:, None]
            added = added.at[at.reshape(-1)].add(step.reshape(-1), mode="promise_in_bounds")
        here = jnp.arange(length)
        # A sum in a tree: on a CPU three times as fast as `cumsum`.
        place = here + jax.lax.associative_scan(jnp.add, added.reshape(rows, -1)[:, :length], axis=1)
        before = ends[:, None, :] <= here[:, None]  # crystals of the row that end before this place
        written = ~before[:, :, -1]
        place = jnp.where(written, place, 0).astype(jnp.uint32)
        position = here - (before * lengths[:, None, :]).sum(-1)
        in_answer = (before != (here[:, None] >= (ends - answer)[:, None, :])).any(-1)
        return Rows(
            tokens=jnp.where(written, tokens.at[place].get(mode="promise_in_bounds"), self.tables.pad),
            segments=jnp.where(written, before.sum(-1) + 1, 0),
            positions=jnp.where(written, position, 0),
            loss_mask=written & (in_answer | (self.augment.loss_on == "all")),
        )

    def _pieces(self, examples: Examples, draws: Draws) -> tuple[Int[Array, "all"], Pieces, Int[Array, "*n"]]:
        """The list of tokens, the pieces of each text in it, and how many tokens at the end of each are its answer."""
        t, infill, exists = self.tables, draws.infill, examples.index >= 0
        tokens = TokenList()
        introduction = tokens.lay(t.introduction).otherwise(infill, tokens.lay(t.infill_introduction))
        sentences = tokens.lay(examples.sentences)
        stated = jax.tree.map(lambda x: jnp.take_along_axis(x, draws.stated, axis=-1), sentences)
        body = self.form.body(t, tokens, examples.crystals, draws.body, infill)
        asked = tokens.lay(t.elements)[draws.body.masked]
        text = one_after_the_other(
            infill.shape,
            introduction,
            stated.only((draws.stated != EMPTY) & ~infill[..., None]),
            tokens.lay(t.request).only(~infill),
            body,
            tokens.lay(t.infill_request).only(infill),
            asked.only(infill),
            tokens.lay(np.array([t.eos])),
        )
        answer = jnp.where(infill, asked.length, body.length.sum(-1)) + 1
        return tokens.tokens(), text.only(exists[..., None]), answer * exists


def _sum_before(x: Int[Array, "*n k"]) -> Int[Array, "*n k"]:
    """Of what comes before along the last axis: a product with a triangle of ones, which float32 holds exactly."""
    triangle = np.triu(np.ones((x.shape[-1], x.shape[-1]), np.float32), k=1)
    return jnp.dot(x.astype(jnp.float32), triangle, precision="highest").astype(jnp.int32)
