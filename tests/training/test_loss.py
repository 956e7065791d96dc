"""The loss in blocks is the loss of all logits at once, with every gradient; its memory is `test_step`'s."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL

from jaxcrystal.config import LoraConfig, MeshConfig
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.texts.writer import Rows
from jaxcrystal.training.loss import next_token_loss


def random_rows(count: int = 3, length: int = 50, vocab: int = 448) -> Rows:
    """Two crystals a row, of other lengths in each, then padding; a few tokens are not counted."""
    rng = np.random.default_rng(0)
    first, both = rng.integers(5, 20, (2, count, 1)) + np.array([[[0]], [[20]]])
    at = np.arange(length)
    segments = np.where(at < first, 1, np.where(at < both, 2, 0)).astype(np.int32)
    tokens = rng.integers(0, vocab, (count, length), dtype=np.int32)
    positions = np.where(at < first, at, at - first).astype(np.int32)
    return Rows(*map(jnp.asarray, (tokens, segments, positions, (segments > 0) & (rng.random(segments.shape) < 0.8))))


def plain(logits: jax.Array, rows: Rows) -> tuple[jax.Array, int]:
    """The same by optax, of all logits at once; what counts is said token by token."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows.tokens[:, 1:])
    segments, mask = np.asarray(rows.segments), np.asarray(rows.loss_mask)
    counted = np.zeros(nats.shape, bool)
    for row, t in np.ndindex(counted.shape):
        counted[row, t] = mask[row, t + 1] and segments[row, t + 1] and segments[row, t] == segments[row, t + 1]
    return jnp.sum(jnp.where(counted, nats, 0)), int(counted.sum())


def loss_and_count(hidden, head, rows, block):
    sums = next_token_loss(hidden, head, rows, block, head.shape[1])
    return sums.nats, sums.targets


@pytest.mark.parametrize("block", [1, 7, 25, 50, 1000])
def test_every_block_gives_optax_cross_entropy_and_its_gradients(block):
    """7 does not divide the 50 tokens of a row."""
    rows = random_rows()
    hidden, head = jax.random.normal(jax.random.key(0), (3, 50, 16)), jax.random.normal(jax.random.key(1), (16, 448))
    ours = jax.jit(jax.value_and_grad(lambda h, w: loss_and_count(h, w, rows, block), (0, 1), has_aux=True))
    (total, count), gradients = ours(hidden, head)
    theirs = jax.value_and_grad(lambda h, w: plain(h @ w, rows), (0, 1), has_aux=True)
    (expected, expected_count), expected_gradients = theirs(hidden, head)
    assert int(count) == expected_count and 0 < expected_count < rows.tokens.size / 2
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("tied", "lora"),
    [(False, None), (True, None), (False, LoraConfig(rank=4))],
    ids=["full, untied", "full, tied", "lora"],
)
def test_gradients_reach_every_weight(tied, lora):
    model, rows = Llama(replace(SMALL, tie_word_embeddings=tied), lora), random_rows()
    variables = initialize(model, jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
    if lora is not None:  # b is not zero, or a has no gradient
        noise = lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
        variables["lora"] = jax.tree.map(noise, variables["lora"])
    trained = "params" if lora is None else "lora"

    def blocked(variables):
        hidden, _ = model.apply(variables, rows.tokens, rows.positions, rows.segments, method="hidden")
        return loss_and_count(hidden, model.apply(variables, method="head"), rows, 16)[0]

    def whole(variables):
        return plain(model.apply(variables, rows.tokens, rows.positions, rows.segments)[0], rows)[0]

    (found, ours), (wanted, theirs) = (
        jax.jit(jax.value_and_grad(lambda x, loss=loss: loss({**variables, trained: x})))(variables[trained])
        for loss in (blocked, whole)
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert 0 < np.linalg.norm(b) and np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b)


def test_logits_are_made_once_and_a_frozen_head_gets_no_gradient():
    """By the compiled products of one block: logits; for the gradient of the tokens one more, of the head one more."""
    rows = random_rows()
    hidden, head = jnp.ones((3, 50, 64)), jnp.ones((64, 448))

    def products(*arguments: int) -> float:
        loss = lambda h, w: loss_and_count(h, w, rows, 25)[0]  # noqa: E731
        step = jax.grad(loss, arguments) if arguments else loss
        flops = jax.jit(step).lower(hidden, head).compile().cost_analysis()["flops"]
        return flops / (2 * 3 * 25 * 64 * 448)  # XLA counts a loop's body once

    assert [round(products(*arguments)) for arguments in ((), (0,), (0, 1))] == [1, 2, 3]


@pytest.mark.parametrize("kept", [jnp.bfloat16, jnp.float32])
def test_gradients_of_bfloat16_are_rounded_like_their_factors(kept):
    """Within 1 % of the largest of what float32 gives for the same numbers; the loss within 1e-6, as its logits are.
    The head may be wider than the tokens, and then its gradient is not rounded."""
    rows = random_rows()
    hidden, head = jax.random.normal(jax.random.key(0), (3, 50, 16)), jax.random.normal(jax.random.key(1), (16, 448))
    half = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16).astype(kept)
    loss = jax.jit(jax.value_and_grad(lambda h, w: loss_and_count(h, w, rows, 25)[0], (0, 1)))
    (found, gradients), (expected, wanted) = loss(*half), loss(*(x.astype(jnp.float32) for x in half))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for given, ours, theirs in zip(half, gradients, wanted, strict=True):
        assert ours.dtype == given.dtype
        assert (ours == ours.astype(jnp.bfloat16)).all() == (given.dtype == jnp.bfloat16)
        assert 0 < np.abs(ours.astype(jnp.float32) - theirs).max() < 0.01 * np.abs(theirs).max()


def test_gradients_follow_what_is_made_of_the_loss():
    """Thrice the loss has thrice its gradients, of tokens and head."""
    rows = random_rows()
    hidden, head = jax.random.normal(jax.random.key(0), (3, 50, 16)), jax.random.normal(jax.random.key(1), (16, 448))
    once, thrice = (
        jax.jit(jax.grad(lambda h, w, times=times: times * loss_and_count(h, w, rows, 25)[0], (0, 1)))(hidden, head)
        for times in (1.0, 3.0)
    )
    for found, wanted in zip(thrice, once, strict=True):
        np.testing.assert_allclose(found, 3 * wanted, rtol=1e-6, atol=0)
        assert np.abs(wanted).max() > 0


def test_logits_are_made_only_where_a_loss_is_taken():
    """In each row 10 tokens count, here and there: of blocks of 10, one is computed. What does not count is nan, which
    every product with it would show."""
    rng = np.random.default_rng(0)
    counted = np.zeros((3, 50), bool)
    for row in counted:
        row[rng.choice(np.arange(1, 50), 10, replace=False)] = True
    tokens = jnp.asarray(rng.integers(0, 448, (3, 50), dtype=np.int32))
    ones = jnp.ones((3, 50), jnp.int32)
    rows = Rows(tokens, ones, jnp.broadcast_to(jnp.arange(50), (3, 50)), jnp.asarray(counted))
    hidden, head = jax.random.normal(jax.random.key(0), (3, 50, 16)), jax.random.normal(jax.random.key(1), (16, 448))
    (expected, count), wanted = jax.value_and_grad(lambda h, w: plain(h @ w, rows), (0, 1), has_aux=True)(hidden, head)
    before = np.pad(counted[:, 1:], ((0, 0), (0, 1)))  # a token is predicted from the one before it
    hidden = jnp.where(before[..., None], hidden, jnp.nan)
    loss = jax.jit(jax.value_and_grad(lambda h, w: loss_and_count(h, w, rows, 10), (0, 1), has_aux=True))
    (found, ours), gradients = loss(hidden, head)
    assert int(ours) == count == 30
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for found, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
