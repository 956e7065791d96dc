"""Draws of the model under its constraints, made of draws with the grammar: sampling-importance-resampling.

The grammar renormalises token by token: at temperature 1 and top-p 1 it draws x from q(x) = Π p(xₜ) / Zₜ, where Zₜ is
the probability that the model gives to the allowed tokens, and not from p(x | x meets the constraints) ∝ p(x). The
weight of x is p(x) / q(x) = Π Zₜ = exp(grammar_log_probability). Draws that are drawn again by their weights are of the
latter as their number grows (Rubin 1988; Smith and Gelfand 1992); how far they are is told by the effective number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import LEFT_OUT, Attempt
from jaxcrystal.sampling.methods import Method, Temperature, TopP

#: Said of attempts whose prompts differ though they are of one wish.
ONE_PROMPT = "resample weighs the attempts of one prompt, and within a range each has its own: leave one out"


def by_wish(attempts: Sequence[Attempt]) -> Iterator[tuple[Attempt, ...]]:
    """The attempts of each wish: their draws count up, and begin anew with the next.

    Raises UserError where those of one wish have several prompts, or some were left out.
    """
    if any(each.status == LEFT_OUT for each in attempts):
        raise UserError("resample weighs all attempts, and `keep` left some of these out: leave one out")
    starts = [
        i
        for i, (last, each) in enumerate(pairwise(attempts), start=1)
        if each.draw <= last.draw or each.asked != last.asked
    ]
    for start, end in pairwise([0, *starts, len(attempts)]):
        own = tuple(attempts[start:end])
        if len({each.prompt for each in own}) > 1:
            raise UserError(ONE_PROMPT)
        yield own


def check_exact(methods: Sequence[Method], guidance: float | None) -> None:
    """Raises UserError unless the weights are those of the model itself: temperature 1, top-p 1, nothing else."""
    if any(method not in (Temperature(1.0), TopP(1.0)) for method in methods) or guidance is not None:
        raise UserError(
            "the grammar's weights are exact at temperature 1 and top-p 1, without top-k, min-p and guidance; draw so "
            "to resample"
        )


def weights(log_weights: Sequence[float | None]) -> Float[np.ndarray, "draws"]:
    """Normalised; 0 for a draw that has none. Raises UserError if no draw has any."""
    logs = np.array([-np.inf if x is None else x for x in log_weights], np.float64)
    if not np.isfinite(logs).any():
        raise UserError("no attempt has a weight of the grammar: nothing can be resampled")
    relative = np.exp(logs - logs.max())
    return relative / relative.sum()


def effective_number(weights: Float[np.ndarray, "draws"]) -> float:
    """Kish's 1 / Σ wᵢ² of normalised weights: from 1, one draw has all the weight, to the number of draws."""
    return float(1 / (weights**2).sum())


def resample(weights: Float[np.ndarray, "draws"], count: int, seed: int) -> Int[np.ndarray, "count"]:
    """Indices of `count` draws, with repetition, in rising order: draw i comes `count` · wᵢ times on average.

    Systematic: one random number u places the points (u + k) / count on the running sum of the weights, so that each
    draw comes as often as its share, rounded up or down.
    """
    if count < 1:
        raise UserError(f"{count} crystals cannot be resampled; at least 1")
    points = (np.random.default_rng(seed).random() + np.arange(count)) / count
    total = np.cumsum(weights)
    return np.searchsorted(total / total[-1], points, side="right")


def times(log_weights: Sequence[float | None], count: int, seed: int) -> tuple[Int[np.ndarray, "draws"], float]:
    """How often each draw is among the `count` of `resample`, and the effective number; 0 where none has a weight."""
    if all(x is None for x in log_weights):
        return np.zeros(len(log_weights), np.int64), 0.0
    weight = weights(log_weights)
    return np.bincount(resample(weight, count, seed), minlength=len(log_weights)), effective_number(weight)
