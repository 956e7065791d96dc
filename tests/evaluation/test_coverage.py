"""Every number against loops over all pairs, and what the protocols make of the same crystals."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import bootstrap, wasserstein_distance

from jaxcrystal.evaluation import coverage as module
from jaxcrystal.evaluation.coverage import (
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
from jaxcrystal.evaluation.intervals import bootstrap_wasserstein, wilson
from jaxcrystal.evaluation.likeness.fingerprints import Fingerprints
from jaxcrystal.evaluation.protocols import PROTOCOLS, Cutoffs

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
    table = with_nearest(attempts(200), own, others, range(150), "reference")
    reference = with_nearest(pd.DataFrame(index=range(150)), others, own, range(200), "generated")
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
    assert intervals["coverage.precision"] == wilson(near[1].sum(), 200)
    # Which leaves out what has no fingerprint, and says too what it is when it does not.
    paper, intervals = coverage(table, reference, PAPER, CUTOFFS)
    assert (paper["coverage.recall"], paper["coverage.precision"]) == (near[0].mean(), near[1].mean())
    assert intervals["coverage.recall"] == wilson(near[0].sum(), 149)
    for side in ("recall", "precision"):
        assert paper[f"coverage.{side}_of_all"] == numbers[f"coverage.{side}"] < paper[f"coverage.{side}"]
        assert f"coverage.{side}_of_all" in intervals and f"coverage.{side}_of_all" not in numbers


def test_the_nearest_crystal_is_like_it_in_structure_and_composition():
    own, others = (
        replace(found, composition=8 * found.composition)
        for found in (some(40, 1, without=(0, 7)), some(30, 2, without=(3,)))
    )
    names = [f"mp-{i}" for i in range(30)]
    table = with_nearest(attempts(40), own, others, names, "train")
    together = np.hypot(
        cdist(own.structure, others.structure) / 0.4, cdist(own.composition, others.composition) / 10
    )  # NaN without fingerprint
    assert table["train_nearest"][[0, 7]].isna().all()
    rows = np.flatnonzero(own.known)
    found = np.array([names.index(name) for name in table["train_nearest"][rows]])
    assert (found == np.nanargmin(together[rows], axis=1)).all()
    for kind in ("structure", "composition"):  # neither alone says it
        assert (found != nearest(getattr(own, kind)[rows], getattr(others, kind))[1]).any()
    assert with_nearest(attempts(40), own, others[3:4], ["x"], "train")["train_nearest"].isna().all()


def test_novelty_by_hand():
    own, train = some(200, 1, without=(0, 7)), some(150, 2)
    table = with_nearest(attempts(200), own, train, range(150), "train")
    structure = cdist(own.structure[own.known], train.structure).min(1) > CUTOFFS.structure
    composition = cdist(own.composition[own.known], train.composition).min(1) > CUTOFFS.composition
    numbers, intervals = novelty(table, PAPER, CUTOFFS)
    either = structure | composition
    assert numbers == {
        "novelty.structural": structure.mean(),
        "novelty.structural_of_all": structure.sum() / 200,
        "novelty.compositional": composition.mean(),
        "novelty.compositional_of_all": composition.sum() / 200,
        "novelty.either": either.mean(),
        "novelty.either_of_all": either.sum() / 200,
    }
    assert 0 < structure.mean() < either.mean() < 1 and intervals["novelty.either"] == wilson(either.sum(), 198)
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
    lost = np.flatnonzero(module.valid_rows(attempts(200)))[[0, 3]]
    own, reference = some(200, 1, without=lost), attempts(150).assign(density=np.linspace(1, 9, 150))
    table = with_diversity(attempts(200), own, PAPER)
    valid = table["structural_valid"] & table["compositional_valid"] & own.known
    assert (table["drawn"] == valid).all() and set(table["no_fingerprint_because"][lost]) == {"open"}
    table.loc[5, ["density", "num_elements"]] = None  # as of an attempt without a crystal, which is not valid either
    assert not valid[5]
    numbers, intervals = distribution(table, reference)
    expected = {}
    for suffix, rows in (("", valid), ("_of_all", table.index != 5)):
        for column in ("density", "num_elements"):
            found = wasserstein_distance(table[column][rows], reference[column])
            expected[f"distribution.{column}_wasserstein{suffix}"] = found
    assert numbers == expected and set(intervals) == set(numbers) and len(set(numbers.values())) == 4
    assert all(low < numbers[name] < high for name, (low, high) in intervals.items())
    numbers, intervals = diversity(table)
    assert numbers["diversity.structural"] == pytest.approx(pdist(own.structure[valid]).mean())
    assert numbers["diversity.compositional"] == pytest.approx(pdist(own.composition[valid]).mean())
    assert all(low <= numbers[name] <= high for name, (low, high) in intervals.items())
    nobody = with_diversity(attempts(5).assign(structural_valid=False), some(5, 1), PAPER)
    assert set(distribution(nobody, reference)[0]) == {
        "distribution.density_wasserstein_of_all",
        "distribution.num_elements_wasserstein_of_all",
    }
    assert diversity(nobody) == ({}, {})


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


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_the_interval_of_a_wasserstein_distance_holds_its_number_of_times(apart, monkeypatch):
    """Of two populations, and of one, where the true distance is 0 and every sample is further away than that."""
    monkeypatch.setattr("jaxcrystal.evaluation.intervals.BOOTSTRAP_DRAWS", 200)
    generator = np.random.default_rng(4)
    held = 0
    for _ in range(100):
        values, others = generator.gamma(2, size=150) + apart, generator.gamma(2, size=200)
        low, high = bootstrap_wasserstein(values, others)
        assert low <= wasserstein_distance(values, others) <= high
        held += low <= apart <= high
    assert held >= 87


def test_the_wasserstein_interval_equals_scipys_basic_bootstrap_below_and_the_centred_percentile_above():
    generator = np.random.default_rng(3)
    samples = generator.gamma(2, size=120), generator.gamma(3, size=150)
    options = {"n_resamples": 2000, "vectorized": False, "rng": 1}
    scipys = bootstrap(samples, wasserstein_distance, method="basic", **options)
    low, high = bootstrap_wasserstein(*samples)
    assert low == pytest.approx(scipys.confidence_interval.low, abs=0.02)
    drawn = scipys.bootstrap_distribution
    above = np.percentile(drawn, 97.5) - drawn.mean()
    assert high == pytest.approx(wasserstein_distance(*samples) + above, abs=0.04) and low < high - 0.2
    assert bootstrap_wasserstein(*samples) == (low, high)
    same = bootstrap_wasserstein(samples[0], samples[0])
    assert same[0] == 0 < same[1] < 0.3
