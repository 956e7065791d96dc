"""Random crystals of any space group, and what fits one, by counting."""

from functools import cache

import numpy as np

from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, cell_of
from jaxcrystal.crystals.wyckoff import SYSTEMS, group
from jaxcrystal.errors import UserError


def random_symmetric(number: int, seed: int, orbits: int = 4) -> SymmetricCrystal:
    """Random positions of a group, its general one among them, each with its own element or with one of two."""
    random = np.random.default_rng([number, seed])
    here = group(number)
    while True:
        free = SYSTEMS[here.system][0]
        parameters = [random.uniform(5, 12) if place < 3 else random.uniform(70, 110) for place in free]
        cell = cell_of(here.system, np.array(parameters))
        letters = [here.positions[-1].letter]
        for position in random.permutation(np.array(here.positions, object))[:orbits]:
            if position.reusable or position.letter not in letters:
                letters.append(position.letter)
        chosen = tuple(
            Orbit(int(random.choice([3, 8, 22])), letter, tuple(random.uniform(0, 1, 3).round(4))) for letter in letters
        )
        try:
            return SymmetricCrystal(number, cell[:3], cell[3:], chosen)
        except UserError:
            continue


def positions(number: int) -> list[tuple[int, bool]]:
    """Atoms of an orbit in the primitive cell, and whether several may lie there."""
    here = group(number)
    return [(p.multiplicity // here.centring, p.reusable) for p in here.positions]


@cache
def distinct(number: int) -> list[tuple[int, bool]]:
    """The same, with one of those that differ in nothing and may be taken again."""
    listed = positions(number)
    return [each for i, each in enumerate(listed) if not each[1] or each not in listed[:i]]


@cache
def counted(number: int, counts: tuple[int, ...], used: frozenset[int], first: int = 0) -> int:
    """The most orbits that these atoms of elements can be, position after position; -1 if there is no way."""
    if not counts[0]:
        return 0 if len(counts) == 1 else counted(number, counts[1:], used)
    best = -1
    for place, (atoms, reusable) in enumerate(distinct(number)):
        if place >= first and atoms <= counts[0] and place not in used:
            rest = (counts[0] - atoms, *counts[1:])
            found = counted(number, rest, used if reusable else used | {place}, place)
            best = max(best, found + 1 if found >= 0 else -1)
    return best
