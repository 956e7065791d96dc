"""Resampling turns draws with a grammar into draws of the model under the grammar's constraints."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import chisquare

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.methods import MinP, Temperature, TopP
from jaxcrystal.sampling.resampling import check_exact, effective_number, resample, weights


def test_a_chain_under_a_constraint_is_drawn_as_the_model_draws_it():
    """Words of three letters whose sum is 2 or less; a grammar that looks ahead has them in other proportions."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 4)  # of the next letter, behind the last one; row 3: at the start
    words = [word for word in product(range(3), repeat=3) if sum(word) <= 2]

    def chain(word):
        return np.prod([p[before][letter] for before, letter in zip((3, *word), word, strict=False)])

    exact = np.array([chain(word) for word in words])
    exact /= exact.sum()
    draws, logs = [], []
    for _ in range(20_000):
        word, log = (), 0.0
        while len(word) < 3:
            q = p[word[-1] if word else 3] * (np.arange(3) <= 2 - sum(word))
            log += np.log(q.sum())
            word += (int(rng.choice(3, p=q / q.sum())),)
        draws.append(words.index(word))
        logs.append(log)
    weight = weights(logs)
    found = np.array(draws)[resample(weight, 2000, seed=1)]
    assert 2000 < effective_number(weight) < 20_000
    assert chisquare(np.bincount(found, minlength=len(words)), 2000 * exact).pvalue > 0.01
    assert chisquare(np.bincount(draws[:2000], minlength=len(words)), 2000 * exact).pvalue < 1e-6  # the grammar's own


def test_each_comes_as_often_as_its_share():
    weight = weights([np.log(0.5), None, np.log(0.25), np.log(0.25) - 1000])
    np.testing.assert_allclose(weight, [2 / 3, 0, 1 / 3, 0], atol=1e-12)
    assert effective_number(weight) == pytest.approx(1.8)
    for seed in range(20):
        times = np.bincount(resample(weight, 7, seed), minlength=4)
        assert times.sum() == 7 and times[0] in (4, 5) and times[2] in (2, 3) and times[1] == times[3] == 0
    assert len({tuple(resample(np.full(50, 0.02), 10, seed)) for seed in range(5)}) > 1
    assert weights([-5000.0, -5000.0]).tolist() == [0.5, 0.5]


def test_what_is_not_exact_is_refused():
    check_exact([Temperature(1.0), TopP(1.0)], None)
    for methods, guidance in (
        ([Temperature(0.9), TopP(1.0)], None),
        ([Temperature(1.0), TopP(0.9)], None),
        ([Temperature(1.0), TopP(1.0), MinP(0.1)], None),
        ([Temperature(1.0), TopP(1.0)], 2.0),
    ):
        with pytest.raises(UserError, match="exact at temperature 1 and top-p 1"):
            check_exact(methods, guidance)
    with pytest.raises(UserError, match="nothing can be resampled"):
        weights([None, None])
    with pytest.raises(UserError, match="0 crystals cannot be resampled"):
        resample(np.ones(1), 0, 0)
