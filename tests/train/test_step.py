"""One step: the same on every mesh, and it moves what it should and nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, crystal_set

from jaxcrystal.config import LoraConfig, MeshConfig, OptimizerConfig
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.train.loss import next_token_loss
from jaxcrystal.train.packing import Feed
from jaxcrystal.train.step import Trainer, make_optimizer

LENGTH = 384


def run(mesh_config, lora, tokenizer, writer, steps=4, learning_rate=1e-2):
    """Losses and the final state of a few steps on a mesh."""
    mesh = make_mesh(mesh_config)
    model = Llama(SMALL, lora)
    feed = Feed.of(crystal_set(60), tokenizer, writer, LENGTH, rows_per_batch=8, seed=0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=learning_rate, warmup_steps=1), steps)
    trainer = Trainer(model, writer, optimizer, mesh, LENGTH)
    state = trainer.start(initialize(model, jax.random.key(7), mesh))
    before = jax.device_get(state)
    table = feed.epoch(0)
    place = lambda i: jax.device_put(feed.batch(table[i % len(table)]), batch_sharding(mesh))  # noqa: E731
    step, evaluate = trainer.compile_train(state, place(0)), trainer.compile_eval(state, place(0))
    losses = []
    for i in range(steps):
        state, metrics = step(state, place(i), feed.key(0))
        losses.append(float(metrics.loss))
    return losses, before, jax.device_get(state), float(evaluate(state, place(0), feed.key(0)).loss)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.0)], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1), MeshConfig(8, 1, 1)], ids=str)
def test_every_mesh_gives_the_same_losses(mesh, lora, tokenizer, writer):
    one, _, state_one, eval_one = run(MeshConfig(1, 1, 1), lora, tokenizer, writer)
    many, _, state_many, eval_many = run(mesh, lora, tokenizer, writer)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
    assert eval_many == pytest.approx(eval_one, abs=1e-5)
    assert one[-1] < one[0] - 0.1 or lora  # it learns; adapters on random weights do so slowly
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state_one.trained, state_many.trained)


def test_adapters_move_and_the_base_does_not(tokenizer, writer):
    _, before, after, _ = run(MeshConfig(1, 1, 1), LoraConfig(rank=4), tokenizer, writer)
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before.trained, after.trained)), strict=True))
    moments = [x.shape for x in jax.tree.leaves(after.optimizer) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(after.trained)])


def test_dropout_is_applied_in_training_and_not_in_validation(tokenizer, writer):
    wet = run(MeshConfig(1, 1, 1), LoraConfig(rank=4, dropout=0.5), tokenizer, writer, steps=3, learning_rate=0.1)
    dry = run(MeshConfig(1, 1, 1), LoraConfig(rank=4, dropout=0.0), tokenizer, writer, steps=3, learning_rate=0.1)
    assert wet[0][0] == dry[0][0]  # b is zero: nothing to drop yet
    assert wet[0][2] != dry[0][2]
    wet_again = run(MeshConfig(1, 1, 1), LoraConfig(rank=4, dropout=0.5), tokenizer, writer, steps=3, learning_rate=0.1)
    assert wet[0] == wet_again[0] and wet[3] == wet_again[3]


def test_a_packed_row_has_the_loss_of_its_crystals_alone(tokenizer, writer):
    """Neighbours in a row do not see each other, nor does one predict another's first token."""
    feed = Feed.of(crystal_set(30), tokenizer, writer, 512, rows_per_batch=4, seed=0)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    model, key = Llama(SMALL), feed.key(0)
    variables = initialize(model, jax.random.key(0), mesh)

    @jax.jit
    def loss(examples):
        rows = writer.write(examples, writer.draw(key, examples), 512)
        hidden, _ = model.apply(variables, rows.tokens, rows.positions, rows.segments, method="hidden")
        return next_token_loss(hidden, model.apply(variables, method="head"), rows, 256, model.rules)

    packed = [loss(feed.batch(batch)) for batch in feed.epoch(0)]
    alone = [loss(feed.batch(np.array([[i]]))) for i in range(30)]
    assert sum(int(n) for _, n in packed) == sum(int(n) for _, n in alone)
    assert sum(float(x) for x, _ in packed) == pytest.approx(sum(float(x) for x, _ in alone), rel=1e-5)


def test_every_setting_of_the_optimizer_shows():
    base = OptimizerConfig(learning_rate=0.1, warmup_steps=2, clip_norm=1.0)
    start = {"w": jnp.ones(4)}

    def path(config, steps=10):
        # Gradients that turn and whose size varies: Adam sees neither moment nor clipping of one that does not.
        optimizer = make_optimizer(config, steps)
        state, w, values = optimizer.init(start), start, []
        for i in range(steps):
            updates, state = optimizer.update({"w": jnp.sin(jnp.arange(4.0) + i) * (0.2 + i % 3)}, state, w)
            w = optax.apply_updates(w, updates)
            values.append(w["w"])
        return np.array(values)

    reference = path(base)
    assert (reference[0] == 1).all()  # the first step of the warm-up has rate 0
    for change in (
        {"learning_rate": 0.05}, {"warmup_steps": 4}, {"final_fraction": 0.5}, {"weight_decay": 0.1}, {"beta1": 0.5},
        {"beta2": 0.9}, {"clip_norm": 0.1},
    ):  # fmt: skip
        assert not np.allclose(path(replace(base, **change)), reference, atol=1e-6), change
