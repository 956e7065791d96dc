"""Ideal motifs score 1, and any directions what pymatgen's LocalStructOrderParams says of them."""

from types import SimpleNamespace

import numpy as np
import pytest
from pymatgen.analysis.local_env import CN_OPT_PARAMS, LocalStructOrderParams

from jaxcrystal.evaluation.likeness.order_parameters import ORDER_PARAMETERS, BodyCentred, Directions

ALL = [(n, name) for n, motifs in ORDER_PARAMETERS.items() for name in motifs]


def ring(n, height=0.0):
    angles = 2 * np.pi * np.arange(n) / n
    return [[np.cos(a), np.sin(a), height] for a in angles]


def bent(degrees):
    return [[1, 0, 0], [np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 0]]


UP, DOWN = [0, 0, 1], [0, 0, -1]
SIGNS = [[a, b, c] for a in (1, -1) for b in (1, -1) for c in (1, -1)]
TETRAHEDRON = [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]
IDEAL = {
    (1, "sgl_bd"): [UP],
    (2, "L-shaped"): bent(90),
    (2, "water-like"): bent(104.45),
    (2, "bent 120 degrees"): bent(120),
    (2, "bent 150 degrees"): bent(150),
    (2, "linear"): bent(180),
    (3, "trigonal planar"): ring(3),
    (3, "trigonal non-coplanar"): TETRAHEDRON[:3],
    (3, "T-shaped"): ring(4)[:3],
    (4, "square co-planar"): ring(4),
    (4, "tetrahedral"): TETRAHEDRON,
    (4, "trigonal pyramidal"): [*ring(3), UP],
    (5, "pentagonal planar"): ring(5),
    (5, "square pyramidal"): [*ring(4), UP],
    (5, "trigonal bipyramidal"): [*ring(3), UP, DOWN],
    (6, "hexagonal planar"): ring(6),
    (6, "octahedral"): [*ring(4), UP, DOWN],
    (6, "pentagonal pyramidal"): [*ring(5), UP],
    (7, "hexagonal pyramidal"): [*ring(6), UP],
    (7, "pentagonal bipyramidal"): [*ring(5), UP, DOWN],
    (8, "body-centered cubic"): SIGNS,
    (8, "hexagonal bipyramidal"): [*ring(6), UP, DOWN],
    (12, "cuboctahedral"): [np.roll([0, a, b], k) for a in (1, -1) for b in (1, -1) for k in range(3)],
}


@pytest.mark.parametrize(("n", "name"), IDEAL, ids=str)
def test_the_ideal_motif_scores_one(n, name):
    directions = Directions.of(np.array([IDEAL[n, name]], float))
    assert ORDER_PARAMETERS[n][name](directions) == pytest.approx([1.0], abs=2e-3)


def by_pymatgen(n, name, vectors):
    kind, *parameters = CN_OPT_PARAMS.get(n, {}).get(name, [name])
    known = LocalStructOrderParams([kind], parameters=parameters or None)
    sites = [SimpleNamespace(coords=np.array(v, float)) for v in ([0, 0, 0], *vectors)]
    return known.get_order_parameters(sites, 0, indices_neighs=list(range(1, n + 1)))[0] or 0.0


@pytest.mark.parametrize(("n", "name"), ALL, ids=str)
def test_any_directions_score_what_pymatgen_says(n, name):
    generator = np.random.default_rng(n)
    ideal = np.array(next((IDEAL[key] for key in IDEAL if key[0] == n), generator.normal(size=(n, 3))), float)
    shaken = [ideal + generator.normal(0, size, ideal.shape) for size in (0.0, 0.01, 0.1, 0.3)]
    # A neighbour exactly opposite to another has no meridian, and need not be the only one near that pole.
    crowded = np.array([UP, DOWN, [0.4, 0.1, -1], *generator.normal(size=(n, 3))])[:n]
    vectors = np.array([*shaken, crowded, crowded[::-1], *generator.normal(size=(3, n, 3))])
    expected = [by_pymatgen(n, name, v) for v in vectors]
    assert ORDER_PARAMETERS[n][name](Directions.of(vectors)) == pytest.approx(expected, abs=1e-9)


def test_only_the_body_centred_one_depends_on_order():
    generator = np.random.default_rng(1)
    for n, name in ALL:
        vectors = generator.normal(size=(4, n, 3))
        motif = ORDER_PARAMETERS[n][name]
        same = np.allclose(motif(Directions.of(vectors)), motif(Directions.of(vectors[:, ::-1])))
        assert same != isinstance(motif, BodyCentred), name


def test_a_turn_changes_nothing():
    generator = np.random.default_rng(2)
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    for n, name in ALL:
        vectors, motif = generator.normal(size=(4, n, 3)), ORDER_PARAMETERS[n][name]
        assert motif(Directions.of(vectors @ turn)) == pytest.approx(motif(Directions.of(vectors)), abs=1e-9), name
