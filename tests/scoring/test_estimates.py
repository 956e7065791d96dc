"""Sums and means of probabilities, perplexity and IPT: laws, and answers that are known in closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrystal.scoring.estimates import increase, log_mean_exp, log_mean_exp_interval, log_sum_exp, perplexity

log_probabilities = st.lists(st.floats(-2000, 0), min_size=1, max_size=30).map(np.array)


@given(log_probabilities)
def test_sums_and_means_are_those_of_probabilities(values):
    """Of large ones by plain arithmetic, of any by what cannot change them."""
    near = values / 100
    assert log_sum_exp(near) == pytest.approx(np.log(np.exp(near).sum()), abs=1e-9)
    assert log_mean_exp(near) == pytest.approx(np.log(np.exp(near).mean()), abs=1e-9)
    assert values.max() <= log_sum_exp(values) <= values.max() + np.log(len(values)) + 1e-9
    assert values.mean() - 1e-9 <= log_mean_exp(values) <= values.max() + 1e-9  # Jensen
    assert log_mean_exp(values - 7.5) == pytest.approx(log_mean_exp(values) - 7.5, abs=1e-9)


def test_the_interval_has_the_mean_of_what_is_drawn():
    """Of 100 draws of a distribution whose mean probability is known; and of equal ones nothing is in doubt."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(60):  # log-normal: the mean of exp(x) is exp(m + s²/2)
        low, high = log_mean_exp_interval(random.normal(-300, 0.5, 100))
        inside += low <= -300 + 0.125 <= high
    assert 50 <= inside <= 60
    assert log_mean_exp_interval(np.full(20, -12.0)) == pytest.approx((-12, -12))


def test_perplexity_of_a_uniform_choice_is_the_number_of_its_tokens():
    """Of 7 tokens, each as likely as 95 others."""
    assert perplexity(np.array([-7 * np.log(96)]), np.array([7])) == pytest.approx([96], rel=1e-12)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=20).map(np.array))
def test_ipt_is_no_less_than_nothing(values):
    rise = increase(values)
    assert -1e-9 <= rise <= values.max() - values.min() + 1e-9
    assert rise == pytest.approx(increase(values[::-1]), abs=1e-9)
    assert increase(np.full(3, values[0])) == pytest.approx(0, abs=1e-12)
    assert increase(values + 5) == pytest.approx(rise, abs=1e-9)
