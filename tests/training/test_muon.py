"""Muon takes each layer's kernels alone, as optax's own does of layers that are not stacked; the rest is AdamW's."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, losses
from test_step import DRY, random_run, random_trainer, start_values

from jaxcrystal.config import DataConfig, MeshConfig, OptimizerConfig, Recipe
from jaxcrystal.errors import UserError
from jaxcrystal.training.loop import train
from jaxcrystal.training.step import learning_rate, make_optimizer

STEPS = 6
CONFIG = OptimizerConfig(3e-3, warmup_steps=2, weight_decay=0.1, clip_norm=1e6, name="muon")


def gradients(variables, step):
    """Of a size and direction that depend on the place and the step."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(step), len(leaves))
    return tree.unflatten([jax.random.normal(k, x.shape) * (1 + step) for k, x in zip(keys, leaves, strict=True)])


def path(optimizer, variables, gradients_of):
    state = optimizer.init(variables)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(gradients_of(step), state, variables)
        variables = optax.apply_updates(variables, updates)
    return variables


def unstacked(variables):
    """Each layer's arrays under a name of their own."""
    layers = jax.tree.leaves(variables["layers"])
    return {
        f"{number} {layer}": leaf[layer] for number, leaf in enumerate(layers) for layer in range(leaf.shape[0])
    } | {name: value for name, value in variables.items() if name != "layers"}


@pytest.mark.parametrize("lora", [None, DRY], ids=["all weights", "adapters"])
def test_stacked_layers_go_the_way_of_layers_alone(lora):
    """Float32; each number within 1e-6, at steps that move a weight by 6e-4 in root mean square."""
    variables = start_values(SMALL, lora)["params" if lora is None else "lora"]
    ours = path(make_optimizer(CONFIG, STEPS), variables, lambda step: gradients(variables, step))
    rate = learning_rate(CONFIG, STEPS)
    # optax's own rule: Muon for whatever has two axes. What ours gives to AdamW has none but one here.
    alone = optax.contrib.muon(rate, beta=0.95, weight_decay=0.1, consistent_rms=0.2)
    theirs = path(alone, unstacked(variables), lambda step: unstacked(gradients(variables, step)))
    adamw = optax.adamw(rate, weight_decay=0.1)
    plain = path(adamw, unstacked(variables), lambda step: unstacked(gradients(variables, step)))
    moved = 0
    for name, found in unstacked(ours).items():
        matrix = name not in variables and jnp.ndim(found) == 2
        expected = (theirs if matrix else plain)[name]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected)
        if matrix:
            moved += 1
            assert np.abs(found - plain[name]).max() > 1e-3  # AdamW goes elsewhere
    assert moved == SMALL.num_hidden_layers * (7 if lora is None else 4)


@pytest.mark.parametrize(("mesh", "lora"), [((2, 2, 2), None), ((1, 8, 1), DRY)], ids=["2x2x2 full", "1x8x1 lora"])
def test_a_mesh_gives_the_same_losses_and_weights(mesh, lora):
    (one, trained, *_), (many, after, *_) = (
        random_run(steps=4, lora=lora, mesh=shape, optimizer="muon") for shape in ((1, 1, 1), mesh)
    )
    np.testing.assert_allclose([m.loss for m in many], [m.loss for m in one], rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), after, trained)
    assert one[-1].loss < one[1].loss  # the first step's rate is 0


def test_the_momentum_lies_where_its_kernel_does():
    """And there is one array of it for a kernel, where AdamW keeps two."""
    _, state, _ = random_trainer(mesh=(2, 2, 2), optimizer="muon")
    is_state = lambda x: isinstance(x, optax.contrib.MuonState)  # noqa: E731
    (muon,) = filter(is_state, jax.tree.leaves(state.optimizer, is_leaf=is_state))
    for name in ("gate_proj", "down_proj"):
        momentum, kernel = (tree["layers"]["mlp"][name]["kernel"] for tree in (muon.mu, state.trained))
        assert momentum.sharding == kernel.sharding and "fsdp" in str(kernel.sharding.spec)
    kernels = sum(x.size for path, x in jax.tree.leaves_with_path(state.trained["layers"]) if "kernel" in str(path))
    rest = sum(x.size for x in jax.tree.leaves(state.trained)) - kernels
    assert sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim) == kernels + 2 * rest + 3  # coefficients


def test_a_stopped_run_goes_on_bit_for_bit(files, tmp_path):
    """And its checkpoint is not taken up by AdamW."""
    data = DataConfig(**files, tokens_per_row=384, rows_per_batch=4, validation_rows=4)
    recipe = Recipe(
        str(tmp_path / "whole"), model=SMALL, data=data, optimizer=replace(CONFIG, warmup_steps=0), steps=6,
        checkpoint_every=3, log_every=1, mesh=MeshConfig(1, 1, 1),
    )  # fmt: skip
    train(recipe)
    parts = replace(recipe, out=str(tmp_path / "parts"))
    train(parts)
    shutil.rmtree(tmp_path / "parts/checkpoints/6")
    train(parts)
    assert losses(parts.out) == losses(recipe.out) and len(losses(recipe.out)) == 6
    with pytest.raises(UserError, match=r"optimizer\.name is muon there, adamw here"):
        train(replace(parts, optimizer=replace(parts.optimizer, name="adamw")))
