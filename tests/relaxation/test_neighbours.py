"""Edges against pymatgen's search, for any crystal, and after steps for which candidates are kept."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from jaxcrystal.relaxation import neighbours
from jaxcrystal.relaxation.neighbours import candidates, edges
from jaxcrystal.relaxation.systems import Edges, SinglePoints, Systems

CUTOFF = 4.0


def crystals(seed: int) -> list[Structure]:
    """Up to four triclinic crystals, some with cells smaller than the cutoff, atoms outside of their cells."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rng.integers(1, 5)):
        n = int(rng.integers(1, 7))
        lattice = Lattice((10.0 * n) ** (1 / 3) * (np.eye(3) + rng.normal(0, 0.15, (3, 3))))
        found.append(Structure(lattice, ["Si"] * n, rng.uniform(-1, 2, (n, 3)), to_unit_cell=False))
    return found


def by_pymatgen(systems: Systems) -> set[tuple]:
    found, start = set(), 0
    for i, cell in enumerate(systems.cells):
        own = systems.positions[systems.system == i]
        structure = Structure(Lattice(cell), ["Si"] * len(own), own, coords_are_cartesian=True, to_unit_cell=False)
        for a, b, image, _ in zip(*structure.get_neighbor_list(CUTOFF, exclude_self=True), strict=True):
            found.add((a + start, b + start, *map(int, image)))
        start += len(own)
    return found


def as_set(found: Edges) -> set[tuple]:
    rows = zip(found.source, found.target, found.image.astype(int).tolist(), strict=True)
    return {(int(a), int(b), *image) for a, b, image in rows}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_edges_are_pymatgens_at_every_step(seed):
    rng = np.random.default_rng(seed)
    systems, known = Systems.of(crystals(seed)), None
    for _ in range(4):
        known = candidates(systems, CUTOFF, known)
        found = edges(systems, known, CUTOFF)
        assert as_set(found) == by_pymatgen(systems)
        moved = systems.positions[found.target] + np.einsum(
            "ei,eij->ej", found.image, systems.cells[systems.system[found.source]]
        )
        np.testing.assert_allclose(found.vector, moved - systems.positions[found.source], atol=1e-9)
        np.testing.assert_allclose(found.length, np.linalg.norm(found.vector, axis=1))
        strain = np.eye(3) + rng.normal(0, 0.03, (len(systems), 3, 3))
        positions = np.einsum("ai,aij->aj", systems.positions, strain[systems.system])
        systems = dataclasses.replace(
            systems,
            positions=positions + rng.normal(0, 0.15, positions.shape),
            cells=np.einsum("sij,sjk->sik", systems.cells, strain),
        )


def test_edges_are_in_order_and_two_make_a_bond():
    systems = Systems.of(crystals(3))
    found = edges(systems, candidates(systems, CUTOFF), CUTOFF)
    assert (np.diff(found.source) >= 0).all()
    assert (np.bincount(found.bond) == 2).all() and (
        found.bond[found.edge_of_bond] == np.arange(len(found.edge_of_bond))
    ).all()
    first, second = (np.flatnonzero(found.bond == 0), np.flatnonzero(found.bond == 1))
    for one, other in (first, second):
        assert (found.source[one], found.target[one]) == (found.target[other], found.source[other])
        np.testing.assert_array_equal(found.vector[one], -found.vector[other])


@pytest.mark.parametrize("cutoff", [2.5, 3.0, 4.0])
def test_angles_are_all_pairs_of_short_edges_that_leave_an_atom(cutoff):
    systems = Systems.of(crystals(5))
    found = edges(systems, candidates(systems, CUTOFF), CUTOFF)
    short = [e for e in range(len(found.source)) if found.length[e] <= cutoff]
    expected = {(a, b) for a in short for b in short if a != b and found.source[a] == found.source[b]}
    angles = found.angles(cutoff)
    assert len(angles.T) == len(expected) and set(map(tuple, angles.T.tolist())) == expected


def test_a_search_is_done_again_only_where_it_must(monkeypatch):
    searched = []
    search = neighbours.pairs_within
    monkeypatch.setattr(neighbours, "pairs_within", lambda *args: searched.append(1) or search(*args))
    systems = Systems.of(crystals(8)[:1] * 3)
    known = candidates(systems, CUTOFF)
    assert len(searched) == 3
    shift = np.zeros_like(systems.positions)
    shift[systems.system == 1, 0] = 0.6  # more than half the skin
    shift[systems.system == 2, 0] = 0.4  # less
    again = candidates(dataclasses.replace(systems, positions=systems.positions + shift), CUTOFF, known)
    assert len(searched) == 4 and again[0] is known[0] and again[1] is not known[1] and again[2] is known[2]


def test_atoms_on_top_of_each_other_are_an_error():
    heap = Structure(Lattice.cubic(1.0), ["Si"] * 40, np.random.default_rng(0).random((40, 3)))
    with pytest.raises(ValueError, match="atoms lie on top of each other"):
        candidates(Systems.of([heap]), CUTOFF)


def test_forces_and_stresses_of_slopes():
    """A harmonic spring along every edge: forces and virials by a loop, and no net force."""
    systems = Systems.of(crystals(11))
    found = edges(systems, candidates(systems, CUTOFF), CUTOFF)
    slopes = found.vector * (found.length - 3.0)[:, None]
    point = SinglePoints.of_slopes(systems, np.zeros(len(systems)), found, slopes)
    forces, virials = np.zeros_like(point.forces), np.zeros_like(point.stresses)
    for e in range(len(slopes)):
        forces[found.source[e]] += slopes[e]
        forces[found.target[e]] -= slopes[e]
        virials[systems.system[found.source[e]]] += np.outer(found.vector[e], slopes[e])
    np.testing.assert_allclose(point.forces, forces, atol=1e-9)
    np.testing.assert_allclose(point.stresses, virials / systems.volumes[:, None, None], atol=1e-9)
    for i in range(len(systems)):
        np.testing.assert_allclose(point.forces[systems.system == i].sum(0), 0, atol=1e-9)


def test_systems_select_and_join():
    structures = crystals(2)
    systems = Systems.of(structures)
    for i, structure in enumerate(structures):
        own = systems.select(np.arange(len(systems)) == i)
        np.testing.assert_allclose(own.frac_coords, structure.frac_coords, atol=1e-9)
        assert own.volumes == pytest.approx([structure.volume]) and (own.system == 0).all()
        assert own.counts.tolist() == [len(structure)]
