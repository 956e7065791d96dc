"""Is it a crystal by LeMat-GenBench's rules (Betala et al., arXiv 2512.04562, and its code of 2025)?

- charges: it is a metal or could be one, or oxidation states balance. A metal has a metallicity (smact's score) above
  0.7, or no pair of elements of which one forms anions, so that all its bond valences are 0. Oxidation states of one
  element differ by 1 at most. They are those of the protocol's table; else bond valences, which pymatgen assigns within
  its tolerance; else all that pymatgen knows of, cations no more electronegative than anions.
- distances: two atoms are at least half of (their radii + 0.7 Å) apart.
- plausibility: density, atoms in a volume, and cell are within limits, and a space group is found.

What the sums of oxidation states can be is known without trying each atom's, so that a formula of hundreds of atoms
takes no longer than a small one, and equal electronegativities are an answer and no NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from jaxcrystal.crystals.crystal import Composition, Crystal, reduced_composition
from jaxcrystal.crystals.symmetry import space_group
from jaxcrystal.evaluation.validity import Verdict, chemistry, neutral, too_close

if TYPE_CHECKING:
    from pymatgen.core import Structure

METALLIC = 0.7  #: smact's score, above which a composition is a metal
SHARE, BESIDE = 0.5, 0.7  #: of the radii, and what is added to them, in Å
RADIUS = 1.0  #: Å, of an element without one
DENSITIES = (0.01, 25.0)  #: g/cm³
CROWDING = (0.00001, 0.5)  #: atoms per Å³
LENGTHS = (1.0, 100.0)  #: Å
VOLUME = 1.0  #: Å³, which a cell exceeds
SYMPREC = 0.01  #: Å, of the space group
UNKNOWN_HHI = 10.0  #: the largest, of an element without one


@dataclass(frozen=True)
class Judged:
    """What the rules say of one crystal, and what the set's numbers are made of."""

    distances: Verdict
    plausibility: Verdict
    charges: Verdict
    spacegroup: int | None  #: within `SYMPREC`
    packing: float | None  #: share of the cell within covalent radii, at most 1; None where one is not known
    hhi_production: float  #: Herfindahl-Hirschman index of the elements' production, 0 to 10, mean over atoms
    hhi_reserve: float  #: of their reserves


def judged(crystal: Crystal, structure: Structure, states_set: str) -> Judged:
    """The rules' verdicts on a crystal, which `structure` is too; `states_set` is one of OXIDATION_STATES."""
    group = space_group(crystal, SYMPREC)
    near, sane = distances(structure), plausibility(structure, group)
    production, reserve = hhi(reduced_composition(crystal.symbols))
    return Judged(
        near,
        sane,
        charges(structure, states_set, bonds=near.valid and sane.valid),
        group,
        packing(structure),
        production,
        reserve,
    )


def distances(structure: Structure) -> Verdict:
    """Whether each pair of atoms, the nearest images, keeps half of their radii (pymatgen's, Slater's) and 0.7 Å."""
    radii = np.array([_radius(site.specie.symbol) for site in structure])
    limits = SHARE * (BESIDE + radii[:, None] + radii)
    first, second = np.triu_indices(len(structure), 1)
    found, limit = structure.distance_matrix[first, second], limits[first, second]
    if (found < limit).any():
        worst = np.argmin(found - limit)
        return too_close(structure, first[worst], second[worst], found[worst], limit[worst])
    return Verdict(True)


def plausibility(structure: Structure, group: int | None) -> Verdict:
    """Whether densities and cell are within limits and a space group was found."""
    shortest, longest = min(structure.lattice.abc), max(structure.lattice.abc)
    crowding = len(structure) / structure.volume
    if structure.volume <= VOLUME:
        return Verdict(False, f"the cell's volume is {structure.volume:.3g} Å³, not above {VOLUME:g}")
    if not LENGTHS[0] <= shortest <= longest <= LENGTHS[1]:
        return Verdict(False, f"the cell's edges are {shortest:.3g} to {longest:.3g} Å, beyond 1 to 100")
    if not DENSITIES[0] <= structure.density <= DENSITIES[1]:
        return Verdict(False, f"the density is {structure.density:.3g} g/cm³, beyond 0.01 to 25")
    if not CROWDING[0] <= crowding <= CROWDING[1]:
        return Verdict(False, f"{crowding:.3g} atoms fill an Å³, beyond 0.00001 to 0.5")
    if group is None:
        return Verdict(False, f"no space group is found within {SYMPREC:g} Å")
    return Verdict(True)


def charges(structure: Structure, states_set: str, *, bonds: bool) -> Verdict:
    """Whether it is a metal, or oxidation states balance, by its composition or, if they are to be asked, by its bonds.

    Of atoms on top of each other there are bonds without end, which say nothing.
    """
    composition = reduced_composition(site.specie.symbol for site in structure)
    if _balances(composition, states_set) or (bonds and _bonds_balance(structure)):
        return Verdict(True)
    return Verdict(False, "no metal, and no oxidation states balance")


@cache
def _balances(counts: Composition, states_set: str) -> bool:
    if len(counts) == 1 or not {symbol for symbol, _ in counts} & _anion_formers() or _metallicity(counts) > METALLIC:
        return True
    if neutral(_sums(chemistry(symbol, states_set).states, atoms) for symbol, atoms in counts):
        return True
    elements = [(*_pymatgens(symbol), atoms) for symbol, atoms in counts]
    return any(
        neutral(_sums([s for s in states if _in_order(s, x, threshold)], atoms) for states, x, atoms in elements)
        for threshold in {0.0} | {x for _, x, _ in elements if x == x}
    )


def _sums(states: Sequence[int], atoms: int) -> list[int]:
    """The charges that the atoms of an element may have together: s·n, and between that and (s + 1)·n."""
    return sorted(
        {s * atoms for s in states} | {s * atoms + k for s in states if s + 1 in states for k in range(1, atoms)}
    )


def _in_order(state: int, electronegativity: float, threshold: float) -> bool:
    """Whether an element of that electronegativity may have the state where the threshold parts cations from anions.

    An element at the threshold may be either; so may one of unknown electronegativity (NaN).
    """
    return not (electronegativity > threshold if state > 0 else electronegativity < threshold)


def _bonds_balance(structure: Structure) -> bool:
    """Whether pymatgen's bond valences give each atom an oxidation state, which it does only if they balance."""
    from pymatgen.analysis.bond_valence import BVAnalyzer

    try:
        BVAnalyzer().get_valences(structure)
    except Exception:  # ValueError where it finds none; KeyError, of tables that lack an element
        return False
    return True


def _metallicity(counts: Composition) -> float:
    from pymatgen.core import Composition as Formula
    from smact.metallicity import metallicity_score

    try:
        return metallicity_score(Formula(dict(counts)))
    except KeyError:  # smact knows the elements up to lawrencium
        return 0.0


@cache
def _anion_formers() -> frozenset[str]:
    from pymatgen.analysis.bond_valence import ELECTRONEG

    return frozenset(element.symbol for element in ELECTRONEG)


@cache
def _pymatgens(symbol: str) -> tuple[tuple[int, ...], float]:
    """All oxidation states that pymatgen knows of, and Pauling's electronegativity, NaN where there is none."""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is NaN
        return tuple(Element(symbol).oxidation_states), float(Element(symbol).X)


@cache
def _radius(symbol: str) -> float:
    from pymatgen.core import Element

    return float(Element(symbol).atomic_radius or RADIUS)


def packing(structure: Structure) -> float | None:
    """Σ 4π/3 r³ / V with covalent radii (pymatgen's), at most 1."""
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius

    radii = [CovalentRadius.radius.get(site.specie.symbol) for site in structure]
    if None in radii:
        return None
    return min(1.0, 4 / 3 * np.pi * sum(radius**3 for radius in radii) / structure.volume)


@cache
def hhi(counts: Composition) -> tuple[float, float]:
    """Production's and reserves' index, each the mean over atoms in units of 1000 (Gaultois et al., Chem. Mater. 25,
    2911, 2013, in pymatgen's table). An element that the table lacks, hydrogen among them, has the largest there is."""
    from pymatgen.analysis.hhi import HHIModel

    known, atoms = HHIModel().symbol_hhip_hhir, sum(n for _, n in counts)
    largest = (1000 * UNKNOWN_HHI, 1000 * UNKNOWN_HHI)
    production, reserve = (sum(n * known.get(s, largest)[i] for s, n in counts) / atoms / 1000 for i in (0, 1))
    return production, reserve
