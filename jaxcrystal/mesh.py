"""Where arrays live: a mesh of devices with the axes (data, fsdp, tensor), and which array axis goes to which.

    data     rows of a batch are divided, parameters are copied
    fsdp     rows of a batch are divided, and so is every parameter; a layer is gathered when it is used
    tensor   heads, the feed-forward width and the vocabulary are divided

A model names the axes of its arrays (`embed`, `heads`, ...); `MESH_AXES` alone says over which mesh axes each name is
divided, so that the whole strategy changes by changing that one mapping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcrystal.config import LlamaConfig, MeshConfig
from jaxcrystal.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:  # noqa: B008
    """The mesh of the sizes in `config`, on the first of `devices` (default: all that JAX sees).

    Raises UserError, naming the sizes, where the devices cannot form it.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if -1 in sizes:
        rest, remainder = divmod(len(devices), math.prod(size for size in sizes if size != -1))
        if remainder or not rest:
            raise UserError(f"mesh {wanted}: {len(devices)} devices cannot be divided so; change mesh.* in the recipe")
        sizes[sizes.index(-1)] = rest
    needed = math.prod(sizes)
    if needed > len(devices):
        raise UserError(f"mesh {wanted} needs {needed} devices, there are {len(devices)}; change mesh.* in the recipe")
    if needed < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"mesh {wanted} needs {needed} devices, all hosts together have {len(devices)}: a run on many hosts uses "
            "all of them; change mesh.* in the recipe"
        )
    return _placed(sizes, devices[:needed], wanted)


def widest_mesh(fits: Callable[[Mesh], object]) -> Mesh:
    """All devices along fsdp; on one host fewer, as many as `fits` does not refuse with a UserError."""
    devices = jax.devices()
    if jax.process_count() > 1:
        return make_mesh(devices=devices)
    for n in range(len(devices), 1, -1):
        try:
            fits(mesh := make_mesh(MeshConfig(1, n, 1), devices))
        except UserError:
            continue
        return mesh
    return make_mesh(MeshConfig(1, 1, 1), devices)


def copies_mesh(tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Copies of a model, each on `tensor` of this process's devices (default: all that it has).

    Raises UserError where they cannot be divided so: a copy does not span processes.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    if tensor < 1 or len(devices) % tensor:
        fits = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise UserError(
            f"--tensor is {tensor}, and this process has {len(devices)} devices, which hold a copy whole; "
            f"choose one of {fits}, or hosts with more devices (docs/tpu.md says which model is sampled where)"
        )
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor), devices)


def _placed(sizes: Sequence[int], devices: Sequence[jax.Device], wanted: str) -> Mesh:
    """Neighbours on the mesh are neighbours on the torus, as far as its shape lets them."""
    types = (AxisType.Auto,) * len(AXES)
    try:
        try:
            return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # some size is no product of axes of the torus: divide these, as 4 x 4 x 4 in 8 x 8
            return Mesh(create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES, axis_types=types)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"mesh {wanted}: {len(devices)} devices of kind {devices[0].device_kind} do not form it ({error}); change "
            "mesh.* in the recipe to sizes whose product is that of axes of the torus"
        ) from None


#: Over which mesh axes an axis of this name is divided; an axis without a name is whole on every device.
MESH_AXES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # the hidden width of parameters; that of activations has no name
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "rank": (),  # the short axis of an adapter
    "layers": (),  # the axis along which the layers' parameters are stacked
    None: (),
}


def parts(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """Into how many an axis of this name is divided on `mesh`."""
    return math.prod(mesh.shape.get(axis, 1) for axis in MESH_AXES[name])


def spec(names: Sequence[str | None], tensor: str = "array") -> PartitionSpec:
    """The PartitionSpec of an array with these axis names. Raises UserError where two axes claim one mesh axis."""
    owner: dict[str, str | None] = {}
    for name in names:
        for axis in MESH_AXES[name]:
            if axis in owner:
                raise UserError(f"{tensor}: axes {owner[axis]!r} and {name!r} both claim the mesh axis {axis!r}")
            owner[axis] = name
    return PartitionSpec(*(MESH_AXES[name] or None for name in names))


def sharding(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int], tensor: str) -> NamedSharding:
    """How the array called `tensor` lies on `mesh`. Raises UserError on collision or where sizes do not divide."""
    for name, size in zip(names, shape, strict=True):
        check_divides(mesh, name, size, tensor)
    return NamedSharding(mesh, spec(names, tensor))


def check_divides(mesh: Mesh, name: str | None, size: int, tensor: str) -> None:
    """Raises UserError where the axis `name` of `tensor`, of this size, cannot be divided over `mesh`."""
    if size % parts(mesh, name):
        raise UserError(
            f"{tensor}: its axis {name!r} of size {size} cannot be divided over the mesh axis "
            f"{' x '.join(MESH_AXES[name])} of size {parts(mesh, name)}; change mesh.* or the size"
        )


def check_activations(mesh: Mesh, model: LlamaConfig, rows: int, accumulate: int = 1) -> None:
    """Raises UserError where `mesh` does not fit what no parameter's shape shows: whole heads, a batch's rows.

    A kernel knows only heads times their width, which may be divisible where the heads are not. (The vocabulary is
    an axis of the embedding, and checked with it.)
    """
    if rows % accumulate:
        raise UserError(f"data.rows_per_batch is {rows}; it must be a multiple of data.accumulate, {accumulate}")
    batch = "tokens of a batch (data.rows_per_batch" + (" / data.accumulate)" if accumulate > 1 else ")")
    check_divides(mesh, "heads", model.num_attention_heads, "queries (model.num_attention_heads)")
    check_divides(mesh, "kv_heads", model.num_key_value_heads, "keys and values (model.num_key_value_heads)")
    check_divides(mesh, "batch", rows // accumulate, batch)


def platform() -> str:
    """Where the program will run: the platform of the mesh of `jax.set_mesh`, or JAX's default (cpu, gpu, tpu)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by these axis names on the mesh of `jax.set_mesh`; unchanged where none is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def gather(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """`x`, whose axes bear these names, whole along what divides the batch: an all-gather over fsdp before a product.

    Left alone, the compiler decodes codes first and gathers more bytes, or sends floats around a ring of chips and adds
    up a product's parts in bfloat16.
    """
    batch = set(MESH_AXES["batch"])
    return constrain(x, *(None if batch & set(MESH_AXES[name]) else name for name in names))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """As `gather`, but its gradient is laid out as `x` is; the transpose would lay it out whole, on every device."""
    return gather(x, names)


gathered.defvjp(lambda x, names: (gathered(x, names), None), lambda names, _, dx: (constrain(dx, *names),))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over data and fsdp, whatever axes follow: for tokens, masks and keys of rows."""
    return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
