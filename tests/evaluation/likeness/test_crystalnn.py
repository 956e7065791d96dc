"""Voronoi cells whose faces are known in closed form, and neighbours against pymatgen's CrystalNN."""

import numpy as np
import pytest
from pymatgen.analysis.local_env import CrystalNN
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.evaluation.likeness.crystalnn import NoNeighbours, neighbourhoods, voronoi_faces

FCC = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.0), ["Cu"], [[0, 0, 0]])
BCC = Structure.from_spacegroup("Im-3m", Lattice.cubic(4.0), ["Fe"], [[0, 0, 0]])
CUBIC = Structure(Lattice.cubic(3.0), ["Po"], [[0, 0, 0]])


def large(structure):
    """Faces of the first atom that are more than a rounding error, as (solid angle, area), the largest first."""
    faces = voronoi_faces(structure)
    mine = (faces.atom == 0) & (faces.area > 1e-6)
    return sorted(zip(faces.solid_angle[mine], faces.area[mine], strict=True), reverse=True)


def test_a_cube_a_rhombic_dodecahedron_and_a_truncated_octahedron():
    assert large(CUBIC) == pytest.approx([pytest.approx((4 * np.pi / 6, 9.0))] * 6)
    # Rhombs with diagonals a/√2 and a/2.
    assert large(FCC) == pytest.approx([pytest.approx((4 * np.pi / 12, 4 * 4 / (4 * 2**0.5)))] * 12)
    hexagons, squares = large(BCC)[:8], large(BCC)[8:]
    edge = 4.0 / (2 * 2**0.5)
    assert [area for _, area in hexagons] == pytest.approx([3 * 3**0.5 / 2 * edge**2] * 8)
    assert [area for _, area in squares] == pytest.approx([edge**2] * 6)


def test_cells_fill_space_and_faces_fill_the_sphere():
    generator = np.random.default_rng(3)
    for _ in range(20):
        angles = generator.uniform(65, 115, 3)
        lattice = Lattice.from_parameters(*generator.uniform(3, 6, 3), *angles)
        structure = Structure(lattice, ["Na"] * 4, generator.random((4, 3)))
        faces = voronoi_faces(structure)
        assert np.bincount(faces.atom, faces.solid_angle) == pytest.approx(np.full(4, 4 * np.pi))
        heights = np.linalg.norm(faces.vector, axis=1) / 2
        assert (faces.area * heights).sum() / 3 == pytest.approx(structure.volume)


@pytest.mark.filterwarnings("ignore")
def test_neighbours_and_likelihoods_equal_pymatgens():
    layered = Structure(  # open within 7 Å: the sphere has to grow
        Lattice.hexagonal(3.2, 30.0), ["Mo", "S", "S"], [[0, 0, 0.5], [1 / 3, 2 / 3, 0.55], [1 / 3, 2 / 3, 0.45]]
    )
    helium = Structure(Lattice.cubic(4.0), ["He", "Li"], [[0, 0, 0], [0.5, 0.5, 0.5]])  # no electronegativity
    arms = np.array([[1, 0.1, 0], [-1, 0.05, 0.1], [0, 1, 0.1], [0.1, -1, 0], [0, 0.1, 1], [0.05, 0, -1]]) * 1.56 + 6
    molecule = Structure(Lattice.cubic(12.0), "SFFFFFF", [[6] * 3, *arms], coords_are_cartesian=True)  # open outwards
    chosen = [layered, helium, molecule, *(entry.crystal.to_structure() for entry in embedded()[::400])]
    assert len(chosen) > 8
    for structure in chosen:
        for atom, found in enumerate(neighbourhoods(structure)):
            expected = CrystalNN().get_nn_data(structure, atom)
            known = {n: share for n, share in expected.cn_weights.items() if n}
            assert found.likelihood == pytest.approx(known, abs=1e-9), structure.formula
            assert len(found.vectors) == len(expected.all_nninfo) == len(found.weights)
            theirs = [np.linalg.norm(x["site"].coords - structure[atom].coords) for x in expected.all_nninfo]
            assert sorted(np.linalg.norm(found.vectors, axis=1)) == pytest.approx(sorted(theirs))


def test_atoms_without_neighbours_have_the_likelihood_of_none():
    lonely = Structure(Lattice.cubic(6.0), ["Na"], [[0, 0, 0]])  # 6 Å is beyond 2 · 1.66 + 1 Å
    (found,) = neighbourhoods(lonely)
    assert found.likelihood == {} and len(found.vectors) == 0


def test_what_has_no_neighbours_says_why():
    twice = Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]])
    with pytest.raises(NoNeighbours, match=r"the Voronoi cell of atom 0 \(Na\) is open or empty"):
        neighbourhoods(twice)
    crowded = Structure(Lattice.from_parameters(0.3, 0.6, 0.6, 90, 90, 90), ["Na"], [[0, 0, 0]])
    with pytest.raises(NoNeighbours, match="about 13303 atoms lie within 7 Å; at most 10000 are taken"):
        neighbourhoods(crowded)
    heavy = Structure(Lattice.cubic(4.0), ["Og", "O", "Es"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]])
    with pytest.raises(NoNeighbours, match="no radius of Es, Og is known"):
        neighbourhoods(heavy)
