"""Numbers of a crystal from the log-probabilities of its texts: sums and means over them, perplexities, and IPT."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Float, Float64, Int

DRAWS = 2000  #: of a bootstrap


def log_sum_exp(values: Float[np.ndarray, "*n texts"]) -> Float64[np.ndarray, "*n"]:
    """log Σ exp of the last axis: the log-probability that a text is one of these, which are distinct."""
    values = np.asarray(values, np.float64)
    top = values.max(-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(values - top).sum(-1))


def log_mean_exp(values: Float[np.ndarray, "*n texts"]) -> Float64[np.ndarray, "*n"]:
    """log of the mean of exp of the last axis: of the mean probability of texts, of which these are a sample.

    The mean of the probabilities is unbiased, and its logarithm on average too low. Where a few texts are far likelier
    than all others, and none of them is in the sample, it is much too low.
    """
    return log_sum_exp(values) - np.log(np.shape(values)[-1])


def log_mean_exp_interval(values: Float[np.ndarray, "texts"]) -> tuple[float, float]:
    """95 % percentile interval of `log_mean_exp` over resamples drawn with a fixed seed.

    It says how much the draws at hand disagree, and cannot know of texts that are far likelier than all of them: with
    few draws, or such texts, it is too narrow.
    """
    low, high = np.percentile(log_mean_exp(values[_resamples(len(values))]), [2.5, 97.5])
    return float(low), float(high)


@cache
def _resamples(count: int) -> Int[np.ndarray, "draws count"]:
    return np.random.default_rng(0).integers(count, size=(DRAWS, count))


def perplexity(log_probabilities: Float[np.ndarray, "*n"], tokens: Int[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    """exp of the mean negative log-likelihood a token, the end of the text counted as one and the prompt not."""
    return np.exp(-np.asarray(log_probabilities, np.float64) / tokens)


def increase(perplexities: Float[np.ndarray, "*n texts"]) -> Float64[np.ndarray, "*n"]:
    """Increase in perplexity under transformation: IPT = E_g[PPL(t_g s)] - min_g PPL(t_g s), over texts of one crystal
    (arXiv 2402.04379, section 4). 0 if all are as likely; it grows with the number of texts, as their minimum falls."""
    return perplexities.mean(-1) - perplexities.min(-1)
