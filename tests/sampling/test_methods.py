"""Every method's distribution, against exact probabilities and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.methods import GROUPS, Greedy, Guidance, MinP, Temperature, TopK, TopP, pick

LOGITS = np.log(np.array([0.30, 0.05, 0.20, 0.25, 0.08, 0.12]))


def assert_follows(logits: jax.Array, probability: np.ndarray, seed: int = 3) -> None:
    """100,000 draws from these logits: a chi-square test at 0.1 %, and nothing that has no probability."""
    draw = jax.jit(jax.vmap(lambda key: pick(key[None], logits[None])[0]))
    counts = np.bincount(draw(jax.random.split(jax.random.key(seed), 100_000)), minlength=len(probability))
    possible = probability > 0
    assert counts[~possible].sum() == 0
    expected = 100_000 * probability[possible] / probability.sum()
    assert ((counts[possible] - expected) ** 2 / expected).sum() <= chi2.isf(1e-3, df=max(possible.sum() - 1, 1))


def nucleus(logits: np.ndarray, p: float) -> np.ndarray:
    """The definition, with a sort, in float64; ties with the last token are kept."""
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    head = np.sort(probability)[::-1]
    last = head[np.searchsorted(np.cumsum(head), p)]
    return probability >= last


@pytest.mark.parametrize(
    ("methods", "probability"),
    [
        ((Temperature(1.0),), np.array([0.30, 0.05, 0.20, 0.25, 0.08, 0.12])),
        ((Temperature(0.5),), np.array([0.09, 0.0025, 0.04, 0.0625, 0.0064, 0.0144])),
        ((TopP(0.8),), np.array([0.30, 0, 0.20, 0.25, 0, 0.12])),
        ((TopP(0.75 - 1e-4),), np.array([0.30, 0, 0.20, 0.25, 0, 0])),
        # squared, the three largest hold 0.896 of the mass, so the temperature changes what top-p keeps
        ((Temperature(0.5), TopP(0.8)), np.array([0.09, 0, 0.04, 0.0625, 0, 0])),
        ((TopK(2),), np.array([0.30, 0, 0, 0.25, 0, 0])),
        ((TopK(99),), np.array([0.30, 0.05, 0.20, 0.25, 0.08, 0.12])),
        ((MinP(0.39),), np.array([0.30, 0, 0.20, 0.25, 0, 0.12])),
        # squared, 0.20 is 0.44 times the likeliest; of the four that top-k leaves, top-p takes three, min-p two
        ((Temperature(0.5), TopK(4), TopP(0.9), MinP(0.5)), np.array([0.09, 0, 0, 0.0625, 0, 0])),
        ((Greedy(),), np.array([1.0, 0, 0, 0, 0, 0])),
    ],
)
def test_draws_follow_the_exact_probabilities(methods, probability):
    logits = jnp.asarray(LOGITS, jnp.float32)[None]
    for method in methods:
        logits = method(logits)
    assert_follows(logits[0], probability)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
def test_guided_draws_follow_the_exact_probabilities(w):
    """p ∝ p₁ʷ p₀¹⁻ʷ, then what other methods make of it."""
    asked, plain = np.exp(LOGITS), np.array([0.10, 0.30, 0.10, 0.20, 0.10, 0.20])
    probability = asked**w * plain ** (1 - w)
    guided = Guidance(w)(*(jnp.log(jnp.asarray(x, jnp.float32))[None] for x in (asked, plain)))
    assert_follows(guided[0], probability)
    assert_follows(Temperature(0.5)(guided)[0], probability**2)


def test_guidance_leaves_forbidden_tokens_forbidden():
    asked, plain = jnp.array([[1.0, -jnp.inf, 0.5, -jnp.inf]]), jnp.array([[2.0, 3.0, 0.0, -jnp.inf]])
    assert Guidance(3.0)(asked, plain).tolist() == [[-1.0, -jnp.inf, 1.5, -jnp.inf]]


@pytest.mark.parametrize("vocab", [GROUPS - 1, GROUPS, 5 * GROUPS + 17])
def test_draws_from_a_vocabulary_of_many_groups(vocab):
    random = np.random.default_rng(vocab)
    logits = random.normal(size=vocab)
    logits[random.random(vocab) < 0.5] = -np.inf
    assert_follows(jnp.asarray(logits, jnp.float32), np.exp(logits))


def test_a_draw_is_its_rows_own_whatever_the_other_rows_are():
    logits = jnp.asarray(np.random.default_rng(0).normal(scale=3, size=(50, 999)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 50)
    each = [int(pick(keys[i : i + 1], logits[i : i + 1])[0]) for i in range(50)]
    assert pick(keys, logits).tolist() == each


@pytest.mark.parametrize("only", [0, 127, 128, 500, 998])
def test_the_only_token_that_is_left_is_drawn(only):
    logits = jnp.full((64, 999), -jnp.inf).at[:, only].set(-1e4)
    assert set(pick(jax.random.split(jax.random.key(0), 64), logits).tolist()) == {only}


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
def test_top_p_keeps_what_a_sort_would_keep(p, spread):
    logits = np.random.default_rng(0).normal(scale=spread, size=(64, 999)).astype(np.float32)
    kept = np.isfinite(jax.jit(TopP(p))(logits))
    np.testing.assert_array_equal(kept, [nucleus(row.astype(np.float64), p) for row in logits])
    torch_kept = torch.isfinite(TopPLogitsWarper(p)(None, torch.from_numpy(logits))).numpy()
    np.testing.assert_array_equal(kept, torch_kept)


def test_top_p_keeps_ties_together():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    assert np.isfinite(TopP(0.5)(logits))[0].tolist() == [True, True, True, False, False]


def test_top_p_leaves_logits_that_it_keeps_as_they_are_and_forbidden_ones_forbidden():
    logits = jnp.array([[1.5, -jnp.inf, -3.0, -jnp.inf]])
    assert TopP(0.9999)(logits).tolist() == logits.tolist()
    assert TopP(1.0)(logits).tolist() == logits.tolist()


@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
def test_top_k_and_min_p_keep_what_transformers_keeps(spread):
    logits = np.random.default_rng(1).normal(scale=spread, size=(64, 999)).astype(np.float32)
    logits[:, 7] = logits[:, 8]  # a tie
    for ours, theirs in (
        *((TopK(k), TopKLogitsWarper(k)) for k in (1, 5, 40, 999, 2000)),
        *((MinP(p), MinPLogitsWarper(p)) for p in (0.02, 0.3, 1.0)),
    ):
        expected = theirs(None, torch.from_numpy(logits)).numpy()
        np.testing.assert_array_equal(jax.jit(ours)(logits), expected)


def test_top_k_and_min_p_leave_forbidden_tokens_forbidden():
    logits = jnp.array([[1.5, -jnp.inf, -3.0, -jnp.inf]])
    assert TopK(3)(logits).tolist() == logits.tolist()
    assert MinP(1e-6)(logits).tolist() == logits.tolist()


def test_greedy_takes_the_first_of_a_tie():
    assert np.isfinite(Greedy()(jnp.array([[0.0, 2.0, 2.0]])))[0].tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(bad):
    with pytest.raises(UserError, match="temperature"):
        Temperature(bad)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_top_p_is_refused(bad):
    with pytest.raises(UserError, match="top-p"):
        TopP(bad)


@pytest.mark.parametrize("bad", [0, -3, 2.5])
def test_impossible_top_k_is_refused(bad):
    with pytest.raises(UserError, match="top-k"):
        TopK(bad)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_min_p_is_refused(bad):
    with pytest.raises(UserError, match="min-p"):
        MinP(bad)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_impossible_guidance_is_refused(bad):
    with pytest.raises(UserError, match="guidance weight"):
        Guidance(bad)
