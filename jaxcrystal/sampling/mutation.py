"""The paper's mutation experiment (arXiv 2402.04379, section 5): one element of a known crystal becomes another.

Which one it becomes is chosen in three ways, side by side for the same element of the same crystal:

    language    drawn by what a model that infills gives to each element in its place
    radius      any, as likely as another, whose ions are as large (`crystals.radii`)
    random      any, as likely as another

Only elements come in that the crystal lacks, and whose volume is known, so that all three are rescaled alike
(`crystals.substitution`); and of a crystal's elements one changes for which there are others with ions as large, if
there is any, so that all three can. What attempt I of seed S changes is decided by the two alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal
from jaxcrystal.crystals.substitution import Pool, volumes
from jaxcrystal.sampling.templates import NO_SWAP, Substitution, made

KINDS = ("language", "radius", "random")


@dataclass(frozen=True)
class Mutation:
    """What one attempt changes."""

    index: int
    template: int  #: number of the crystal
    element: str  #: that becomes another


def mutations(crystals: Sequence[Crystal], num: int, pool: Pool, seed: int) -> list[Mutation]:
    """`num` of each crystal: one of its elements, as likely as another, of those that the pool has others for."""
    found = []
    for index in range(num * len(crystals)):
        elements = sorted(set(crystals[index // num].symbols))
        there = [symbol for symbol in elements if set(pool.get(symbol, ())) - set(elements)] or elements
        chosen = np.random.default_rng([seed, index]).integers(len(there))
        found.append(Mutation(index, index // num, there[chosen]))
    return found


def mutated(
    mutation: Mutation,
    name: str,
    crystal: Crystal,
    kind: str,
    pool: Pool,
    log_probabilities: Float64[np.ndarray, "118"],
    seed: int,
) -> Substitution:
    """The attempt of one kind at a mutation of a crystal called `name`; `log_probabilities` are the model's of all
    elements in the place of the one that changes, hydrogen first."""
    there = set(crystal.symbols)
    others = [symbol for symbol in volumes() if symbol not in there]
    if kind == "radius":
        others = [symbol for symbol in pool.get(mutation.element, ()) if symbol not in there]
    if not others or not there <= volumes().keys():
        return Substitution(mutation.index, seed, name, None, NO_SWAP, None)
    weights = np.ones(len(others))
    if kind == "language":
        logs = log_probabilities[[ATOMIC_NUMBER[symbol] - 1 for symbol in others]]
        weights = np.exp(logs - logs.max())
    rng = np.random.default_rng([seed, mutation.index, 1 + KINDS.index(kind)])
    swaps: Mapping[str, str] = {mutation.element: others[rng.choice(len(others), p=weights / weights.sum())]}
    return Substitution(mutation.index, seed, name, swaps, *made(crystal, swaps))
