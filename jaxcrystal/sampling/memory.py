"""How many crystals can be drawn at once: what slots take on a device, and what is left there beside the model."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.engine import Engine

SHARE = 0.92  #: of a device's memory that programs may take together
MOST = 512  #: slots of a copy that are chosen at most: a step of a large model takes longer with more
DEFAULT = 64  #: slots of a copy where a device does not report its memory, as CPUs do not
FEW = 8  #: slots from which on memory grows by as much for each


def memory_left(mesh: Mesh) -> int | None:
    """Bytes that are left on each device of this process, on the fullest one; None where they do not report it."""
    memory = [device.memory_stats() for device in mesh.local_devices]
    if not all(stats and "bytes_limit" in stats for stats in memory):
        return None
    return min(int(SHARE * stats["bytes_limit"]) - stats["bytes_in_use"] for stats in memory)


def fitting(
    make: Callable[[int], Engine], slots: int | None, most: int, memory: Callable[[Engine], int], left: int | None
) -> Engine:
    """The engine that `make` makes of a copy's number of slots: `slots` if given, else as many as fit, up to `most`.

    `memory` gives the bytes that an engine needs on each device, of which there are `left`. Raises UserError that says
    how many slots would fit, where those asked for do not, or not even one does.
    """
    if left is None:
        return make(min(DEFAULT if slots is None else slots, most))
    few, twice = memory(make(FEW)), memory(make(2 * FEW))
    fit = FEW + FEW * (left - few) // (twice - few)
    while fit > 0 and memory(make(fit)) > left:
        fit -= 1
    slots = min(max(fit, 1), MOST, most) if slots is None else min(slots, most)
    engine = make(slots)
    if slots > fit:
        remedy = f"{fit} would fit" if fit > 0 else "share a copy of the model among more devices (--tensor)"
        raise UserError(
            f"{slots} slots take {memory(engine) / 2**30:.2f} GiB on each device, and {left / 2**30:.2f} are left "
            f"there beside the model: {remedy}; a cache of int8 takes less for each"
        )
    return engine
