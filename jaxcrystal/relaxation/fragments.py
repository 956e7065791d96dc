"""Atoms and molecules that nothing holds in the crystal: pieces without a neighbour.

Two atoms are neighbours if they are no farther apart than their van der Waals radii (Alvarez, Dalton Trans. 42, 8617,
2013) and `GAP`, and no farther than `REACH`. Neighbours of neighbours are one piece. A piece that comes back to an
image of itself is a chain, a layer or a framework; one that does not is an atom or a molecule in empty space. A
potential has an energy for it, that of a gas, which says nothing about a crystal. In molecular crystals and in alkali
metals each atom has neighbours.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from jaxtyping import Float, Int

from jaxcrystal.relaxation.neighbours import pairs_within
from jaxcrystal.relaxation.systems import Systems

#: Å between the van der Waals spheres of atoms, from which on they are no neighbours.
GAP = 1.0

#: Å; as far as CHGNet sees. Atoms of caesium metal are 5.3 Å apart.
REACH = 6.0

#: Å, of elements without a known van der Waals radius: as large as a lanthanide's.
UNKNOWN_RADIUS = 3.0


def isolated(systems: Systems) -> str:
    """What is isolated in one crystal, in words, such as `2 x O2`; empty if each atom is held by others."""
    from ase.data import chemical_symbols
    from ase.data.vdw_alvarez import vdw_radii
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    radii = np.nan_to_num(np.asarray(vdw_radii, float), nan=UNKNOWN_RADIUS)[systems.numbers]
    try:
        near = pairs_within(systems.positions, systems.frac_coords, systems.cells[0], REACH)
    except ValueError:
        return ""  # atoms lie on top of each other
    shift = near.image @ systems.cells[0]
    distance = np.linalg.norm(systems.positions[near.second] + shift - systems.positions[near.first], axis=1)
    held = distance <= radii[near.first] + radii[near.second] + GAP
    first, second, image = near.first[held], near.second[held], near.image[held]
    atoms = len(systems.numbers)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(atoms, atoms))
    pieces, piece = connected_components(graph, directed=False)
    extended = np.zeros(pieces, dtype=bool)
    extended[piece[first[_closes_on_an_image(atoms, first, second, image)]]] = True
    if extended.all():
        return ""
    formulas = Counter()
    for alone in np.flatnonzero(~extended):
        counts = Counter(chemical_symbols[number] for number in systems.numbers[piece == alone])
        formulas["".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in sorted(counts.items()))] += 1
    return ", ".join(f"{n} x {formula}" for formula, n in sorted(formulas.items()))


def _closes_on_an_image(
    atoms: int, first: Int[np.ndarray, "pairs"], second: Int[np.ndarray, "pairs"], image: Float[np.ndarray, "pairs 3"]
) -> np.ndarray:
    """Which pairs disagree with every choice of one cell for each atom of a piece.

    If a piece has no periodic image among its neighbours, cells t with t_first - t_second = image exist for all of
    its pairs; least squares finds them, by the Laplacian of the graph. Else some pair is left over.
    """
    laplacian, right = np.zeros((atoms, atoms)), np.zeros((atoms, 3))
    for one, other, sign in ((first, second, 1.0), (second, first, -1.0)):
        np.add.at(laplacian, (one, one), 1.0)
        np.add.at(laplacian, (one, other), -1.0)
        np.add.at(right, one, sign * image)
    cells = np.linalg.pinv(laplacian, hermitian=True) @ right
    return np.abs(cells[first] - cells[second] - image).max(axis=1, initial=0.0) > 1e-6
