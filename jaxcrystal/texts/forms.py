"""What a text format is to the rest of the package, and the only place that knows which there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.kept import Keeping, Kept
from jaxcrystal.texts.pieces import Pieces, TokenList
from jaxcrystal.texts.prompts import Written
from jaxcrystal.texts.token_tables import TokenTables
from jaxcrystal.texts.tokenizer import Tokenizer

Arrays: TypeAlias = Any  #: a pytree: what the device is given of crystals, whose leading axes all its arrays share
Limits: TypeAlias = Any  #: a pytree: one set of constraints, or those of many slots with a leading axis
State: TypeAlias = Any  #: a pytree: how far the text of each slot is


class Drawn(Protocol):
    """A pytree: what chance decided about how a crystal is written, of any leading shape."""

    masked: Int[Array, "*n"]  #: atomic number that infilling asks for


class Grammar(Protocol):
    """Which tokens may come next, so that every text is a crystal: an automaton whose methods are pure.

    It reads and writes letters, which are tokens of the vocabulary. Whatever is chosen of those that `allowed` names,
    the end of sequence comes at the latest as the last token of the limit.
    """

    tokens: Int[np.ndarray, "letters"]  #: of the vocabulary
    limit: int  #: tokens of a text, the end of sequence included

    def limits(self, constraints: Constraints = Constraints()) -> Limits:  # noqa: B008
        """The constraints as arrays. Raises UserError if no crystal that meets them is sure to fit."""
        ...

    def start(self, limits: Limits) -> State:
        """Before the first token; `limits` has a leading axis of slots."""
        ...

    def advance(self, state: State, letter: Int[Array, "slots"]) -> State:
        """After one more letter, which was allowed."""
        ...

    def allowed(self, state: State) -> Bool[Array, "slots letters"]:
        """Letters that may come next."""
        ...

    def composing(self, state: State) -> Bool[Array, "slots"]:
        """Whether the composition is being written; nowhere in a form whose texts do not begin with it."""
        ...

    def composition(self, state: State) -> tuple[Int[Array, "slots most"], Int[Array, "slots most"]]:
        """Atomic numbers of the elements, 0 behind the last, and their atoms, once `composing` is over; only of a form
        whose texts begin with them."""
        ...


class Form(Written, Protocol):
    """A text format with its decimals: how crystals are written and read, on the host and on the device.

    An object of few settings, which may be sent to another process. What it makes of a tokenizer are its tables.
    """

    composition_first: bool  #: whether a text begins with all of its composition
    states_group: bool  #: whether a text states its space group
    kept: Kept | None  #: what `parse` puts back as it was, in texts that repeat it
    transformations: tuple[str, ...]  #: names of what leaves a crystal the same and changes its text; the usual first

    def described(self, crystal: Crystal) -> list[str]:
        """The distinct texts of a crystal that can be listed, the one that `write` gives first: those of all its
        descriptions, origins along free axes as listed; in a form whose texts have any origin, that one alone.

        Raises UserError as `write`.
        """
        ...

    def transformed(
        self, crystal: Crystal, over: Collection[str], count: int, random: np.random.Generator
    ) -> list[str]:
        """Texts of the same crystal by its `transformations` that `over` names: all that there are where they can be
        listed, else `count` that are drawn uniformly, each by all of these one after the other.

        Raises UserError as `write`.
        """
        ...

    def parse(self, text: str) -> Crystal:
        """The crystal that a text describes. Raises ParseError at the first line that is wrong."""
        ...

    def masked_with(self, crystal: Crystal, atom: int) -> Bool[np.ndarray, "atoms"]:
        """Which atoms of a crystal are written together with one of them, and so masked with it.

        Raises UserError where that cannot be told.
        """
        ...

    def keeping(self, crystal: Crystal, sites: Sequence[int], cell: bool, group: bool, symprec: float) -> Keeping:
        """How texts repeat some sites of a crystal, each once and by their numbers from 0, its cell, its space group,
        which is looked for within `symprec` Å.

        Raises UserError for what a text of the form cannot repeat.
        """
        ...

    def space_group(self, text: str) -> int | None:
        """The number that a text states; None where it states none, or the form has no place for it."""
        ...

    def check(self, augment: Augment) -> None:
        """Raises UserError for augmentations that the form does not have."""
        ...

    def implied(self, attribute: str, value: Any) -> dict[str, Any]:
        """Fields of `Constraints` that the grammar keeps to where a prompt states this; none if it cannot."""
        ...

    def arrays(self, crystals: CrystalSet) -> Arrays:
        """What a batch carries to the device: numpy arrays with a leading axis of crystals."""
        ...

    def hides(self, arrays: Arrays) -> bool:
        """Whether infilling can hide an element of each crystal so that its text does not depend on it."""
        ...

    def stated(self, crystals: CrystalSet, arrays: Arrays) -> list[dict[str, Any]]:
        """What prompts may state of each crystal, in the order of `TextFormat.attributes`: its labels, but nothing that
        its text contradicts."""
        ...

    def tables(self, tokenizer: Tokenizer) -> TokenTables:
        """The tokens of its pieces. Raises UserError if `tokenizer` does not cut its texts where they meet."""
        ...

    def words(self, arrays: Arrays, augment: Augment) -> int:
        """How many random words `draw` takes for one crystal: four, and as many more as it needs."""
        ...

    def draw(self, words: UInt32[Array, "words"], arrays: Arrays, augment: Augment) -> Drawn:
        """Draws for one crystal; under `vmap`."""
        ...

    def body(
        self, tables: TokenTables, tokens: TokenList, arrays: Arrays, drawn: Drawn, infill: Bool[Array, "*n"]
    ) -> Pieces:
        """The pieces of each crystal's own text, along a last axis, its tokens laid into `tokens`; masked to infill.

        It has no line feed at its end. How many tokens it has may depend on what was drawn.
        """
        ...

    def bounds(
        self, tables: TokenTables, arrays: Arrays
    ) -> tuple[Int[np.ndarray, "2 crystals"], Int[np.ndarray, "2 crystals"]]:
        """Least and most tokens of each crystal's own text, whatever is drawn, on the host: as it is, and masked, with
        the element that is asked for."""
        ...

    def grammar(self, tables: TokenTables, limit: int) -> Grammar:
        """For texts of at most `limit` tokens, the end of sequence included."""
        ...


def form_of(text: TextFormat) -> Form:
    """The form that a model's or a recipe's settings name. Raises UserError for settings that it cannot have."""
    from jaxcrystal.texts.p1.form import P1
    from jaxcrystal.texts.symmetry.form import Symmetry

    return {"p1": P1, "symmetry": Symmetry}[text.form](text)
