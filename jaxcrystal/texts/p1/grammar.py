"""Which tokens may come next, so that every text is a crystal: the text format as an automaton, on the device.

    a ␣ b ␣ c ⏎ α ␣ β ␣ γ ⏎ ─┬─▶ symbol ⏎ x ␣ y ␣ z ─┬─▶ end of sequence
                             └───────── ⏎ ◀──────────┘

The automaton reads and writes letters, each of which is a token of the vocabulary: digits (one a letter, or groups of
up to three as LLaMA-3 has them), the point, the two separators, the end, and the tokens that symbols are made of. Three
rules decide which letters may come, and each looks ahead, so that no text runs into a wall:

  a number    its next digits may come if they can lead into the interval of the field (`intervals`). Angles close a
              cell if |α - β| < γ < min(α + β, 360° - α - β).
  a symbol    tokens lead through a tree, at whose leaves and branches elements sit: a token may come if one of the
              elements behind it may.
  an atom     may come if the smallest crystal that holds it as well, and all that is still required, has no more atoms
              than allowed and fits into the tokens that are left; the end may come once nothing is required any more.

Where sites are kept, they are the first atoms, and nothing else may come; a kept cell is an interval of one value for
each field.

All numbers are whole ones in units of the last decimal, all state is a few integers a slot. Constraints are arrays, not
constants: one compiled program serves all of them, each slot its own.

The grammar refuses what `p1.text.parse` refuses, and two things more: lengths and angles outside `Constraints`
(by default an edge shorter than any bond, or an angle within 1° of 0° or 180°), and texts that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Int32

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.texts.constraints import LONGEST, Constraints
from jaxcrystal.texts.intervals import POINTED, interval, next_digits
from jaxcrystal.texts.kept import CELL, Kept
from jaxcrystal.texts.numbers import power_of_ten
from jaxcrystal.texts.p1 import text as p1_text
from jaxcrystal.texts.parsing import ParseError
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.token_tables import TokenTables

POINT, SPACE, NEWLINE, END, SYMBOLS = range(5)  #: letters, counted from behind the digits; from SYMBOLS on symbols'
ALPHA, BETA, GAMMA, SYMBOL, X, Z = 3, 4, 5, 6, 7, 9  #: fields of a text, in its order, from a = 0


@struct.dataclass
class Limits:
    """One set of constraints as arrays, or those of many slots with a leading axis: what `Grammar.limits` gives."""

    low: Int32[Array, "*slots 10"]  #: least value of each field, in units of its last decimal
    high: Int32[Array, "*slots 10"]
    permitted: Bool[Array, "*slots 119"]  #: elements that may be written
    required: Bool[Array, "*slots 119"]
    unit: Int32[Array, "*slots 119"]  #: atoms of the formula; 0 everywhere without one
    num_atoms: Int32[Array, "*slots 2"]  #: least and most
    species: Int32[Array, "*slots kept"]  #: atomic numbers of the first atoms, where they are given; 0 behind the last
    coords: Int32[Array, "*slots kept 3"]  #: theirs, in units of the last decimal


@struct.dataclass
class State:
    """How far the text of each slot is."""

    field: Int32[Array, "slots"]  #: what is being written: 0 to 9 for a, b, c, α, β, γ, symbol, x, y, z
    value: Int32[Array, "slots"]  #: the digits of the number so far, as one number
    column: Int32[Array, "slots"]  #: of the number: its digits so far; behind the point POINTED + decimals so far
    node: Int32[Array, "slots"]  #: of the symbol: where its tokens so far lead
    angles: Int32[Array, "slots 2"]  #: α and β, in units of their last decimal, once they are written
    room: Int32[Array, "slots"]  #: tokens for all that follows the cell
    counts: Int32[Array, "slots 119"]  #: atoms so far, by atomic number
    limits: Limits  #: that the slot keeps to


@dataclass(frozen=True, eq=False)
class Grammar:
    """The automaton for one tokenizer, text format and limit of tokens. Its methods are pure.

    `allowed` says which letters may come after `start` and any number of `advance`. Whatever is chosen of them, the end
    of sequence comes at the latest as the last token of the limit, and then `p1.text.parse` reads a crystal that
    meets the slot's `Limits`. An idle slot may advance by any letter; its state means nothing until it starts again.
    """

    tokens: Int[np.ndarray, "letters"]  #: of the vocabulary
    digits: Int[np.ndarray, "numbers 2"]  #: of the first letters: what each reads as, and how many digits it has
    child: Int[np.ndarray, "nodes symbols"]  #: where a symbol's letter leads; the last node leads to no element
    element: Int[np.ndarray, "nodes"]  #: atomic number of the symbol that is complete there, or 0
    behind: Bool[np.ndarray, "nodes 119"]  #: elements that can still be reached
    atom: Int[np.ndarray, "119"]  #: tokens of an atom: symbol and coordinates, each with the separator behind
    decimals: Int[np.ndarray, "10"]  #: of each field
    text: TextFormat  #: with `paper_compat` a coordinate may be 1, as the original's rounding writes it
    limit: int  #: tokens of a text, the end of sequence included

    @classmethod
    def build(cls, tables: TokenTables, text: TextFormat, limit: int) -> Grammar:
        """For texts of at most `limit` tokens.

        The tokens of `tables.digits` are those of all numbers of one digit, then, if the vocabulary groups digits, of
        two and of three, as far as it has them: a run of digits is spelled in the largest groups, from its left.
        """
        symbols, child, element = _tree(tables.elements)
        behind = element[:, None] == np.arange(len(ELEMENTS))
        behind[:, 0] = False
        for node in reversed(range(len(child))):  # children come after their parent; the last node is its own child
            behind[node] |= behind[child[node]].any(0)
        decimals = np.repeat([text.length_decimals, text.angle_decimals, 0, text.coord_decimals], [3, 3, 1, 3])
        digits = np.array([(value, k) for k in range(1, tables.group + 1) for value in range(10**k)])
        coordinate = 1 + 1 + -(-text.coord_decimals // tables.group)
        return cls(
            tokens=np.array([*tables.digits, tables.point, tables.space, tables.newline, tables.eos, *symbols]),
            digits=digits,
            child=child,
            element=element,
            behind=behind,
            atom=(tables.elements != EMPTY).sum(1) + 1 + 3 * (coordinate + 1),
            decimals=decimals,
            text=text,
            limit=limit,
        )

    @property
    def group(self) -> int:
        """Digits of the widest letter: a run of digits is cut into such groups, from its left."""
        return int(self.digits[:, 1].max())

    def limits(self, constraints: Constraints = Constraints()) -> Limits:  # noqa: B008
        """The constraints as arrays. Raises UserError if no cell or no crystal that meets them is sure to fit."""
        if constraints.space_groups is not None:
            raise UserError(
                "the P1 text does not state its space group; leave space_groups out, or take a model that states it"
            )
        length, angle, coord = (int(self.decimals[field]) for field in (0, ALPHA, X))
        a = interval("lengths", constraints.lengths, length, below=LONGEST)
        b = interval("angles", constraints.angles, angle, below=180)
        x = (0, 10**coord - (not self.text.paper_compat))
        low, high = np.array([a] * 3 + [b] * 3 + [(0, 0)] + [x] * 3, np.int32).T
        kept = constraints.kept or Kept()
        if kept.cell is not None:
            low[:SYMBOL] = high[:SYMBOL] = self._cell(kept.cell, low, high)
        species, coords = self._sites(kept)
        limits = Limits(
            low=low,
            high=high,
            permitted=_is_among(constraints.permitted),
            required=_is_among(constraints.required),
            unit=np.array([constraints.unit[symbol] for symbol in ELEMENTS], np.int32),
            # No atom is shorter than a token.
            num_atoms=np.array([constraints.num_atoms[0], constraints.num_atoms[1] or self.limit], np.int32),
            species=species,
            coords=coords,
        )
        self._check_fit(limits, constraints)
        return limits

    def _cell(
        self, cell: Sequence[float], low: Int[np.ndarray, "10"], high: Int[np.ndarray, "10"]
    ) -> Int[np.ndarray, "6"]:
        """A kept cell as it is written. Raises UserError where that is none, or not within the intervals."""
        lines = p1_text.write(Crystal(cell[:3], cell[3:], [1], [[0, 0, 0]]), self.text)
        try:
            p1_text.parse(lines)
        except ParseError as error:
            raise UserError(f"the cell cannot be kept: with the model's decimals it is none, {error}") from None
        values = _whole(lines.split("\n")[:2])
        for field, value in enumerate(values):
            if not low[field] <= value <= high[field]:
                least, most = (x[field] / 10 ** self.decimals[field] for x in (low, high))
                raise UserError(
                    f"the cell cannot be kept: its {CELL[field]} is {cell[field]:g}, not within {least:g} and {most:g}"
                )
        return values

    def _sites(self, kept: Kept) -> tuple[Int[np.ndarray, "kept"], Int[np.ndarray, "kept 3"]]:
        """Kept atoms as they are written, in arrays of as many as a text can have."""
        most = max(1, self.limit // int(self.atom[1:].min()))
        if len(kept.sites) > most:
            raise UserError(f"{len(kept.sites)} sites are kept, but max_new_tokens is {self.limit}, which holds {most}")
        species, coords = np.zeros(most, np.int32), np.zeros((most, 3), np.int32)
        for i, site in enumerate(kept.sites):
            species[i] = ATOMIC_NUMBER[site.symbol]
            atom = Crystal([1, 1, 1], [90, 90, 90], species[i : i + 1], [site.frac_coords])
            coords[i] = _whole(p1_text.write(atom, self.text).split("\n")[3:])
        return species, coords

    def _check_fit(self, limits: Limits, constraints: Constraints) -> None:
        turn = 360 * 10 ** self.decimals[ALPHA]
        if limits.low[ALPHA:SYMBOL].sum() >= turn:
            raise UserError(f"no cell has three angles of {constraints.angles[0]} or more, as the model writes them")
        whole = np.array([len(str(x)) for x in limits.high[:SYMBOL] // 10 ** self.decimals[:SYMBOL]])
        decimals = self.decimals[:SYMBOL]
        cell = int((-(-whole // self.group) - (-decimals // self.group) + (decimals > 0) + 1).sum())
        (low, high), unit = limits.num_atoms.tolist(), limits.unit
        kept = np.bincount(limits.species[limits.species > 0], minlength=len(ELEMENTS))
        missing = limits.required & (kept == 0)
        if size := unit.sum():
            units = max(-(-low // size), (-(-kept // np.maximum(unit, 1))).max())
            atoms, tokens = units * size, units * (unit @ self.atom)
            what = f"{atoms} atoms of {constraints.formula}"
        else:
            atoms = max(low, kept.sum() + missing.sum())
            filler = (atoms - kept.sum() - missing.sum()) * self.atom[limits.permitted].min()
            tokens = kept @ self.atom + self.atom[missing].sum() + filler
            what = "a crystal of one atom" if atoms == 1 else f"a crystal of {atoms} atoms"
        if atoms > high and kept.any():
            raise UserError(f"with the {kept.sum()} sites that are kept it is {what}, but num_atoms is at most {high}")
        if cell + tokens > self.limit:
            raise UserError(
                f"{what} can take {cell + tokens} tokens, but max_new_tokens is {self.limit}"
                + (f", which holds about {max(0, (self.limit - cell) * atoms // tokens)} atoms" if atoms > 1 else "")
            )

    def start(self, limits: Limits) -> State:
        """Before the first token; `limits` has a leading axis of slots."""
        slots = len(limits.low)
        zero = jnp.zeros(slots, jnp.int32)
        return State(
            field=zero,
            value=zero,
            column=zero,
            node=zero,
            angles=jnp.zeros((slots, 2), jnp.int32),
            room=jnp.full(slots, self.limit, jnp.int32),
            counts=jnp.zeros((slots, len(ELEMENTS)), jnp.int32),
            limits=limits,
        )

    def advance(self, state: State, letter: Int[Array, "slots"]) -> State:
        """After one more letter, which was allowed."""
        numbers = len(self.digits)
        digit = letter < numbers
        read, width = jnp.asarray(self.digits)[jnp.where(digit, letter, 0)].T
        letter = letter - numbers
        point, symbol, ends = letter == POINT, letter >= SYMBOLS, (letter == SPACE) | (letter == NEWLINE)
        in_symbol, in_cell = state.field == SYMBOL, state.field < SYMBOL
        child = jnp.asarray(self.child)[state.node, jnp.clip(letter - SYMBOLS, 0, self.child.shape[1] - 1)]
        written = jnp.where(ends & in_symbol, jnp.asarray(self.element)[state.node], 0)
        angle = jnp.stack([ends & (state.field == ALPHA), ends & (state.field == BETA)], axis=1)
        return state.replace(
            field=jnp.where(ends, jnp.where(state.field == Z, SYMBOL, state.field + 1), state.field),
            value=jnp.where(ends, 0, jnp.where(digit, power_of_ten(width) * state.value + read, state.value)),
            column=jnp.where(ends, 0, jnp.where(point, POINTED, state.column + jnp.where(digit, width, 0))),
            node=jnp.where(ends, 0, jnp.where(symbol, child, state.node)),
            angles=jnp.where(angle, state.value[:, None], state.angles),
            room=state.room - in_cell,
            counts=state.counts + ((written > 0)[:, None] & (written[:, None] == jnp.arange(len(ELEMENTS)))),
        )

    def composing(self, state: State) -> Bool[Array, "slots"]:
        """Nowhere: elements stand between the atoms' coordinates."""
        return jnp.zeros(state.field.shape, bool)

    def composition(self, state: State) -> NoReturn:
        """Never asked for."""
        raise NotImplementedError("a P1 text does not begin with its composition")

    def allowed(self, state: State) -> Bool[Array, "slots letters"]:
        """Letters that may come next."""
        number = state.field != SYMBOL
        digits, point, complete = self._number(state)
        atoms = self._atoms(state)
        symbols = jnp.take_along_axis(
            (atoms.astype(jnp.float32) @ self.behind.T.astype(np.float32)) > 0,
            jnp.asarray(self.child)[state.node],
            axis=1,
        )
        element = jnp.asarray(self.element)[state.node]
        named = jnp.take_along_axis(atoms, element[:, None], axis=1)[:, 0]  # a whole symbol; number 0 may never come
        last_of_line = (state.field == 2) | (state.field == GAMMA) | (state.field == Z)
        more = last_of_line & ((state.field == 2) | atoms.any(-1))
        single = [
            number & point,
            number & complete & ~last_of_line,
            jnp.where(number, complete & more, named),
            complete & (state.field == Z) & self._satisfied(state),
        ]
        letters = [number[:, None] & digits, *(x[:, None] for x in single), ~number[:, None] & symbols]
        return jnp.concatenate(letters, axis=1)

    def _number(self, state: State) -> tuple[Bool[Array, "slots numbers"], Bool[Array, "slots"], Bool[Array, "slots"]]:
        """Which digits may come next, whether the point may, and whether the number may end."""
        decimals = jnp.asarray(self.decimals)[state.field]
        return next_digits(self.digits, state.value, state.column, decimals, *self._bounds(state))

    def _bounds(self, state: State) -> tuple[Int[Array, "slots"], Int[Array, "slots"]]:
        """The interval of the field, where the angles so far leave one to those that follow."""
        bounds = (state.limits.low, state.limits.high)
        low, high = (jnp.take_along_axis(x, state.field[:, None], axis=1)[:, 0] for x in bounds)
        turn, beta_or_more, gamma_or_more = 360 * 10 ** int(self.decimals[ALPHA]), *state.limits.low[:, BETA:SYMBOL].T
        alpha, beta = state.angles.T
        most = jnp.select(
            [state.field == ALPHA, state.field == BETA, state.field == GAMMA],
            [
                turn - 1 - beta_or_more - gamma_or_more,
                turn - 1 - gamma_or_more - alpha,
                jnp.minimum(alpha + beta, turn - alpha - beta) - 1,
            ],
            high,
        )
        low = jnp.where(state.field == GAMMA, jnp.maximum(low, jnp.abs(alpha - beta) + 1), low)
        species, coords = self._given(state, state.counts.sum(-1) - 1)  # the symbol of this atom is counted
        axis = jnp.clip(state.field - X, 0, 2)[:, None]
        written = jnp.take_along_axis(coords, axis, axis=1)[:, 0]
        given = (state.field >= X) & (species > 0)
        return jnp.where(given, written, low), jnp.where(given, written, jnp.minimum(high, most))

    def _given(self, state: State, atom: Int[Array, "slots"]) -> tuple[Int32[Array, "slots"], Int32[Array, "slots 3"]]:
        """Element and coordinates of an atom, counted from 0, that is kept; the element is 0 where none is."""
        kept = state.limits.species.shape[1]
        at = jnp.clip(atom, 0, kept - 1)
        species = jnp.take_along_axis(state.limits.species, at[:, None], axis=1)[:, 0]
        coords = jnp.take_along_axis(state.limits.coords, at[:, None, None], axis=1)[:, 0]
        return jnp.where(atom < kept, species, 0), coords

    def _atoms(self, state: State) -> Bool[Array, "slots 119"]:
        """Elements of which one more atom leaves a way to the end."""
        counts, room = state.counts, state.room[:, None]
        permitted, required, unit = state.limits.permitted, state.limits.required, state.limits.unit
        low, high = jnp.split(state.limits.num_atoms, 2, axis=1)
        missing = required & (counts == 0)
        atoms = (counts + missing).sum(-1, keepdims=True) + ~missing
        tokens = ((counts + missing) @ self.atom)[:, None] + ~missing * self.atom
        filler = jnp.maximum(low - atoms, 0)
        shortest = jnp.where(permitted, self.atom, self.limit).min(-1, keepdims=True)
        free = (atoms + filler <= high) & (tokens + filler * shortest <= room)
        size = unit.sum(-1, keepdims=True)
        per_unit = jnp.maximum(unit, 1)
        begun = (-(-counts // per_unit)).max(-1, keepdims=True)
        units = jnp.maximum(jnp.maximum(begun, counts // per_unit + 1), -(-low // jnp.maximum(size, 1)))
        bound = (units * size <= high) & (units * (unit @ self.atom)[:, None] <= room)
        usual = permitted & jnp.where(size > 0, bound, free)
        given, _ = self._given(state, counts.sum(-1))
        return jnp.where(given[:, None] > 0, np.arange(len(ELEMENTS)) == given[:, None], usual)

    def _satisfied(self, state: State) -> Bool[Array, "slots"]:
        """Nothing is required any more."""
        required, unit, low = state.limits.required, state.limits.unit, state.limits.num_atoms[:, :1]
        atoms, size = (x.sum(-1, keepdims=True) for x in (state.counts, unit))
        whole = (state.counts * size == atoms * unit).all(-1) & (atoms[:, 0] % jnp.maximum(size[:, 0], 1) == 0)
        complete = jnp.where(size[:, 0] > 0, whole, ~(required & (state.counts == 0)).any(-1))
        return complete & (atoms >= jnp.maximum(low, (state.limits.species > 0).sum(-1, keepdims=True)))[:, 0]


def _whole(lines: Iterable[str]) -> Int[np.ndarray, "numbers"]:
    """Numbers of some lines in units of their last decimals."""
    return np.array([int(number.replace(".", "")) for line in lines for number in line.split(" ")], np.int32)


def _is_among(symbols: Iterable[str]) -> Bool[np.ndarray, "119"]:
    return np.isin(np.arange(len(ELEMENTS)), [ATOMIC_NUMBER[symbol] for symbol in symbols])


def _tree(
    elements: Int[np.ndarray, "119 width"],
) -> tuple[list[int], Int[np.ndarray, "nodes symbols"], Int[np.ndarray, "nodes"]]:
    """The tokens of symbols, each once; where each leads from every node; which element is complete at a node."""
    words = [tuple(int(t) for t in row if t != EMPTY) for row in elements]
    symbols = sorted({token for word in words for token in word})
    nodes = sorted({word[:n] for word in words for n in range(len(word) + 1)}, key=len)
    place = {word: node for node, word in enumerate(nodes)}
    child = np.full((len(nodes) + 1, len(symbols)), len(nodes), np.int32)
    element = np.zeros(len(nodes) + 1, np.int32)
    for word, node in place.items():
        if word:
            child[place[word[:-1]], symbols.index(word[-1])] = node
    for number, word in enumerate(words):
        if word:
            element[place[word]] = number
    return symbols, child, element
