"""Formulas that are not to be drawn, as the device looks them up.

Of a formula in smallest whole numbers n_z there are two sums, Σ n_z a_z and Σ n_z b_z modulo 2³², of random odd
numbers. The first, which no two known formulas share, finds the place; the second must be the same there. Of 10¹⁴ new
formulas, one is taken for one of 30,000 known.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int32, UInt32

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.crystals.formulas import read_formula, reduced

DIVISORS = np.arange(1, 65)  #: of numbers of atoms


@struct.dataclass
class FormulaTable:
    """At least one formula."""

    first: UInt32[Array, "formulas"]  #: rising
    second: UInt32[Array, "formulas"]
    numbers: UInt32[Array, "2 elements"]  #: a and b, by atomic number; 0 of none

    @classmethod
    def of(cls, formulas: Sequence[str]) -> FormulaTable:
        """Raises UserError for what is no formula."""
        counts = np.zeros((len(formulas), len(ELEMENTS)), np.uint32)
        for row, formula in enumerate(formulas):
            for symbol, atoms in reduced(read_formula(formula)).items():
                counts[row, ATOMIC_NUMBER[symbol]] = atoms
        counts = np.unique(counts, axis=0)
        seed = 0
        while True:
            numbers = np.random.default_rng(seed).integers(2**32, size=(2, len(ELEMENTS)), dtype=np.uint32) | 1
            numbers[:, 0] = 0
            first, second = ((counts * row).sum(1, dtype=np.uint32) for row in numbers)
            if len(np.unique(first)) == len(counts):
                order = np.argsort(first)
                return cls(first[order], second[order], numbers)
            seed += 1

    def contains(self, elements: Int32[Array, "slots most"], atoms: Int32[Array, "slots most"]) -> Bool[Array, "slots"]:
        """Whether a composition has one of the formulas; `elements` are atomic numbers, 0 behind the last."""
        divides = (atoms[:, None] % DIVISORS[:, None] == 0).all(-1)
        unit = atoms // (divides * DIVISORS).max(1, keepdims=True)
        numbers = jnp.asarray(self.numbers)[:, elements]
        first, second = (unit.astype(jnp.uint32) * numbers).sum(-1, dtype=jnp.uint32)
        known = jnp.asarray(self.first)
        place = jnp.minimum(jnp.searchsorted(known, first), len(known) - 1)
        return (known[place] == first) & (jnp.asarray(self.second)[place] == second)
