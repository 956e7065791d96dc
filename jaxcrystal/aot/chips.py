"""TPU chips and their torus: what each can do at best, and how long a program must take on it at least.

    step time ≥ max( FLOPs / peak,  HBM bytes / HBM bandwidth,  Σ bytes received / (links · link bandwidth) )

It is a bound from below: all three overlap perfectly, and a collective over chips that lie along k axes of the torus
receives over 2 k links at full speed (an edge of a small slice has fewer).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcrystal.aot.work import Work
from jaxcrystal.errors import UserError
from jaxcrystal.training import speed

ROOFLINE = "max(FLOPs / peak, HBM bytes / HBM bandwidth, sum of bytes received / (2 links an axis x link bandwidth))"


@dataclass(frozen=True)
class Chip:
    """One chip, by Google's data sheets of Cloud TPU; `usable_hbm` is what its compiler lets a program have."""

    name: str
    peak: float  #: bfloat16 FLOP/s
    hbm: float  #: GiB, nominal
    usable_hbm: float  #: GiB: the limit that libtpu 0.0.42's compiler names when a program exceeds it
    hbm_bandwidth: float  #: bytes/s
    link_bandwidth: float  #: bytes/s of one link, one way: the chip's interconnect over its 4 (2D) or 6 (3D) links
    options: dict[str, str] = field(default_factory=dict)  #: for the topology: one device a chip, not one a core


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", speed.PEAK["TPU v4"], 32, 30.75, 1228e9, 2400e9 / 8 / 6, {"chip_config_name": "megacore"}),
        Chip("v5e", speed.PEAK["TPU v5 lite"], 16, 15.75, 819e9, 1600e9 / 8 / 4),
        Chip("v5p", speed.PEAK["TPU v5p"], 95, 95.74, 2765e9, 4800e9 / 8 / 6),
        Chip("v6e", speed.PEAK["TPU v6"], 32, 31.25, 1600e9, 3200e9 / 8 / 4),
    )
}


@dataclass(frozen=True)
class Bound:
    """Seconds that each resource of a chip needs at least."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def resource(self) -> str:
        """What the bound comes from."""
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))


def topology(name: str) -> tuple[Chip, Sequence[jax.Device]]:
    """Chip and devices of `v5e:4x4`, `v5p:4x4x4`, ...; no such devices are needed, libtpu describes them.

    Raises UserError for a chip or shape that is not known, or where libtpu is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not shape:
        raise UserError(f"topology {name!r}: write CHIP:SHAPE, CHIP one of {', '.join(CHIPS)}; for example v5e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('libtpu, TPU\'s compiler, is not installed: pip install -c constraints.txt ".[tpu]"')
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **CHIPS[kind].options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"topology {name!r}: {str(error).splitlines()[0]}") from None
    return CHIPS[kind], found.devices


def torus_axes(mesh: Mesh, group: Sequence[int]) -> int:
    """Along how many axes of the torus the chips of a group (partitions, numbered as in `mesh`) differ."""
    devices = mesh.devices.ravel()
    places = np.array([devices[partition].coords for partition in group])
    return int((places != places[0]).any(axis=0).sum())


def mesh_axes(mesh: Mesh, group: Sequence[int]) -> str:
    """The mesh axes along which a group lies, and its size: `fsdp 16`."""
    places = np.array(np.unravel_index(np.array(group), mesh.devices.shape))
    names = [axis for axis, place in zip(mesh.axis_names, places, strict=True) if (place != place[0]).any()]
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in names) or "one chip"


def bound(chip: Chip, mesh: Mesh, work: Work) -> Bound:
    """The roofline of one run, by the formula above."""
    messages = sum(
        times * collective.received / (2 * max(torus_axes(mesh, collective.group), 1) * chip.link_bandwidth)
        for collective, times in work.collectives.items()
    )
    return Bound(work.flops / chip.peak, work.hbm_bytes / chip.hbm_bandwidth, messages)
