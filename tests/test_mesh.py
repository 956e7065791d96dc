"""Meshes that can and cannot be formed, and arrays that can and cannot be laid on one."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import (
    batch_sharding,
    check_activations,
    check_divides,
    constrain,
    copies_mesh,
    make_mesh,
    replicated,
    sharding,
    spec,
    widest_mesh,
)


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
    ],
)
def test_a_mesh_that_cannot_be_formed(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_many_hosts_leave_no_device_out():
    devices = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match="needs 4 devices, all hosts together have 8: a run on many hosts uses all of"):
        make_mesh(MeshConfig(1, 4, 1), devices)


@dataclass(frozen=True)
class Chip:
    """A TPU that is not there."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v5"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def torus(*sizes):
    return [Chip(i, place) for i, place in enumerate(np.ndindex(*sizes))]


def apart(one, other):
    """Links between two chips of a torus of 4 x 4 x 4."""
    return sum(min((a - b) % 4, (b - a) % 4) for a, b in zip(one.coords, other.coords, strict=True))


def test_a_mesh_lies_on_the_torus():
    mesh = make_mesh(MeshConfig(1, 16, 4), torus(4, 4, 4))
    assert all(apart(a, b) == 1 for row in mesh.devices[0] for a, b in zip(row, np.roll(row, 1), strict=True))


def test_an_axis_of_the_torus_is_divided_where_the_mesh_has_no_such_size():
    mesh = make_mesh(MeshConfig(1, 8, 8), torus(4, 4, 4))
    assert mesh.devices.shape == (1, 8, 8) and len(set(mesh.devices.flat)) == 64
    for row in mesh.devices[0]:  # two of its halves and a whole one
        assert sorted(len({chip.coords[axis] for chip in row}) for axis in range(3)) == [1, 2, 4]


def test_chips_that_form_no_torus_are_refused():
    with pytest.raises(
        UserError, match=r"mesh data 1 x fsdp 3 x tensor 1: 3 devices of kind TPU v5 do not form it .* change"
    ):
        make_mesh(MeshConfig(1, 3, 1), torus(2, 2, 1))


def test_names_mean_mesh_axes():
    assert spec(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert spec((None, "batch")) == PartitionSpec(None, ("data", "fsdp"))
    with pytest.raises(UserError, match="up_proj: axes 'batch' and 'embed' both claim the mesh axis 'fsdp'"):
        spec(("batch", "embed"), "up_proj")


def test_sizes_that_do_not_divide():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    sharding(mesh, ("batch", None), (8, 3), "tokens")
    with pytest.raises(UserError, match=r"tokens: its axis 'batch' of size 6 .* data x fsdp of size 4"):
        sharding(mesh, ("batch", None), (6, 3), "tokens")


@pytest.mark.parametrize(
    "model, rows, accumulate, message",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 8, 1, r"_heads\): its axis 'heads' of size 6 "),
        ({"num_key_value_heads": 2}, 8, 1, r"num_key_value_heads\): its axis 'kv_heads' of size 2 .* tensor of size 4"),
        ({}, 7, 1, r"data.rows_per_batch\): its axis 'batch' of size 7 .* data x fsdp of size 2"),
        ({}, 6, 2, r"rows_per_batch / data.accumulate\): its axis 'batch' of size 3 .* data x fsdp of size 2"),
        ({}, 8, 3, r"data.rows_per_batch is 8; it must be a multiple of data.accumulate, 3"),
    ],
)  # fmt: skip
def test_activations_that_do_not_divide(model, rows, accumulate, message):
    """A key's kernel has heads x head_dim columns, which four devices could divide: two heads they cannot."""
    mesh, shape = make_mesh(MeshConfig(2, 1, 4)), {"num_attention_heads": 8, "num_key_value_heads": 4}
    check_activations(mesh, LlamaConfig(**shape), 8, 2)
    with pytest.raises(UserError, match=message):
        check_activations(mesh, LlamaConfig(**shape | model), rows, accumulate)


def test_batches_and_copies():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    x = jnp.zeros((8, 6))
    assert jax.device_put(x, batch_sharding(mesh)).addressable_shards[0].data.shape == (2, 6)
    assert jax.device_put(x, replicated(mesh)).addressable_shards[0].data.shape == (8, 6)


def test_constrain_follows_the_mesh_that_is_set():
    x = jnp.zeros((8, 6))
    laid = jax.jit(lambda x: constrain(x, "batch", "vocab"))
    assert len(laid(x).sharding.device_set) == 1
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert laid(x).addressable_shards[0].data.shape == (2, 3)


def test_a_copy_of_the_model_stays_on_the_devices_of_its_process():
    devices = jax.devices()
    assert dict(copies_mesh(2, devices[:4]).shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    for tensor in (8, 3, 0):
        with pytest.raises(UserError, match=f"--tensor is {tensor}, and this process has 4 .* one of 1, 2, 4, or"):
            copies_mesh(tensor, devices[:4])


def test_the_widest_mesh_is_of_as_many_devices_as_divide():
    assert widest_mesh(lambda mesh: check_divides(mesh, "embed", 64, "x")).shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert widest_mesh(lambda mesh: check_divides(mesh, "embed", 9, "x")).shape == {"data": 1, "fsdp": 3, "tensor": 1}
    assert widest_mesh(lambda mesh: check_divides(mesh, "embed", 11, "x")).size == 1
