"""Which tokens may come next, so that every text is a crystal with full orbits: an automaton, on the device.

            ┌──────── ␣ ◀──────┐                 ┌───────────── ⏎ ◀────────────┐
    element ┴▶ ␣ count ─┬──────┘   ┌▶ group ⏎ ───┴▶ symbol ␣ letter ─┬─────────┴┬▶ a ␣ … ─▶ end of sequence
                        └─── ⏎ ────┘                                 └▶ ␣ x ␣ … ┘

A letter of the automaton is a token of the vocabulary: digits (one a letter, or groups of up to three), the point, the
separators, the end, and the tokens that words are made of. What may come looks ahead, so that no text runs into a wall:

  a composition   may go on if some group that is still possible can hold it and all that is still required (`reach`)
  a group         may come if it holds the composition
  a position      may come if what is left of the composition finds room beside it; elements come in order, so that the
                  symbol of every orbit is the only one
  a coordinate    may not make the orbit collapse, nor meet another (`orbits`)
  a kept orbit    comes before the others of its element, and leaves no choice (`kept`)
  a parameter     of the lattice lies within its interval (`lattice`, `intervals`)

A number of a composition, of a group or of a coordinate is one of a set; `State.ways` says of every beginning of such a
number what may follow. Every orbit holds an atom at least, and so a limit of tokens is one of atoms: `most`. It is safe
rather than least: what is costliest to write is taken for each orbit, element and parameter.

Constraints are arrays, not constants: one compiled program serves all of them, each slot its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float32, Int, Int8, Int16, Int32

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.wyckoff import GROUPS, LETTERS
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.intervals import POINTED, next_digits
from jaxcrystal.texts.numbers import power_of_ten
from jaxcrystal.texts.symmetry import lattice, reach, wishes
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS, MOST_ELEMENTS, KindTables
from jaxcrystal.texts.symmetry.lattice import Lattice
from jaxcrystal.texts.symmetry.orbits import Orbits, blocked
from jaxcrystal.texts.symmetry.reach import LAST, MORE, Composition, Sites
from jaxcrystal.texts.symmetry.wishes import Limits, Tables
from jaxcrystal.texts.symmetry.words import LETTER, LINE, NO_WORD, ORDER, SPACED, Words

POINT, SPACE, NEWLINE, END, SYMBOLS = range(5)  #: letters, counted from behind the digits; from SYMBOLS on words'
ELEMENT, COUNT, GROUP, SYMBOL, POSITION, COORDINATE, PARAMETER = range(7)  #: what is being written
DECIMALS = range(2, 5)  #: of a coordinate: fewer leave no room for 64 atoms, more are not exact


@struct.dataclass
class State:
    """How far the text of each slot is."""

    field: Int32[Array, "slots"]  #: what is being written, ELEMENT to PARAMETER
    value: Int32[Array, "slots"]  #: the digits of the number so far, as one number
    column: Int32[Array, "slots"]  #: of the number: its digits so far; behind the point POINTED + decimals so far
    ways: Int8[Array, "slots beginnings"]  #: what may follow each beginning of the number: LAST, NEXT, EXTRA, MORE
    may_follow: Int32[Array, "slots"]  #: which elements may come behind the last one's number: NEXT, EXTRA
    node: Int32[Array, "slots"]  #: of the word: where its tokens so far lead
    composition: Composition
    sites: Sites
    orbits: Orbits
    lattice: Lattice
    limits: Limits  #: that the slot keeps to

    @property
    def element(self) -> Int32[Array, "slots"]:
        """Whose orbits are being written: its place in the order of formulas."""
        at = jnp.minimum(self.sites.element, MOST_ELEMENTS - 1)[:, None]
        return jnp.take_along_axis(self.composition.elements, at, axis=1)[:, 0].astype(jnp.int32)


@dataclass(frozen=True, eq=False)
class Grammar:
    """The automaton for one tokenizer, text format and limit of tokens. Its methods are pure.

    `allowed` says which letters may come after `start` and any number of `advance`. Whatever is chosen of them, the end
    of sequence comes at the latest as the last token of the limit, and the text is a crystal with full orbits that
    meets the slot's `Limits`. An idle slot may advance by any letter; its state means nothing until it starts again.
    """

    tokens: Int[np.ndarray, "letters"]  #: of the vocabulary
    digits: Int[np.ndarray, "numbers 2"]  #: of the first letters: what each reads as, and how many digits it has
    words: Words
    text: TextFormat
    limit: int  #: tokens of a text, the end of sequence included
    most: int  #: atoms of a text that is sure to fit

    @classmethod
    def build(cls, tables: Tables, text: TextFormat, limit: int) -> Grammar:
        """For texts of at most `limit` tokens, of a number of decimals among `DECIMALS`."""
        words = Words.build(tables)
        return cls(
            tokens=np.array([*tables.digits, tables.point, tables.space, tables.newline, tables.eos, *words.symbols]),
            digits=np.array([(value, k) for k in range(1, tables.group + 1) for value in range(10**k)]),
            words=words,
            text=text,
            limit=limit,
            most=wishes.most_atoms(tables, text, limit),
        )

    @property
    def group(self) -> int:
        """Digits of the widest letter: a run of digits is cut into such groups, from its left."""
        return int(self.digits[:, 1].max())

    @property
    def cuts(self) -> list[int]:
        """Digits of a coordinate behind each of its letters."""
        decimals = self.text.coord_decimals
        return [min(k, decimals) for k in range(self.group, decimals + self.group, self.group)]

    @property
    def beginnings(self) -> Int[np.ndarray, "columns"]:
        """Where the beginnings of a coordinate of so many digits start in `State.ways`; those of others lie at 0."""
        starts = np.zeros(POINTED + 10, np.int32)
        for before, cut in zip(self.cuts, self.cuts[1:], strict=False):
            starts[cut] = starts[before] + 10**before
        return starts

    def limits(self, constraints: Constraints = Constraints()) -> Limits:  # noqa: B008
        """The constraints as arrays. Raises UserError if no crystal can meet them, or none that is sure to fit."""
        return wishes.limits(constraints, self.text, self.most, self.limit)

    def start(self, limits: Limits) -> State:
        """Before the first token; `limits` has a leading axis of slots."""
        slots = len(limits.low)
        zero = jnp.zeros(slots, jnp.int32)
        width = max(len(GROUPS) + 1, sum(10**cut for cut in self.cuts))
        return State(
            field=zero,
            value=zero,
            column=zero,
            ways=jnp.zeros((slots, width), jnp.int8),
            may_follow=jnp.asarray(limits.wish.first),
            node=zero + LINE,
            composition=Composition.none(limits.wish),
            sites=Sites.none(slots),
            orbits=Orbits.begun(limits.wish.kept),
            lattice=Lattice.none(slots),
            limits=limits,
        )

    def advance(self, state: State, letter: Int[Array, "slots"]) -> State:
        """After one more letter, which was allowed."""
        numbers = len(self.digits)
        digit = letter < numbers
        read, width = jnp.asarray(self.digits)[jnp.where(digit, letter, 0)].T
        letter = letter - numbers
        space, newline, symbol = letter == SPACE, letter == NEWLINE, letter >= SYMBOLS
        part, ends = space | symbol, space | newline  # of a word; a number
        field, word = state.field, self._word(state)
        named = (field == ELEMENT) & (word != NO_WORD) & space
        counted = (field == COUNT) & (ends | symbol)
        chosen = (field == GROUP) & newline
        symbol_written = (field == SYMBOL) & (word == state.element) & part
        located = (field == POSITION) & (word != NO_WORD) & ends
        measured = (field == COORDINATE) & ends
        begins = (located | measured) & space  # a coordinate
        placed = (located | measured) & newline
        parameter = (field == PARAMETER) & ends

        kept = state.limits.wish.kept
        composition = state.composition.named(named, word).appended(counted, state.value, kept)
        sites = state.sites.begun(chosen, state.value, composition, kept)
        orbits = state.orbits.located(located, sites.group, word - len(ELEMENTS)).measured(measured, state.value)
        given = sites.due > 0
        sites = sites.with_orbit(placed, orbits.letter, composition, kept)
        more = jnp.where(sites.left + sites.due > 0, SYMBOL, PARAMETER)
        root = jnp.select([field == COUNT, symbol_written], [SPACED, LETTER], state.node)
        child = jnp.asarray(self.words.child)[root, jnp.where(symbol, letter - SYMBOLS + 1, 0)].astype(jnp.int32)
        column = jnp.where(letter == POINT, POINTED, state.column + width)
        return state.replace(
            field=jnp.select(
                [named, counted & newline, counted, symbol_written, begins, chosen | placed],
                [COUNT, GROUP, ELEMENT, POSITION, COORDINATE, more],
                field,
            ),
            value=jnp.select([digit, letter == POINT], [power_of_ten(width) * state.value + read, state.value], 0),
            column=jnp.where(digit | (letter == POINT), column, 0),
            ways=self._next_ways(state, composition, sites.group, orbits, named, counted & newline, begins),
            may_follow=jnp.where(counted, self._ways(state), state.may_follow),
            node=jnp.where(newline, LINE, jnp.where(part, child, state.node)),
            composition=composition,
            sites=sites,
            orbits=orbits.appended(placed & ~given),
            lattice=state.lattice.after(parameter, sites.group, state.value),
        )

    def allowed(self, state: State) -> Bool[Array, "slots letters"]:
        """Letters that may come next."""
        field, word, wish = state.field, self._word(state), state.limits.wish
        ways = self._ways(state)
        digits, point, complete = self._parameter(state)
        digits = jnp.where((field == PARAMETER)[:, None], digits, self._digits(state))
        last = (ways & LAST > 0) & (field != PARAMETER)

        elements = reach.elements(wish, state.composition, jnp.where(field == COUNT, ways, state.may_follow))
        elements &= ((field == ELEMENT) | (field == COUNT))[:, None]
        due = (np.arange(len(ELEMENTS)) == state.element[:, None]) & (field == SYMBOL)[:, None]
        symbol_written = (field == SYMBOL) & (word == state.element)
        letters, _ = self._given(state)
        letters = (
            jnp.where((state.sites.due > 0)[:, None], letters, state.sites.letters())
            & ((field == POSITION) | symbol_written)[:, None]
        )
        wanted = jnp.concatenate([elements | (due & ~symbol_written[:, None]), letters], axis=1)
        root = jnp.select([field == COUNT, symbol_written], [SPACED, LETTER], state.node)
        words = self.words.next(root, wanted) & ((field <= COUNT) | (field == SYMBOL) | (field == POSITION))[:, None]
        named = jnp.take_along_axis(wanted, word[:, None], axis=1)[:, 0]  # a whole word, which may end
        free = jnp.asarray(KindTables.build().free)[state.sites.group, jnp.maximum(word - len(ELEMENTS), 0)] != 0
        located, coordinate = named & (field == POSITION), last & (field == COORDINATE)
        end = complete & state.lattice.last(state.sites.group)
        single = [
            point,
            words[:, 0]
            | (named & (field == ELEMENT))
            | (located & free)
            | (coordinate & (state.orbits.free != 0))
            | (complete & ~end),
            (last & (field < SYMBOL)) | (located & ~free) | (coordinate & (state.orbits.free == 0)),
            end,
        ]
        return jnp.concatenate([digits, *(x[:, None] for x in single), words[:, 1:]], axis=1)

    def composing(self, state: State) -> Bool[Array, "slots"]:
        """Whether the composition is being written."""
        return state.field <= COUNT

    def composition(self, state: State) -> tuple[Int32[Array, "slots most"], Int32[Array, "slots most"]]:
        """Atomic numbers, 0 behind the last, and atoms in the primitive cell."""
        elements = jnp.asarray(ORDER)[state.composition.elements.astype(jnp.int32)]
        return elements, state.composition.atoms.astype(jnp.int32)

    def _word(self, state: State) -> Int32[Array, "slots"]:
        """That is complete."""
        return jnp.asarray(self.words.complete, jnp.int32)[state.node]

    def _parameter(
        self, state: State
    ) -> tuple[Bool[Array, "slots numbers"], Bool[Array, "slots"], Bool[Array, "slots"]]:
        """Of a lattice parameter: which digits may come next, whether the point may, and whether the number may end."""
        here, group = state.field == PARAMETER, state.sites.group
        decimals = jnp.where(
            state.lattice.field(group) < lattice.ALPHA, self.text.length_decimals, self.text.angle_decimals
        )
        bounds = state.lattice.bounds(group, state.limits.low, state.limits.high, self.text.angle_decimals)
        digits, point, complete = next_digits(self.digits, state.value, state.column, decimals, *bounds)
        return digits, here & point, here & complete

    def _digits(self, state: State) -> Bool[Array, "slots numbers"]:
        """Of a number of a set: which digits may come next."""
        read, width = self.digits.T
        column = state.column[:, None] + width
        value = state.value[:, None] * power_of_ten(width) + read
        coordinate = (state.field == COORDINATE)[:, None]
        cut = jnp.asarray(np.isin(np.arange(len(self.beginnings)), self.cuts))[column]
        whole = (state.column % self.group == 0)[:, None] & (value >= power_of_ten(column - 1)) & (value <= len(GROUPS))
        at = jnp.where(coordinate, jnp.asarray(self.beginnings)[column], 0) + value
        found = jnp.take_along_axis(state.ways, jnp.clip(at, 0, state.ways.shape[1] - 1), axis=1) != 0
        number = coordinate | ((state.field == COUNT) | (state.field == GROUP))[:, None]
        return number & found & jnp.where(coordinate, cut, whole)

    def _ways(self, state: State) -> Int32[Array, "slots"]:
        """What may follow the number of a set that is being written, as it stands."""
        at = jnp.where(state.field == COORDINATE, jnp.asarray(self.beginnings)[state.column], 0) + state.value
        at = jnp.clip(at, 0, state.ways.shape[1] - 1)
        ways = jnp.take_along_axis(state.ways, at[:, None], axis=1)[:, 0].astype(jnp.int32)
        return jnp.where(state.column > 0, ways, 0)

    def _next_ways(
        self,
        state: State,
        composition: Composition,
        group: Int32[Array, "slots"],
        orbits: Orbits,
        count: Bool[Array, "slots"],
        number: Bool[Array, "slots"],
        coordinate: Bool[Array, "slots"],
    ) -> Int8[Array, "slots beginnings"]:
        """`State.ways` where a count, the number of a group, or a coordinate begins."""
        wish, size = state.limits.wish, state.ways.shape[1]
        counts = reach.counts(wish, composition, count)
        counts = jnp.pad(counts, [(0, 0), (0, len(GROUPS) - MOST_ATOMS)])
        whole = jnp.where(count[:, None], counts, LAST * reach.groups(wish, composition))
        leads = (whole > 0).astype(jnp.float32) @ self._leads > 0
        whole = jnp.pad(whole + MORE * leads, [(0, 0), (0, size - len(GROUPS) - 1)])
        decimals, slots = self.text.coord_decimals, len(count)
        _, point = self._given(state)
        given = jnp.arange(10**decimals) == jnp.take_along_axis(point, orbits.axis[:, None], axis=1)
        full = jnp.where((state.sites.due > 0)[:, None], given, ~blocked(orbits, group, decimals, coordinate))
        parts = [full.reshape(slots, 10**cut, -1).any(-1) * (LAST if cut == decimals else MORE) for cut in self.cuts]
        some = jnp.concatenate(parts, axis=1)
        some = jnp.pad(some, [(0, 0), (0, size - some.shape[1])])
        ways = jnp.where((count | number)[:, None], whole, some).astype(jnp.int8)
        return jnp.where((count | number | coordinate)[:, None], ways, state.ways)

    def _given(self, state: State) -> tuple[Bool[Array, "slots 27"], Int16[Array, "slots 3"]]:
        """Letter and coordinates of the next kept orbit, where one is to come."""
        kept = state.limits.wish.kept
        at = jnp.minimum(state.sites.given, kept.letters.shape[1] - 1)[:, None]
        letter = jnp.take_along_axis(kept.letters, at, axis=1)
        return letter == np.arange(len(LETTERS)), jnp.take_along_axis(kept.points, at[..., None], axis=1)[:, 0]

    @property
    def _leads(self) -> Float32[np.ndarray, "231 231"]:
        """From whole numbers to their beginnings, where letters may be cut."""
        leads = np.zeros((len(GROUPS) + 1, len(GROUPS) + 1), np.float32)
        for number in GROUPS:
            for cut in range(self.group, len(str(number)), self.group):
                leads[number, int(str(number)[:cut])] = 1
        return leads
