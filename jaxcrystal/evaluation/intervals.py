"""How far chance may have moved a number: 95 % intervals of rates, means, percentiles, distributions' distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float, Int

BOOTSTRAP_DRAWS = 2000


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a rate: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96."""
    z, p = 1.959963984540054, successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low, high = (centre - half) / (1 + z * z / trials), (centre + half) / (1 + z * z / trials)
    # Rounding must not leave the bound of 0 of n a hair below 0, or that of n of n below 1.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def bootstrap_median(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """95 % percentile interval of the median over resamples drawn with a fixed seed."""
    return _bootstrap(values, np.median)


def bootstrap_percentile(values: Float[np.ndarray, "n"], q: float) -> tuple[float, float]:
    """95 % percentile interval of the q-th percentile over resamples drawn with a fixed seed."""
    return _bootstrap(values, partial(np.percentile, q=q))


def bootstrap_mean(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """95 % percentile interval of the mean over resamples drawn with a fixed seed."""
    return _bootstrap(values, np.mean)


def bootstrap_totals(
    rows: Float[np.ndarray, "n kinds"], statistic: Callable[[Float[np.ndarray, "kinds"]], float]
) -> tuple[float, float]:
    """95 % interval of a statistic of the sums over rows, of resampled rows, drawn with a fixed seed.

    Resamples hold fewer kinds than the rows, so that a number of kinds, or an entropy, comes out lower: the interval is
    moved by as much as the resamples' mean is off (bias correction; Davison & Hinkley, Bootstrap Methods, section 2.4).
    """
    generator, found, n = np.random.default_rng(0), statistic(rows.sum(axis=0)), len(rows)
    drawn = [statistic(np.bincount(generator.integers(n, size=n), minlength=n) @ rows) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(drawn, [2.5, 97.5]) - np.mean(drawn)
    return found + min(0.0, float(low)), found + max(0.0, float(high))


def bootstrap_wasserstein(values: Float[np.ndarray, "n"], others: Float[np.ndarray, "m"]) -> tuple[float, float]:
    """95 % interval of the Wasserstein distance W = ∫|F - G| of two samples, both resampled with a fixed seed.

    Chance moves samples apart: W is larger than the populations' distance, and a resampled one, W*, larger than W by
    about as much. The lower bound takes that back, 2W - W*₉₇.₅ (the basic bootstrap; Davison & Hinkley, Bootstrap
    Methods, section 5.2), and is at least 0. The upper one, W + W*₉₇.₅ - mean W*, does not rely on it, since in a long
    tail chance is larger still.
    """
    points, rank = np.unique(np.concatenate([values, others]), return_inverse=True)
    gaps, generator = np.diff(points), np.random.default_rng(0)

    def distance(*ranks: Int[np.ndarray, "n"]) -> float:
        one, other = (np.bincount(r, minlength=len(points)) / len(r) for r in ranks)
        return float(np.abs(np.cumsum(one - other)[:-1]) @ gaps)

    ranks = rank[: len(values)], rank[len(values) :]
    drawn = [distance(*(generator.choice(r, len(r)) for r in ranks)) for _ in range(BOOTSTRAP_DRAWS)]
    found, high = distance(*ranks), float(np.percentile(drawn, 97.5))
    return max(0.0, 2 * found - high), found + high - float(np.mean(drawn))


def _bootstrap(values: Float[np.ndarray, "n"], statistic: Callable) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    found = [statistic(generator.choice(values, len(values))) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
