"""An element of a crystal hidden at some of its sites.

    Fe  O  Fe  O        the crystal
    Fr  O  Fr  O        Fe hidden: Fr is written [MASK]
    Fr  O  Fe  O        the first site alone

The hidden atoms get an element that the rest of the crystal has not (`stand_in`). It depends on the atoms that are
left, and on nothing else: where the order of elements decides how a crystal is written, as in its canonical
description, the text tells nothing of what it hides.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal
from jaxcrystal.crystals.formulas import ordered


@dataclass(frozen=True, eq=False)
class Masked:
    """A crystal some of whose atoms are hidden."""

    crystal: Crystal  #: with the stand-in in their places
    stand_in: int  #: atomic number, of them alone
    element: str  #: that they were
    atoms: int  #: how many they are
    elsewhere: bool  #: whether the element stands in other places too


def hide(crystal: Crystal, atoms: Bool[np.ndarray, "atoms"]) -> Masked:
    """The crystal without these atoms' element. Raises ValueError for none, and for atoms of several elements."""
    (hidden,) = np.unique(crystal.species[atoms])
    left = {ELEMENTS[z] for z in crystal.species[~atoms]}
    here = stand_in(left)
    return Masked(
        replace(crystal, species=np.where(atoms, here, crystal.species)),
        here,
        ELEMENTS[hidden],
        int(atoms.sum()),
        ELEMENTS[hidden] in left,
    )


def stand_in(left: Collection[str]) -> int:
    """Atomic number of the first element, in the order of formulas, that is none of those that are left."""
    return ATOMIC_NUMBER[next(symbol for symbol in ordered(ELEMENTS[1:]) if symbol not in left)]
