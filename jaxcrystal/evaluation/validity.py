"""Could this be a crystal at all? Two quick tests, before any energy is computed.

Structural validity looks at distances and volume, compositional validity at charges: is there a choice of one
oxidation state for each element that is neutral and in which every cation is less electronegative than every anion?
Both as CDVAE defines them (arXiv 2110.06197, section 5.1); `protocols.py` holds the limits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from jaxcrystal.crystals.crystal import Composition
from jaxcrystal.evaluation.protocols import OXIDATION_STATES, Protocol

if TYPE_CHECKING:
    from pymatgen.core import Structure


@dataclass(frozen=True)
class Verdict:
    """The outcome of one test, and why it failed."""

    valid: bool
    reason: str = ""


def structural(structure: Structure, protocol: Protocol) -> Verdict:
    """Whether the atoms keep their distance (Å) and the cell has a volume (Å³)."""
    if structure.volume < protocol.min_volume:
        return Verdict(False, f"the cell's volume is {structure.volume:.3g} Å³, below {protocol.min_volume:g}")
    distances = structure.distance_matrix + np.diag(np.full(len(structure), np.inf))
    if distances.min() < protocol.min_distance:
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        return too_close(structure, i, j, distances.min(), protocol.min_distance)
    if protocol.min_radius_share:
        return _radii(structure, protocol)
    return Verdict(True)


def _radii(structure: Structure, protocol: Protocol) -> Verdict:
    """Distances of all periodic pairs, an atom and its own images included, against covalent radii (Cordero 2008)."""
    from ase.data import covalent_radii

    # A cell that repeats within 0.5 Å would give neighbours by the million; it is settled here.
    shortest = min(structure.lattice.get_lll_reduced_lattice().abc)
    if shortest < protocol.min_distance:
        return Verdict(False, f"an atom is {shortest:.2f} Å from its own image, below {protocol.min_distance:g}")
    radii = covalent_radii[list(structure.atomic_numbers)]
    reach = max(protocol.min_distance, 2 * protocol.min_radius_share * radii.max())
    i, j, _, distance = structure.get_neighbor_list(reach)
    limit = np.maximum(protocol.min_radius_share * (radii[i] + radii[j]), protocol.min_distance)
    if (distance < limit).any():
        worst = np.argmin(distance - limit)
        return too_close(structure, i[worst], j[worst], distance[worst], limit[worst])
    return Verdict(True)


def too_close(structure: Structure, i: int, j: int, distance: float, limit: float) -> Verdict:
    """That two atoms are nearer than `limit` Å."""
    symbols = [site.specie.symbol for site in structure]
    return Verdict(False, f"{symbols[i]} and {symbols[j]} are {distance:.2f} Å apart, below {limit:.2f}")


def compositional(composition: Composition, protocol: Protocol) -> Verdict:
    """Whether the elements of a reduced composition could balance their charges."""
    return _compositional(composition, protocol.oxidation_states)


@cache
def _compositional(counts: Composition, states_set: str) -> Verdict:
    elements = [(chemistry(symbol, states_set), count) for symbol, count in counts]
    if len(elements) == 1 or all(element.metal for element, _ in elements):
        return Verdict(True)
    unknown = [element.symbol for element, _ in elements if not element.states]
    if unknown:
        return Verdict(False, f"{states_set} has no oxidation state of {', '.join(unknown)}")
    charges = [[count * state for state in element.states] for element, count in elements]
    if not neutral(charges):
        return Verdict(False, "no combination of oxidation states is neutral")
    # Pauling's test asks that every cation be less electronegative than every anion. That is: some threshold parts
    # the elements that may be positive from those that may be negative. Trying each threshold replaces the product
    # of all states, and gives the same answer.
    known = {element.electronegativity for element, _ in elements if element.electronegativity is not None}
    for threshold in {0.0} | known:  # 0 lets all of them be anions, of cations whose electronegativity is missing
        allowed = [
            [charge for charge in states if _passes(element.electronegativity, charge, threshold)]
            for (element, _), states in zip(elements, charges, strict=True)
        ]
        if neutral(allowed):
            return Verdict(True)
    return Verdict(False, "every neutral combination puts a cation above an anion in electronegativity")


def _passes(electronegativity: float | None, charge: int, threshold: float) -> bool:
    """Whether an element may carry a charge when those up to `threshold` are the cations."""
    if electronegativity is None or charge == 0:
        return True
    return charge > 0 if electronegativity <= threshold else charge < 0


def neutral(charges: Iterable[list[int]]) -> bool:
    """Whether one number of each list can be chosen so that they sum to zero."""
    sums = {0}
    for states in charges:
        sums = {total + charge for total in sums for charge in states}
    return 0 in sums


@dataclass(frozen=True)
class _Chemistry:
    symbol: str
    metal: bool
    electronegativity: float | None  # Pauling's scale
    states: tuple[int, ...]


@cache
def chemistry(symbol: str, states_set: str) -> _Chemistry:
    """What smact knows of an element; `states_set` is one of OXIDATION_STATES."""
    import smact

    try:
        element = smact.Element(symbol)
    except KeyError:  # smact knows the elements up to lawrencium
        return _Chemistry(symbol, False, None, ())
    states = getattr(element, f"oxidation_states_{OXIDATION_STATES[states_set]}") or ()
    return _Chemistry(symbol, symbol in smact.metals, element.pauling_eneg, tuple(states))
