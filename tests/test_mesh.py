"""Meshes that can and cannot be formed, and rules that can and cannot lay an array on one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxcrystal.config import MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import ShardingRules, batch_sharding, make_mesh, replicated


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(-1, 2, 2), (2, 2, 2)),
        (MeshConfig(1, 1, -1), (1, 1, 8)),
        (MeshConfig(1, 2, 1), (1, 2, 1)),
    ],
)
def test_sizes(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == sizes


def test_devices_may_be_chosen():
    assert list(make_mesh(MeshConfig(), jax.devices()[4:6]).devices.flat) == jax.devices()[4:6]


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(2, 3, 2), r"data 2 x fsdp 3 x tensor 2 needs 12 devices, there are 8"),
        (MeshConfig(3, -1, 1), r"data 3 x fsdp -1 x tensor 1: 8 devices cannot be divided"),
        (MeshConfig(16, -1, 1), r"8 devices cannot be divided"),
        (MeshConfig(-1, -1, 1), r"one of them may be -1"),
        (MeshConfig(0, 1, 1), r"sizes are positive"),
    ],
)
def test_a_mesh_that_cannot_be_formed(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_rules_name_mesh_axes():
    rules = ShardingRules(mlp=("fsdp", "tensor"))
    assert rules.spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert rules.spec((None, "mlp")) == PartitionSpec(None, ("fsdp", "tensor"))
    with pytest.raises(UserError, match="up_proj: axes 'embed' and 'mlp' both claim the mesh axis 'fsdp'"):
        rules.spec(("embed", "mlp"), "up_proj")


def test_sizes_that_do_not_divide():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    ShardingRules().sharding(mesh, ("batch", None), (8, 3), "tokens")
    with pytest.raises(UserError, match=r"tokens: its axis 'batch' of size 6 .* data x fsdp of size 4"):
        ShardingRules().sharding(mesh, ("batch", None), (6, 3), "tokens")


def test_batches_and_copies():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    x = jnp.zeros((8, 6))
    assert jax.device_put(x, batch_sharding(mesh)).addressable_shards[0].data.shape == (2, 6)
    assert jax.device_put(x, replicated(mesh)).addressable_shards[0].data.shape == (8, 6)


def test_constrain_follows_the_mesh_that_is_set():
    x = jnp.zeros((8, 6))
    constrain = jax.jit(lambda x: ShardingRules().constrain(x, "batch", "vocab"))
    assert len(constrain(x).sharding.device_set) == 1
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert constrain(x).addressable_shards[0].data.shape == (2, 3)
