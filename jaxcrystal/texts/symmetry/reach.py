"""Which compositions, groups and letters leave a way to the end: on the device, exactly.

For every kind of group (`kinds`) that a slot may still choose, a word says which states the elements so far can lead
to. An element may have n atoms if they lead to a state of some kind from which all that is still required can be placed
within the number of atoms; a group may come if its kind's word is not empty.

    T[n, s]     states that n atoms of an element lead to from state s
    shared      R atoms can be those of j elements if they can be at least j orbits: the orbits are shared out
    after[i]    states from which all atoms of the elements behind the i-th can be placed; an orbit of m atoms of the
                i-th, of which r are left, may come if T[r - m, s'] meets them, s' being the state that it leads to

Orbits that are kept (`kept`) lie there before the search begins: it starts from the state that they lead to, n atoms
of an element place n less those that are kept of it, and an element of which some are kept needs no orbit more.

In group 1 every composition is possible, and so the search is left out where that group may be chosen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Int8, Int32, UInt32

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.texts.symmetry.kept import KeptOrbits
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS, MOST_ELEMENTS, WORDS, KindTables
from jaxcrystal.texts.symmetry.listed import over_pairs

LAST, NEXT, EXTRA, MORE = 1, 2, 4, 8  #: what may follow a number: the end of its line; the element that is required
#: next; another element; more digits


@struct.dataclass
class Wish:
    """What a composition must be, of one crystal or of many slots with a leading axis. Elements stand in the order of
    formulas, from 1 on."""

    permitted: Bool[Array, "*slots 119"]
    required: Bool[Array, "*slots 119"]
    unit: Int32[Array, "*slots 119"]  #: atoms of the formula; 0 everywhere without one
    multiples: Bool[Array, "*slots 65"]  #: how many times it may be there
    num_atoms: Int32[Array, "*slots 2"]  #: least and most
    groups: Bool[Array, "*slots 231"]
    states: UInt32[Array, "*slots kinds"]  #: from which the kinds of these groups begin
    kept: KeptOrbits
    search: Bool[Array, "*slots"]  #: whether not all compositions are possible in them
    first: Int32[Array, "*slots"]  #: what may come first: NEXT, EXTRA


@struct.dataclass
class Composition:
    """Of each slot, as far as it is written."""

    last: Int32[Array, "slots"]  #: place of the last element in the order of formulas; 0 before the first
    count: Int32[Array, "slots"]  #: elements whose number of atoms is written
    elements: Int8[Array, "slots most"]
    atoms: Int8[Array, "slots most"]  #: of each element; 0 behind the last
    states: UInt32[Array, "slots kinds"]  #: that they can lead to

    @classmethod
    def none(cls, wish: Wish) -> Composition:
        slots = len(wish.search)
        zero = jnp.zeros(slots, jnp.int32)
        empty = jnp.zeros((slots, MOST_ELEMENTS), jnp.int8)
        return cls(zero, zero, empty, empty, jnp.asarray(wish.states))

    def named(self, when: Bool[Array, "slots"], element: Int32[Array, "slots"]) -> Composition:
        """With another element, whose atoms are not counted yet."""
        return self.replace(last=jnp.where(when, element, self.last))

    def appended(self, when: Bool[Array, "slots"], atoms: Int32[Array, "slots"], kept: KeptOrbits) -> Composition:
        """The last element has so many atoms."""
        free = jnp.maximum(atoms - jnp.take_along_axis(kept.atoms, self.last[:, None], axis=1)[:, 0], 0)
        here = when[:, None] & (jnp.arange(MOST_ELEMENTS) == self.count[:, None])
        return self.replace(
            count=self.count + when,
            elements=jnp.where(here, self.last[:, None].astype(jnp.int8), self.elements),
            atoms=jnp.where(here, atoms[:, None].astype(jnp.int8), self.atoms),
            states=jnp.where(when[:, None], _led_to(self.states, free), self.states),
        )


def _led_to(states: UInt32[Array, "slots kinds"], atoms: Int32[Array, "slots"]) -> UInt32[Array, "slots kinds"]:
    """The states that so many atoms of an element lead to from any of these."""
    placed = jnp.asarray(KindTables.build().placed)[atoms]  # [slots, states, kinds]
    return _joined(jnp.where(_bits(states[:, None], placed.shape[1], axis=1), placed, 0), axis=1)


def _bits(words: UInt32[Array, "*n"], number: int, axis: int) -> Bool[Array, "*m"]:
    """The first bits of each word, along an axis that is there with length 1."""
    shape = [1] * words.ndim
    shape[axis] = number
    return (words >> jnp.arange(number, dtype=jnp.uint32).reshape(shape)) & 1 > 0


def _joined(words: UInt32[Array, "*n"], axis: int) -> UInt32[Array, "*m"]:
    """All bits that any of the words has."""
    return jax.lax.reduce(words, np.uint32(0), jax.lax.bitwise_or, (axis,))


def elements(wish: Wish, composition: Composition, ways: Int[Array, "slots"]) -> Bool[Array, "slots 119"]:
    """Those that may come next, where `ways` says whether the required one, and whether others may."""
    ranks, due, _ = _ahead(wish, composition)
    extra = (ranks < due) & (ways & EXTRA > 0)[:, None] & (ranks > composition.last[:, None])
    return wish.permitted & (extra | ((ranks == due) & (ways & NEXT > 0)[:, None]))


def _ahead(
    wish: Wish, composition: Composition
) -> tuple[Int[np.ndarray, "119"], Int32[Array, "slots 1"], Int32[Array, "slots"]]:
    """Places in the order of formulas, that of the element that is required next (behind all: none), and how many are
    required."""
    ranks = np.arange(len(ELEMENTS))
    missing = wish.required & (ranks > composition.last[:, None])
    return ranks, jnp.where(missing, ranks, len(ranks)).min(1, keepdims=True), missing.sum(1)


def counts(wish: Wish, composition: Composition, when: Bool[Array, "slots"]) -> Int32[Array, "slots 65"]:
    """What may follow each number of atoms of the last element (LAST, NEXT, EXTRA; 0: it may not have so many)."""
    ranks, due, missing = _ahead(wish, composition)
    missing = missing[:, None]
    others = (wish.permitted & (ranks > composition.last[:, None]) & (ranks < due)).any(1, keepdims=True)
    others &= composition.count[:, None] + missing + 2 <= MOST_ELEMENTS
    low, high = jnp.split(wish.num_atoms, 2, axis=1)
    number = np.arange(MOST_ATOMS + 1)
    there = jnp.take_along_axis(wish.kept.atoms, composition.last[:, None], axis=1)  # of the last element
    behind = jnp.where(ranks > composition.last[:, None], wish.kept.atoms, 0)  # of those to come
    needy = missing - (behind > 0).sum(1, keepdims=True)  # elements to come that need an orbit
    after = composition.atoms.astype(jnp.int32).sum(1, keepdims=True) + behind.sum(1, keepdims=True) + number
    found = jnp.stack(
        [
            (missing == 0) & (low <= after) & (after <= high),
            (missing > 0) & (after + needy <= high),
            others & (after + needy + 1 <= high),
        ],
        axis=1,
    )
    found &= ((number > 0) & (number >= there) & _of_formula(wish, composition, number))[:, None]
    pairs = (when & wish.search)[:, None] & (composition.states != 0)
    searched = _searched(wish, composition, needy[:, 0], number - there, after, pairs)
    found &= searched | ~wish.search[:, None, None]
    return (found * jnp.array([LAST, NEXT, EXTRA])[:, None]).sum(1)


def _of_formula(wish: Wish, composition: Composition, number: Int[np.ndarray, "65"]) -> Bool[Array, "slots 65"]:
    """Numbers of atoms that are as many times the formula's as those of the first element are."""
    each = jnp.take_along_axis(wish.unit, composition.last[:, None], axis=1)
    first = jnp.take_along_axis(wish.unit, composition.elements[:, :1].astype(jnp.int32), axis=1)
    times = composition.atoms[:, :1] // jnp.maximum(first, 1)
    allowed = jnp.where(times == 0, wish.multiples, number == times)
    unit = jnp.maximum(each, 1)
    multiple = jnp.take_along_axis(allowed, number // unit, axis=1)
    return (each == 0) | ((number % unit == 0) & multiple)


def _searched(
    wish: Wish,
    composition: Composition,
    missing: Int32[Array, "slots"],
    free: Int32[Array, "slots 65"],
    after: Int32[Array, "slots 65"],
    pairs: Bool[Array, "slots kinds"],
) -> Bool[Array, "slots 3 65"]:
    """What may follow each number of atoms in some group of these kinds: the end, the required, another element.

    Of these atoms some are `free` to be placed, and so many elements to come need an orbit.
    """
    tables = KindTables.build()
    states = tables.placed.shape[1]

    def work(rows: Array, columns: Array, found: Array) -> Array:
        now = _bits(composition.states[rows, columns][None, None], states, axis=1)
        placed = jnp.asarray(tables.placed)[:, :, columns]
        led_to = _joined(jnp.where(now, placed, 0), axis=1)  # [numbers, block]
        led_to = jnp.take_along_axis(led_to, jnp.maximum(free[rows].T, 0), axis=0)
        low, high = (wish.num_atoms[rows, k] - after[rows].T for k in (0, 1))  # of atoms to come
        window = jnp.stack([_up_to(high - 32 * k) & ~_up_to(low - 1 - 32 * k) for k in range(WORDS)])
        there = _bits(led_to[None], states, axis=0)
        ways = [led_to != 0]
        for j in (0, 1):
            shared = jnp.asarray(tables.shared)[jnp.minimum(missing[rows] + j, MOST_ELEMENTS), :, :, columns]
            meets = jnp.stack([shared[:, k].T[:, None] & window[k] for k in range(WORDS)])  # [words, states, 65, block]
            none = (missing[rows] + j == 0) & (low <= 0) & (high >= 0)  # atoms, nor orbits, are to come
            ways.append((there & ((meets != 0).any(0) | none)).any(0))
        return found.at[rows].max(jnp.stack(ways).transpose(2, 0, 1), mode="drop")

    return over_pairs(pairs, work, jnp.zeros((len(pairs), 3, MOST_ATOMS + 1), bool))


def _up_to(number: Int32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """So many bits, from the first on."""
    some = (jnp.uint32(1) << jnp.clip(number, 0, 31).astype(jnp.uint32)) - 1
    return jnp.where(number >= 32, jnp.uint32(0xFFFFFFFF), some)


def groups(wish: Wish, composition: Composition) -> Bool[Array, "slots 231"]:
    """Those that hold the composition."""
    return wish.groups & (composition.states != 0)[:, KindTables.build().of]


@struct.dataclass
class Sites:
    """What is taken and what is left in the group that each slot has chosen."""

    group: Int32[Array, "slots"]
    state: Int32[Array, "slots"]
    once: UInt32[Array, "slots"]  #: letters without free coordinates that are taken, a bit each
    element: Int32[Array, "slots"]  #: of the composition, counted from 0
    left: Int32[Array, "slots"]  #: atoms of it that are to come, but for those that are kept
    due: Int32[Array, "slots"]  #: kept orbits of it that are to come
    given: Int32[Array, "slots"]  #: kept orbits that are written
    after: UInt32[Array, "slots most"]  #: states from which all behind each element can be placed

    @classmethod
    def none(cls, slots: int) -> Sites:
        zero = jnp.zeros(slots, jnp.int32)
        empty = jnp.zeros((slots, MOST_ELEMENTS), jnp.uint32)
        return cls(zero, zero, zero.astype(jnp.uint32), zero, zero, zero, zero, empty)

    def begun(
        self, when: Bool[Array, "slots"], group: Int32[Array, "slots"], composition: Composition, kept: KeptOrbits
    ) -> Sites:
        """In a group, before the first orbit."""
        tables = KindTables.build()
        kind = jnp.asarray(tables.of)[group]
        there = jnp.take_along_axis(kept.atoms, composition.elements.astype(jnp.int32), axis=1)
        free = jnp.maximum(composition.atoms - there, 0)
        placed = jnp.asarray(tables.placed)[free.T, :, kind]  # [most, slots, states]; 0 atoms lead nowhere
        bit = jnp.uint32(1) << jnp.arange(placed.shape[2], dtype=jnp.uint32)

        def before(after: Array, placed: Array) -> tuple[Array, Array]:
            return jnp.where(placed & after[:, None] != 0, bit, 0).sum(1, dtype=jnp.uint32), after

        all_states = jnp.full(len(group), 0xFFFFFFFF, jnp.uint32)
        after = jax.lax.scan(before, all_states, placed, reverse=True)[1].T
        none = Sites.none(len(group))
        left, due = _of_element(none.element, composition, kept)
        new = none.replace(group=group, state=kept.state, once=kept.once, left=left, due=due, after=after)
        return jax.tree.map(lambda x, y: jnp.where(jnp.expand_dims(when, tuple(range(1, x.ndim))), x, y), new, self)

    def letters(self) -> Bool[Array, "slots 27"]:
        """Positions that an orbit of the element may lie on."""
        tables = KindTables.build()
        atoms, free, stride = (
            jnp.asarray(x)[self.group].astype(jnp.int32) for x in (tables.atoms, tables.free, tables.stride)
        )
        left = self.left[:, None] - atoms
        kind = jnp.asarray(tables.of, jnp.int32)[self.group][:, None]
        placed = jnp.asarray(tables.placed)[jnp.maximum(left, 0), self.state[:, None] + stride, kind]
        after = jnp.take_along_axis(self.after, self.element[:, None], axis=1)
        taken = (free == 0) & _bits(self.once[:, None], free.shape[1], axis=1)
        return (atoms > 0) & (left >= 0) & ~taken & (placed & after != 0)

    def with_orbit(
        self, when: Bool[Array, "slots"], letter: Int32[Array, "slots"], composition: Composition, kept: KeptOrbits
    ) -> Sites:
        """An orbit on this position lies there; behind the last one of an element the next element is on."""
        tables = KindTables.build()
        atoms, free, stride = (
            jnp.asarray(x)[self.group, letter].astype(jnp.int32) for x in (tables.atoms, tables.free, tables.stride)
        )
        given, new = when & (self.due > 0), when & (self.due == 0)
        left, due = self.left - new * atoms, self.due - given
        over = when & (left == 0) & (due == 0)
        element = self.element + over
        next_left, next_due = _of_element(element, composition, kept)
        bit = jnp.uint32(1) << letter.astype(jnp.uint32)
        return self.replace(
            state=self.state + new * stride,
            once=jnp.where(new & (free == 0), self.once | bit, self.once),
            element=element,
            left=jnp.where(over, next_left, left),
            due=jnp.where(over, next_due, due),
            given=self.given + given,
        )


def _of_element(
    number: Int32[Array, "slots"], composition: Composition, kept: KeptOrbits
) -> tuple[Int32[Array, "slots"], Int32[Array, "slots"]]:
    """Atoms of an element of the composition that are to be placed, and how many of its orbits are kept; 0 behind the
    last."""
    at = jnp.minimum(number, MOST_ELEMENTS - 1)[:, None]
    element, atoms = (
        jnp.take_along_axis(x, at, axis=1).astype(jnp.int32) for x in (composition.elements, composition.atoms)
    )
    there = jnp.take_along_axis(kept.atoms, element, axis=1)
    due = (kept.elements == element) & (element > 0)
    inside = number < MOST_ELEMENTS
    return jnp.where(inside, (atoms - there)[:, 0], 0), jnp.where(inside, due.sum(1, dtype=jnp.int32), 0)
