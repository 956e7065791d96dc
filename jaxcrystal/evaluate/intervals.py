"""How far chance may have moved a number: 95 % intervals of rates, means and medians."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

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


def bootstrap_mean(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """95 % percentile interval of the mean over resamples drawn with a fixed seed."""
    return _bootstrap(values, np.mean)


def _bootstrap(values: Float[np.ndarray, "n"], statistic: Callable) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    found = [statistic(generator.choice(values, len(values))) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
