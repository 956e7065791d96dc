"""Which crystals are the same crystal: pymatgen's StructureMatcher within each reduced composition."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from jaxcrystal.crystals.crystal import Composition, Crystal, reduced_composition

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher

#: The field's tolerances: of lengths (fraction), of sites (in units of (V/N)^⅓), of angles (degrees).
LENGTH_TOLERANCE, SITE_TOLERANCE, ANGLE_TOLERANCE = 0.2, 0.3, 5.0


def matcher() -> StructureMatcher:
    """StructureMatcher with the tolerances above; it reduces to primitive cells and scales volumes to be equal."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(ltol=LENGTH_TOLERANCE, stol=SITE_TOLERANCE, angle_tol=ANGLE_TOLERANCE)


def group_ids(crystals: Sequence[Crystal | None]) -> list[int | None]:
    """The group of each crystal, numbered from 0 in order of first appearance; None stays None.

    A crystal joins the first group whose first member it matches, so each is in exactly one group, and the number of
    groups is the number of distinct crystals.
    """
    leader: dict[int, int] = {}
    same = matcher()
    for members in _progress(_by_composition(crystals).values(), "uniqueness"):
        if len(members) == 1:
            leader[members[0]] = members[0]
            continue
        structures = [crystals[i].to_structure() for i in members]
        index = {id(structure): i for structure, i in zip(structures, members, strict=True)}
        for group in same.group_structures(structures):
            indices = [index[id(structure)] for structure in group]
            leader |= dict.fromkeys(indices, min(indices))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(leader[i], len(numbers)) if i in leader else None for i in range(len(crystals))]


def matches(crystals: Sequence[Crystal | None], training: Sequence[Crystal | None]) -> list[int | None]:
    """For each crystal the index of the first training crystal that it matches, or None."""
    candidates = _by_composition(training)
    same = matcher()
    found: list[int | None] = [None] * len(crystals)
    for composition, members in _progress(_by_composition(crystals).items(), "novelty"):
        known = [(i, training[i].to_structure()) for i in candidates.get(composition, ())]
        for member in members if known else ():
            structure = crystals[member].to_structure()
            found[member] = next((i for i, other in known if same.fit(structure, other)), None)
    return found


def _by_composition(crystals: Sequence[Crystal | None]) -> dict[Composition, list[int]]:
    members = defaultdict(list)
    for i, crystal in enumerate(crystals):
        if crystal is not None:
            members[reduced_composition(crystal.symbols)].append(i)
    return members


def _progress(items, label: str):
    return tqdm(items, desc=label, unit="formula", mininterval=0.5, disable=not items)
