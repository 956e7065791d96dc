"""Random crystals of any space group."""

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
