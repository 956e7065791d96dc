"""Every number against loops over all pairs, and what the protocols make of the same crystals."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance

from jaxcrystal.evaluate import coverage as module
from jaxcrystal.evaluate.coverage import (
    coverage,
    distribution,
    diversity,
    drawn,
    mean_distances,
    nearest,
    novelty,
    with_diversity,
    with_nearest,
)
from jaxcrystal.evaluate.fingerprints import Fingerprints
from jaxcrystal.evaluate.protocols import PROTOCOLS, Cutoffs

CDVAE, PAPER = PROTOCOLS["cdvae"], PROTOCOLS["crystal-text-llm"]
CUTOFFS = Cutoffs(structure=1.1, composition=4.3)


def some(n, seed, without=()):
    generator = np.random.default_rng(seed)
    structure, composition = generator.normal(0, 0.12, (n, 61)), generator.normal(0, 0.3, (n, 132))
    structure[list(without)] = np.nan
    reasons = tuple("open" if i in without else "" for i in range(n))
    return Fingerprints(structure, composition, reasons)


def attempts(n):
    generator = np.random.default_rng(9)
    return pd.DataFrame(
        {
            "structural_valid": generator.random(n) < 0.9,
            "compositional_valid": generator.random(n) < 0.8,
            "density": generator.normal(6, 2, n),
            "num_elements": pd.array(generator.integers(1, 6, n), "Int64"),
        }
    )


def test_nearest_and_mean_distances_equal_all_pairs(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)
    a, b = np.random.default_rng(0).normal(size=(30, 5)), np.random.default_rng(1).normal(size=(40, 5))
    a[3], b[5], b[20] = np.nan, np.nan, a[4]
    distance, index = nearest(a, b)
    pairs = cdist(np.delete(a, 3, 0), np.delete(b, 5, 0))
    assert np.delete(distance, 3) == pytest.approx(pairs.min(1)) and np.isnan(distance[3])
    assert index[3] == -1 and index[4] == 20 and distance[4] == 0
    assert (np.delete(np.arange(40), 5)[pairs.argmin(1)] == np.delete(index, 3)).all()
    assert np.isnan(nearest(a, b[5:6])[0]).all()
    known = np.delete(a, 3, 0)
    assert mean_distances(known).mean() == pytest.approx(pdist(known).mean())
    assert np.isnan(mean_distances(known[:1])).all() and mean_distances(known[:0]).size == 0


def test_coverage_by_hand_in_two_protocols():
    own, others = some(200, 1, without=(0, 7)), some(150, 2, without=(3,))
    table = with_nearest(attempts(200), own, others, "reference")
    reference = with_nearest(pd.DataFrame(index=range(150)), others, own, "generated")
    ours, theirs = own.known, others.known
    structure = cdist(own.structure[ours], others.structure[theirs])
    composition = cdist(own.composition[ours], others.composition[theirs])
    near = [
        (structure.min(axis) <= CUTOFFS.structure) & (composition.min(axis) <= CUTOFFS.composition) for axis in (0, 1)
    ]
    assert all(0.05 < mask.mean() < 0.95 for mask in near)
    numbers, intervals = coverage(table, reference, CDVAE, CUTOFFS)
    assert numbers["coverage.recall"] == near[0].sum() / 150
    assert numbers["coverage.precision"] == near[1].sum() / 200
    assert numbers["coverage.amsd_recall"] == pytest.approx(structure.min(0).mean())
    assert numbers["coverage.amcd_precision"] == pytest.approx(composition.min(1).mean())
    assert set(intervals) == set(numbers)
    assert all(low <= numbers[name] <= high for name, (low, high) in intervals.items())
    paper, _ = coverage(table, reference, PAPER, CUTOFFS)
    assert (paper["coverage.recall"], paper["coverage.precision"]) == (near[0].mean(), near[1].mean())


def test_novelty_by_hand():
    own, train = some(200, 1, without=(0, 7)), some(150, 2)
    table = with_nearest(attempts(200), own, train, "train")
    structure = cdist(own.structure[own.known], train.structure).min(1) > CUTOFFS.structure
    composition = cdist(own.composition[own.known], train.composition).min(1) > CUTOFFS.composition
    numbers, intervals = novelty(table, CUTOFFS)
    assert numbers == {
        "novelty.structural": structure.mean(),
        "novelty.compositional": composition.mean(),
        "novelty.either": (structure | composition).mean(),
    }
    assert all(low <= numbers[name] <= high for name, (low, high) in intervals.items())


def test_a_protocol_draws_the_same_crystals_every_time():
    valid = np.random.default_rng(0).random(3000) < 0.8
    chosen = drawn(valid, CDVAE)
    assert chosen.sum() == 1000 and not (chosen & ~valid).any() and (chosen == drawn(valid, CDVAE)).all()
    assert (drawn(valid, PAPER) == valid).all() and (drawn(valid[:900], CDVAE) == valid[:900]).all()


def test_only_valid_crystals_keep_their_fingerprints():
    table = attempts(200)
    found = module.only_valid(some(200, 1, without=(0, 7)), table)
    valid = module.valid_rows(table)
    assert (found.known == (valid & some(200, 1, without=(0, 7)).known)).all()
    assert set(found.reasons) == {"", "open", "it is invalid"} and found.reasons[0] == "open"
    assert np.isnan(found.composition[~valid]).all() and np.isnan(found.structure[~found.known]).all()


def test_distributions_and_diversity_take_valid_crystals():
    own, reference = some(200, 1, without=(0, 7)), attempts(150).assign(density=np.linspace(1, 9, 150))
    table = with_diversity(attempts(200), own, PAPER)
    valid = table["structural_valid"] & table["compositional_valid"] & own.known
    assert (table["drawn"] == valid).all() and list(table["no_fingerprint_because"])[:2] == ["open", ""]
    numbers = distribution(table, reference)
    assert numbers == {
        "distribution.density_wasserstein": wasserstein_distance(table["density"][valid], reference["density"]),
        "distribution.num_elements_wasserstein": wasserstein_distance(
            table["num_elements"][valid], reference["num_elements"]
        ),
    }
    numbers, intervals = diversity(table)
    assert numbers["diversity.structural"] == pytest.approx(pdist(own.structure[valid]).mean())
    assert numbers["diversity.compositional"] == pytest.approx(pdist(own.composition[valid]).mean())
    assert all(low <= numbers[name] <= high for name, (low, high) in intervals.items())
    nobody = with_diversity(attempts(5).assign(structural_valid=False), some(5, 1), PAPER)
    assert distribution(nobody, reference) == {} and diversity(nobody) == ({}, {})


def test_the_interval_of_diversity_holds_its_number_of_times():
    """95 of 100 intervals hold the mean over all pairs of a large population, give or take what chance allows."""
    generator = np.random.default_rng(4)
    population = generator.normal(size=(3000, 3)) * [1, 1, 3]
    truth = pdist(population).mean()
    held = 0
    for _ in range(100):
        points = population[generator.integers(0, 3000, 60)]
        table = pd.DataFrame({"mean_structure_distance": mean_distances(points), "mean_composition_distance": np.nan})
        low, high = diversity(table)[1]["diversity.structural"]
        held += low <= truth <= high
    assert 87 <= held <= 99
