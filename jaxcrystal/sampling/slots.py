"""What lies on the devices while crystals are drawn.

slots             crystals that are being written, one each; an idle one takes the next task at once
pages             where they are written down, one a crystal, used in turn; the host reads them now and then
orders            of each page: which crystal, behind which prompt, within which limits
"""

from __future__ import annotations

from enum import IntEnum

from flax import struct
from jaxtyping import Array, Float32, Int32, UInt32

from jaxcrystal.model.cache import Cache
from jaxcrystal.texts.forms import Limits, State


class Ending(IntEnum):
    """How a crystal's text ended."""

    FINISHED = 0  # with the end of sequence
    TRUNCATED = 1  # at the limit of tokens
    NAN_LOGITS = 2  # where the model's logits were no numbers
    KNOWN_FORMULA = 3  # behind a composition that was known, after as many others that were


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
    redraws: Int32[Array, "slots"]  #: how often the composition was known, and the text begun again
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
    redraws: Int32[Array, "pages"]
    ending: Int32[Array, "pages"]


@struct.dataclass
class Orders:
    """What is to be written on each page."""

    index: UInt32[Array, "pages"]
    prompt_hash: UInt32[Array, "pages"]
    prompt: Int32[Array, "pages"]  #: its number in the cache
    limits: Limits | None  #: of each page; None exactly if the engine has no grammar
