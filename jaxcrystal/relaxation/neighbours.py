"""Which atoms of many crystals are within a cutoff of each other, quickly and again after every step.

A crystal's candidates are the pairs within cutoff + skin. They are searched once, by pymatgen, and searched again only
when a pair that is none of them could have come within the cutoff. A pair apart by r₀ is, when the cell is strained by
D and the atoms have moved by δ beside that strain,

    r = D r₀ + δ_j - δ_i,    |r| ≥ σ_min(D) |r₀| - 2 max |δ|

so that the candidates hold as long as σ_min(D) (cutoff + skin) - 2 max |δ| ≥ cutoff. From the candidates of all
crystals the pairs within the cutoff are taken at once: the edges are those of a search at each step, whatever the skin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from jaxcrystal.relaxation.systems import Edges, Systems

#: Å. The more, the rarer the search and the more candidates are looked at in each step.
SKIN = 1.0

#: Neighbours of an atom within the cutoff and skin, on average, from which on atoms lie on top of each other: an
#: element at five times its density has half as many, and the pairs of so many bonds would fill the memory.
MOST_NEIGHBOURS = 2500


@dataclass(frozen=True)
class Candidates:
    """Pairs of one crystal that are or may come within the cutoff, each once, and the crystal as it was then."""

    first: Int[np.ndarray, "pairs"]
    second: Int[np.ndarray, "pairs"]
    image: Float[np.ndarray, "pairs 3"]  #: the cell of the second atom, in lattice vectors
    frac_coords: Float[np.ndarray, "atoms 3"]
    cell: Float[np.ndarray, "3 3"]  #: Å


def candidates(systems: Systems, cutoff: float, known: Sequence[Candidates | None] | None = None) -> list[Candidates]:
    """Candidates of each crystal: those that are `known` where they hold, found anew where not.

    Raises ValueError if a crystal is so dense that its atoms lie on top of each other.
    """
    known = known or [None] * len(systems)
    frac_coords = systems.frac_coords
    starts = np.cumsum(systems.counts) - systems.counts
    spans = [slice(start, start + count) for start, count in zip(starts, systems.counts, strict=True)]
    before = [c.frac_coords if c else frac_coords[span] for c, span in zip(known, spans, strict=True)]
    cells = np.stack([c.cell if c else cell for c, cell in zip(known, systems.cells, strict=True)])
    moved = np.einsum("ai,aij->aj", frac_coords - np.concatenate(before), systems.cells[systems.system])
    farthest = np.sqrt(np.maximum.reduceat((moved**2).sum(axis=1), starts))
    squeeze = np.linalg.svd(np.linalg.inv(cells) @ systems.cells, compute_uv=False)[:, -1]
    holds = squeeze * (cutoff + SKIN) - 2 * farthest >= cutoff
    return [
        c if c and hold else pairs_within(systems.positions[span], frac_coords[span], cell, cutoff + SKIN)
        for c, hold, span, cell in zip(known, holds, spans, systems.cells, strict=True)
    ]


def pairs_within(
    positions: Float[np.ndarray, "atoms 3"],
    frac_coords: Float[np.ndarray, "atoms 3"],
    cell: Float[np.ndarray, "3 3"],
    radius: float,
) -> Candidates:
    """Pairs of atoms of one crystal that are no farther apart than `radius` Å, each once.

    Raises ValueError if the crystal is so dense that its atoms lie on top of each other.
    """
    from pymatgen.optimization.neighbors import find_points_in_spheres

    expected = len(positions) / abs(np.linalg.det(cell)) * 4 / 3 * math.pi * radius**3
    if not expected <= MOST_NEIGHBOURS:
        raise ValueError(f"an atom has about {expected:.3g} others within {radius:g} Å: atoms lie on top of each other")
    points = np.ascontiguousarray(positions)
    pbc, lattice = np.ones(3, dtype=np.int64), np.ascontiguousarray(cell)
    first, second, image, _ = find_points_in_spheres(points, points, r=radius, pbc=pbc, lattice=lattice, tol=1e-8)
    # Each pair is found twice, and an atom finds itself: of (i, j, image) and (j, i, -image) one is kept.
    base = 2 * np.abs(image).max(initial=0) + 1
    half = (first < second) | ((first == second) & (image @ [base**2, base, 1] > 0))
    return Candidates(first[half], second[half], image[half], frac_coords, cell)


def edges(systems: Systems, found: Sequence[Candidates], cutoff: float) -> Edges:
    """The edges of all crystals within `cutoff` Å, of candidates that hold."""
    starts = np.cumsum(systems.counts) - systems.counts
    offset = np.repeat(starts, [len(f.first) for f in found])
    first = np.concatenate([f.first for f in found]) + offset
    second = np.concatenate([f.second for f in found]) + offset
    image = np.concatenate([f.image for f in found])
    shift = np.einsum("pi,pij->pj", image, systems.cells[systems.system[first]])
    vector = systems.positions[second] + shift - systems.positions[first]
    length = np.sqrt((vector**2).sum(axis=1))
    near = length <= cutoff
    first, second, image, vector, length = first[near], second[near], image[near], vector[near], length[near]
    order = np.argsort(np.concatenate([first, second]), kind="stable")
    bonds = len(first)
    place = np.empty_like(order)
    place[order] = np.arange(2 * bonds)
    return Edges(
        np.concatenate([first, second])[order],
        np.concatenate([second, first])[order],
        np.concatenate([image, -image])[order],
        np.concatenate([vector, -vector])[order],
        np.concatenate([length, length])[order],
        order % max(bonds, 1),
        place[:bonds],
    )
