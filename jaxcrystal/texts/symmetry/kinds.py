"""What compositions a space group can hold: of 230 groups there are 42 kinds.

An orbit on a position without free coordinates lies there once; on all others as many lie as there are atoms for. So
what a group can hold follows from the atoms of its orbits in the primitive cell alone:

    225    a, b: 1 atom each    c: 2    d: 6    other positions: sums of 6 and 8
    kind   1 twice, 2 once, 6, 8        d too is a sum of 6 and 8: to use it or not changes nothing that is possible

Which of the positions that lie there once are taken, as far as it matters, is a *state* of a kind, one of at most 24:
a number whose digits count them, by their atoms. The tables say from which state to which one the atoms of an element
lead. Device and host read the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from jaxtyping import Bool, Int, Int8, UInt32

from jaxcrystal.crystals.wyckoff import GROUPS, LETTERS, group

MOST_ATOMS = 64  #: in a primitive cell that a text describes
MOST_ELEMENTS = 10
WORDS = 2  #: of 32 bits, one for each number of atoms from 1 on


@dataclass(frozen=True)
class Kind:
    """The groups that can hold the same compositions."""

    once: tuple[tuple[int, int], ...]  #: atoms, and how many positions of so many lie there once
    often: tuple[int, ...]  #: atoms of orbits that may come any number of times, none a sum of others

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """By how much the state grows with a position of each of `once`."""
        return tuple(int(np.prod([n + 1 for _, n in self.once[:i]], dtype=int)) for i in range(len(self.once)))

    @cached_property
    def taken(self) -> Int[np.ndarray, "states once"]:
        """How many positions of each of `once` are taken in each state."""
        states = np.arange(int(np.prod([n + 1 for _, n in self.once], dtype=int)))
        digits = [states // stride % (n + 1) for stride, (_, n) in zip(self.strides, self.once, strict=True)]
        return np.stack(digits, axis=1) if digits else np.zeros((1, 0), int)

    def sums(self, most: int) -> Int[np.ndarray, "atoms"]:
        """The most orbits of `often` that so many atoms, up to `most`, can be; -1 for none at all."""
        found = np.full(most + 1, -1)
        found[0] = 0
        for atoms in range(1, most + 1):
            before = [found[atoms - step] for step in self.often if step <= atoms and found[atoms - step] >= 0]
            found[atoms] = max(before, default=-2) + 1
        return found

    def orbits(self, most: int) -> Int[np.ndarray, "atoms states states"]:
        """The most orbits that so many atoms, up to `most`, can be that lead from a state to another; -1: none does."""
        new = self.taken - self.taken[:, None]
        atoms = new @ np.array([atoms for atoms, _ in self.once], int)
        left = np.arange(most + 1)[:, None, None] - atoms
        possible = (new >= 0).all(-1) & (left >= 0)
        sums = np.where(possible, self.sums(most)[np.where(possible, left, 0)], -1)
        return np.where(sums >= 0, sums + new.sum(-1), -1)

    def holds(self, counts: Sequence[int], most: int = MOST_ATOMS, state: int = 0) -> bool:
        """Whether a crystal can have so many atoms, up to `most`, of each of its elements, from a state on."""
        if max(counts) > most or min(counts) < 0:
            return False
        leads = _leads(self, most)
        states = np.arange(len(self.taken)) == state
        for count in counts:
            states = (states[:, None] & leads[count]).any(0)
        return bool(states.any())


@cache
def most_orbits(kind: Kind, most: int, state: int = 0) -> Int[np.ndarray, "atoms"]:
    """Of a crystal of so many atoms, up to `most`, from a state on; -1: there is none."""
    return kind.orbits(most)[:, state].max(-1)


@cache
def _leads(kind: Kind, most: int) -> Bool[np.ndarray, "atoms states states"]:
    return kind.orbits(most) >= 0


@cache
def kind_of(number: int) -> Kind:
    """Of a space group."""
    here = group(number)
    atoms = {position.letter: position.multiplicity // here.centring for position in here.positions}
    often: tuple[int, ...] = ()
    for step in sorted({atoms[position.letter] for position in here.positions if position.reusable}):
        if Kind((), often).sums(step)[step] < 0:
            often += (step,)
    sums = Kind((), often).sums(MOST_ATOMS)
    once = Counter(atoms[p.letter] for p in here.positions if not p.reusable and sums[atoms[p.letter]] < 0)
    return Kind(tuple(sorted(once.items())), often)


@cache
def kinds() -> tuple[Kind, ...]:
    """All 42."""
    found = {kind_of(number) for number in GROUPS}
    return tuple(sorted(found, key=lambda kind: (len(kind.taken), kind.often, kind.once)))


@dataclass(frozen=True, eq=False)
class KindTables:
    """The kinds, as the device reads them. A set of states is a word, with a bit for each."""

    of: Int8[np.ndarray, "231"]  #: kind of each space group
    placed: UInt32[np.ndarray, "atoms states kinds"]  #: the states that an element of so many atoms leads to
    shared: UInt32[np.ndarray, "elements words states kinds"]  #: numbers of atoms that so many elements can share
    atoms: Int8[np.ndarray, "231 27"]  #: of an orbit, by group and letter; 0: there is none
    free: Int8[np.ndarray, "231 27"]  #: its free coordinates: 1 for x, 2 for y, 4 for z
    stride: Int8[np.ndarray, "231 27"]  #: by how much an orbit makes the state grow

    @classmethod
    @cache
    def build(cls) -> KindTables:
        """The same for all tokenizers and formats."""
        most = max(len(kind.taken) for kind in kinds())
        placed = np.zeros((MOST_ATOMS + 1, most, len(kinds())), np.uint32)
        shared = np.zeros((MOST_ELEMENTS + 1, WORDS, most, len(kinds())), np.uint32)
        bit = np.uint32(1) << np.arange(32, dtype=np.uint32)
        for i, kind in enumerate(kinds()):
            orbits = kind.orbits(MOST_ATOMS)
            states = len(kind.taken)
            placed[:, :states, i] = np.where(orbits >= 0, bit[:states], 0).sum(-1)
            sites = orbits.max(-1)[1:].reshape(WORDS, 32, states)
            for elements in range(MOST_ELEMENTS + 1):
                shared[elements, :, :states, i] = np.where(sites >= elements, bit[:, None], 0).sum(1)
        atoms, free, stride = np.zeros((3, len(GROUPS) + 1, len(LETTERS)), np.int8)
        for number in GROUPS:
            kind = kind_of(number)
            strides = dict(zip([atoms for atoms, _ in kind.once], kind.strides, strict=True))
            for letter, position in enumerate(group(number).positions):
                atoms[number, letter] = size = position.multiplicity // group(number).centring
                free[number, letter] = position.free @ [1, 2, 4]
                stride[number, letter] = 0 if position.reusable else strides.get(size, 0)
        index = {kind: i for i, kind in enumerate(kinds())}
        of = np.array([0, *(index[kind_of(number)] for number in GROUPS)], np.int8)
        return cls(of, placed, shared, atoms, free, stride)
