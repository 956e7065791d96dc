"""Who are an atom's neighbours, and how sure is that? CrystalNN (Pan et al., Inorg. Chem. 60, 1590, 2021) with its
default parameters, for all atoms of a crystal at once.

Each face of an atom's Voronoi cell belongs to a neighbour. The larger the solid angle under which the atom sees the
face, the closer the face, the larger the difference in electronegativity, the likelier is a bond: these make a weight
between 0 and 1. Every number of neighbours n then has a likelihood: the share of a quarter of the unit circle that
lies between the n-th and the (n+1)-th largest weight.

A cell needs no tessellation of its surroundings. The half-space of a neighbour at d is x·q ≤ 1 with q = 2d/|d|², and
the cell, in which all of them meet, is the polar dual of the convex hull of the points q (Grünbaum, Convex Polytopes,
section 3.4): a corner of the hull is a face of the cell, and a triangle of the hull on the plane n·q = h is the
cell's vertex n/h. Two adjoining triangles are an edge of the cell, between the faces of the two corners they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import ConvexHull, QhullError

from jaxcrystal.crystals.crystal import ELEMENTS

if TYPE_CHECKING:
    from pymatgen.core import Structure

SEARCH_RADIUS = 7.0  #: Å; atoms further away take part in a cell only if it would be open without them
MAX_NEIGHBOURS = 10_000  #: within the search radius; the densest crystals of the elements have about 250
X_DIFF_WEIGHT, X_DIFF_MAX = 3.0, 3.3  #: a weight grows by 3 √(ΔX/3.3), ΔX the difference on Pauling's scale
FULL_TO, NONE_FROM = 0.5, 1.0  #: Å beyond the sum of the radii; in between a weight falls as half a cosine
DECIMALS = 3  #: of a weight; neighbours that agree in them are one shell

_CORNERS = np.array([[1, 2], [2, 0], [0, 1]])  # of a triangle, those of the side opposite to corner 0, 1, 2


class NoNeighbours(Exception):
    """It cannot be said who an atom's neighbours are; the message says why."""


@dataclass(frozen=True)
class Neighbourhood:
    """The neighbours of one atom, from the likeliest to the least likely, and how many of them there may be."""

    vectors: Float[np.ndarray, "n 3"]  #: from the atom to each neighbour, Å
    weights: Float[np.ndarray, "n"]  #: of each bond, between 0 and 1; they fall
    likelihood: dict[int, float]  #: of a number of neighbours; what is missing to 1 is that of none


def neighbourhoods(structure: Structure) -> list[Neighbourhood]:
    """The neighbourhood of every atom. Raises NoNeighbours if an atom has no Voronoi cell, or no known radius."""
    numbers = np.array(structure.atomic_numbers)
    electronegativity, radius = _elements()
    unknown = np.unique(numbers[np.isnan(radius[numbers])])
    if len(unknown):
        raise NoNeighbours(f"no radius of {', '.join(ELEMENTS[z] for z in unknown)} is known")
    expected = len(structure) / structure.volume * 4 / 3 * np.pi * SEARCH_RADIUS**3
    if expected > MAX_NEIGHBOURS:
        raise NoNeighbours(
            f"about {expected:.0f} atoms lie within {SEARCH_RADIUS:g} Å; at most {MAX_NEIGHBOURS} are taken"
        )
    faces = voronoi_faces(structure)
    at, other = numbers[faces.atom], numbers[faces.neighbour]
    # An element without an electronegativity, a noble gas, prefers no neighbour to another.
    difference = np.nan_to_num(np.abs(electronegativity[at] - electronegativity[other]))
    weight = faces.solid_angle**2 / faces.area * (1 + X_DIFF_WEIGHT * np.sqrt(difference / X_DIFF_MAX))
    largest = np.zeros(len(structure))
    np.maximum.at(largest, faces.atom, weight)
    beyond = np.linalg.norm(faces.vector, axis=1) - radius[at] - radius[other]
    fall = np.clip((beyond - FULL_TO) / (NONE_FROM - FULL_TO), 0, 1)
    weight = weight / largest[faces.atom] * (1 + np.cos(np.pi * fall)) / 2
    found = []
    for atom in range(len(structure)):
        mine = np.flatnonzero(faces.atom == atom)
        mine = mine[np.argsort(-weight[mine], kind="stable")]
        rounded = np.round(weight[mine], DECIMALS)
        n = np.count_nonzero(rounded)
        found.append(Neighbourhood(faces.vector[mine[:n]], weight[mine[:n]], _likelihood(rounded[:n])))
    return found


def _likelihood(weights: Float[np.ndarray, "n"]) -> dict[int, float]:
    """The likelihood of each number of neighbours that has one, from their weights, the largest first."""
    last = np.flatnonzero(np.diff(weights, append=0.0))  # of each shell
    bounds = np.append(weights[last], 0.0)
    area = (bounds * np.sqrt(1 - bounds**2) + np.arcsin(bounds)) * 2 / np.pi  # of the circle, from 0
    return {int(n): float(share) for n, share in zip(last + 1, -np.diff(area), strict=True)}


@dataclass(frozen=True)
class Faces:
    """The faces of the Voronoi cells of a crystal's atoms, those of one atom after those of another."""

    atom: Int[np.ndarray, "faces"]
    neighbour: Int[np.ndarray, "faces"]  #: the atom of which the one beyond the face is an image
    vector: Float[np.ndarray, "faces 3"]  #: from the one to the other, Å
    solid_angle: Float[np.ndarray, "faces"]  #: under which the atom sees the face, sr
    area: Float[np.ndarray, "faces"]  #: Å²


def voronoi_faces(structure: Structure) -> Faces:
    """The faces of all cells, each measured as the triangles between its centre and its edges.

    Raises NoNeighbours if an atom has no bounded cell.
    """
    atom, neighbour, vector = _surroundings(structure, SEARCH_RADIUS)
    starts = np.searchsorted(atom, np.arange(len(structure) + 1))
    atoms, neighbours, vectors, faces, ends = [], [], [], [], []
    count = 0
    for i, part in enumerate(map(slice, starts, starts[1:])):
        found = (neighbour[part], vector[part])
        edges = _cell(vector[part])
        if edges is None:
            *found, edges = _wider(structure, i)
        atoms.append(np.full(len(found[0]), i))
        neighbours.append(found[0])
        vectors.append(found[1])
        faces.append(edges[0] + count)
        ends.append(edges[1])
        count += len(found[0])
    face, (a, b) = np.concatenate(faces), np.concatenate(ends, axis=1)
    sides = np.bincount(face, minlength=count)

    def total(values: Float[np.ndarray, "edges"]) -> Float[np.ndarray, "faces"]:
        return np.bincount(face, values, count)

    middle = np.stack([total(x) for x in (a + b).T], axis=1) / (2 * np.maximum(sides, 1))[:, None]
    c = middle[face]
    area = total(np.linalg.norm(np.cross(a - c, b - c), axis=1) / 2)
    # van Oosterom & Strackee, IEEE Trans. Biomed. Eng. 30, 125 (1983)
    la, lb, lc = (np.linalg.norm(x, axis=1) for x in (a, b, c))
    volume = np.abs((c * np.cross(a, b)).sum(1))
    projected = la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb
    solid_angle = total(2 * np.arctan2(volume, projected))
    real = np.flatnonzero((sides > 0) & (area > 0))
    parts = (np.concatenate(atoms), np.concatenate(neighbours), np.concatenate(vectors), solid_angle, area)
    return Faces(*(part[real] for part in parts))


Pairs = tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"], Float[np.ndarray, "pairs 3"]]


def _surroundings(structure: Structure, radius: float, atom: int | None = None) -> Pairs:
    """All pairs (or those of one atom) closer than `radius` Å: the atom, its neighbour, the vector between them (Å)."""
    sites = None if atom is None else [structure[atom]]
    i, j, image, _ = structure.get_neighbor_list(radius, sites=sites, exclude_self=False)
    if atom is not None:
        i = np.full(len(j), atom)
    kept = np.flatnonzero((i != j) | image.any(axis=1))
    kept = kept[np.argsort(i[kept], kind="stable")]
    i, j = i[kept], j[kept]
    vector = (structure.frac_coords[j] + image[kept] - structure.frac_coords[i]) @ structure.lattice.matrix
    return i, j, vector


Edges = tuple[Int[np.ndarray, "edges"], Float[np.ndarray, "2 edges 3"]]


def _cell(vectors: Float[np.ndarray, "n 3"]) -> Edges | None:
    """The edges of the cell around 0: the face that each bounds, as the row of `vectors`, and its two ends (Å).

    An edge is there twice, once for each face. None if the cell is open.
    """
    squared = (vectors**2).sum(1)
    if len(vectors) < 4 or squared.min() == 0:
        return None
    try:
        hull = ConvexHull(2 * vectors / squared[:, None])
    except QhullError:  # all neighbours in a plane
        return None
    normals, heights = hull.equations[:, :3], -hull.equations[:, 3:]
    if heights.min() <= 1e-9:  # 0 is not inside the hull: a vertex of the cell is at infinity
        return None
    vertices = normals / heights
    one, other = np.repeat(np.arange(len(vertices)), 3), hull.neighbors.ravel()
    once = one < other
    sides = hull.simplices[:, _CORNERS].reshape(-1, 2)[once]
    ends = np.stack([vertices[one[once]], vertices[other[once]]])
    return sides.ravel(), np.repeat(ends, 2, axis=1)


def _wider(structure: Structure, atom: int) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n 3"], Edges]:
    """Neighbours, vectors and edges of an atom's cell from a larger sphere, which doubles up to the cell's diagonal."""
    diagonals = np.array([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]]) @ structure.lattice.matrix
    limit = np.linalg.norm(diagonals, axis=1).max() + 0.01
    radius = SEARCH_RADIUS
    while radius < limit:
        radius = min(2 * radius, limit + 0.001)
        _, neighbours, vectors = _surroundings(structure, radius, atom)
        edges = _cell(vectors)
        if edges is not None:
            return neighbours, vectors, edges
    raise NoNeighbours(f"the Voronoi cell of atom {atom} ({structure[atom].specie.symbol}) is open or empty")


@cache
def _elements() -> tuple[Float[np.ndarray, "elements"], Float[np.ndarray, "elements"]]:
    """By atomic number: electronegativity on Pauling's scale, covalent radius in Å (Cordero, Dalton Trans. 2008, 2832).

    NaN where none is known: of noble gases, and of what is heavier than curium.
    """
    import warnings

    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
    from pymatgen.core import Element

    electronegativity, radius = np.full((2, len(ELEMENTS)), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each noble gas
        for z, symbol in enumerate(ELEMENTS[1:], start=1):
            electronegativity[z] = Element(symbol).X
            radius[z] = CovalentRadius.radius.get(symbol, np.nan)
    return electronegativity, radius
