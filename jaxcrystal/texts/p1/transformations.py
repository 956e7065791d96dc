"""What leaves a crystal the same and changes its P1 text: another origin, order of atoms, or basis of the lattice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Int

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetric import vectors


def translated(crystal: Crystal, random: np.random.Generator) -> Crystal:
    """With all atoms shifted by one vector, uniform in [0, 1)³."""
    return Crystal(crystal.lengths, crystal.angles, crystal.species, crystal.frac_coords + random.random(3))


def reordered(crystal: Crystal, random: np.random.Generator) -> Crystal:
    """With its atoms in any order, all alike."""
    order = random.permutation(len(crystal))
    return Crystal(crystal.lengths, crystal.angles, crystal.species[order], crystal.frac_coords[order])


def rebased(crystal: Crystal, random: np.random.Generator) -> Crystal:
    """In another cell of the same lattice, of the same volume and hand: by any of `unimodular`, all alike."""
    matrix = random.choice(unimodular())
    inverse = np.round(np.linalg.inv(matrix))  # of whole numbers too, as the determinant is 1
    return Crystal.from_vectors(
        matrix @ vectors(crystal.lengths, crystal.angles), crystal.species, crystal.frac_coords @ inverse
    )


@cache
def unimodular() -> Int[np.ndarray, "matrices 3 3"]:
    """All 3,480 matrices of -1, 0 and 1 whose determinant is 1; rows are the new vectors in terms of the old."""
    entries = np.stack(np.meshgrid(*[[-1, 0, 1]] * 9, indexing="ij"), axis=-1).reshape(-1, 3, 3)
    return entries[np.round(np.linalg.det(entries)) == 1]


#: By name.
TRANSFORMATIONS: dict[str, Callable[[Crystal, np.random.Generator], Crystal]] = {
    "translations": translated,
    "orders": reordered,
    "cells": rebased,
}
