"""Relaxations per second, many crystals in one graph against each package's own relaxer, one crystal after the other.

    python benchmarks/relax.py                        M3GNet against matgl's Relaxer, CHGNet against its StructOptimizer
    python benchmarks/relax.py --potential chgnet     one of them
    python benchmarks/relax.py --device cuda          both sides on a GPU
    python benchmarks/relax.py --quick                a check that it runs; its figures mean nothing

It is asserted first that both sides give every crystal the same energy, forces and stress. Then they take turns on
parts of the crystals, one process and one thread each on a CPU: there seconds of CPU are reported, since others may
share the cores; on a GPU seconds. All settings are the same: FIRE, atoms and cell, fmax 0.1 eV/Å, at most 500 steps.
"""

from __future__ import annotations

import os

os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")})

import argparse
import contextlib
import io
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import numpy as np

from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.reader.reading import read
from jaxcrystal.relaxation.batch import RelaxationSettings, relax_together
from jaxcrystal.relaxation.potentials import Potential, load_potential
from jaxcrystal.relaxation.systems import Systems

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator
    from pymatgen.core import Structure

SHARED = Path(__file__).parents[1].parent / "shared"
GENERATED = SHARED / "data/generated/diffcsp_mp20.parquet"
M3GNET = SHARED / "potentials/M3GNet-MP-2021.2.8-PES"
SETTINGS = RelaxationSettings(fmax=0.1, max_steps=500)
PART = 50  #: crystals that a side relaxes before the other has its turn

#: Largest differences of single points: eV/atom, eV/Å relative to the largest force or 1, eV/Å³.
TOLERANCE = {"energy": 1e-4, "force": 1e-3, "stress": 1e-4}
CLOSE = 0.005  #: eV/atom within which two relaxed energies are the same


@dataclass(frozen=True)
class Peer:
    """A package's own relaxer."""

    name: str
    calculator: Calculator
    relax: Callable[[Structure], float]  #: the relaxed energy in eV


def matgl(device: str) -> Peer:
    """Messages summed at the destination, as these weights were trained (shared/README.md)."""
    from matgl.apps.pes import Potential as Published
    from matgl.ext.ase import PESCalculator, Relaxer
    from matgl.layers._graph_convolution import M3GNetGraphConv
    from matgl.utils.maths import scatter_add
    from torch import hstack

    def node_update(conv, edge_index, edge_feat, node_feat, rbf, state, num_nodes):
        source, destination = edge_index
        messages = conv.node_update_func(hstack([node_feat[source], node_feat[destination], edge_feat]))
        return scatter_add(messages * conv.node_weight_func(rbf), destination, dim_size=num_nodes, dim=0)

    model = Published.load(M3GNET).to(device).eval()
    for module in model.modules():
        if type(module) is M3GNetGraphConv:
            module.node_update_ = types.MethodType(node_update, module)
    relaxer = Relaxer(model)

    def relax(structure: Structure) -> float:
        found = relaxer.relax(structure, fmax=SETTINGS.fmax, steps=SETTINGS.max_steps)
        return float(found["trajectory"].energies[-1])

    return Peer("matgl's Relaxer", PESCalculator(model, stress_unit="eV/A3", use_voigt=False), relax)


def chgnet(device: str) -> Peer:
    from chgnet.model import CHGNet, CHGNetCalculator, StructOptimizer

    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.load(use_device=device, verbose=False)
        optimizer = StructOptimizer(model, use_device=device)

    def relax(structure: Structure) -> float:
        found = optimizer.relax(structure, fmax=SETTINGS.fmax, steps=SETTINGS.max_steps, verbose=False)
        return float(found["trajectory"].energies[-1])

    return Peer("CHGNet's StructOptimizer", CHGNetCalculator(model, use_device=device), relax)


POTENTIALS: dict[str, tuple[str, Callable[[str], Peer]]] = {
    "m3gnet": (str(M3GNET), matgl),
    "chgnet": ("chgnet", chgnet),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potential", choices=POTENTIALS, nargs="+", default=list(POTENTIALS))
    parser.add_argument("--crystals", type=int, default=200, help="relaxed by each side (200)")
    parser.add_argument("--device", default="cpu", help="torch's name of it (cpu)")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.crystals = 3
    warnings.simplefilter("ignore")
    measured = machine.facts(uses_accelerator=options.device != "cpu")
    structures = some(options.crystals)
    result = {
        "benchmark": "relax",
        "claim": "relaxations per second, many crystals at once / one after the other by the package's own relaxer",
        "settings": asdict(SETTINGS),
        "crystals": len(structures),
        "atoms": sum(map(len, structures)),
        "data": GENERATED.name if GENERATED.exists() else "prototypes",
        "device": options.device,
        "potentials": {},
        "quick": options.quick,
        "measured": measured,
    }
    for name in options.potential:
        source, peer = POTENTIALS[name]
        if name == "m3gnet" and not M3GNET.exists():
            print(f"left out: {name}, whose weights are not at {M3GNET}")
            continue
        found = compare(structures, load_potential(source, options.device), peer(options.device))
        result["potentials"][name] = found
        print(f"{name}: {found['ratio']:.2f} times {found['peer']}, {found['close']:.1%} within {CLOSE} eV/atom")
    print(f"{measured['machine']}\nwritten to {machine.write('relax', result, options.out)}")
    return result


def some(count: int) -> list[Structure]:
    """Generated crystals from all over the file; without it, embedded ones, off their places."""
    if GENERATED.exists():
        crystals = [sample.crystal for sample in read(GENERATED).rows]
    else:
        crystals = [entry.crystal for entry in embedded()]
    if count < 10:
        crystals = [crystal for crystal in crystals if len(crystal) < 6]
    structures = [crystal.to_structure() for crystal in crystals[:: max(1, len(crystals) // count)][:count]]
    return structures if GENERATED.exists() else [s.perturb(0.1, seed=i) for i, s in enumerate(structures)]


def compare(structures: Sequence[Structure], potential: Potential, peer: Peer) -> dict[str, Any]:
    differences = single_points(structures, potential, peer)
    assert all(differences[name] <= TOLERANCE[name] for name in TOLERANCE), f"single points differ: {differences}"
    ours: dict[int, Any] = {}
    theirs: list[float] = []
    seconds = {"ours": 0.0, "peer": 0.0}
    for start in range(0, len(structures), PART):
        part = structures[start : start + PART]
        with timed(seconds, "ours", potential.device):
            found = dict(filter(None, relax_together(part, potential, SETTINGS)))
        ours |= {start + i: relaxation for i, relaxation in found.items()}
        with timed(seconds, "peer", potential.device):
            theirs += [peer.relax(structure) for structure in part]
    ended = [i for i in range(len(structures)) if ours[i].energy is not None]
    off = np.array([abs(ours[i].energy - theirs[i]) / len(structures[i]) for i in ended])
    return {
        "potential": potential.name,
        "peer": peer.name,
        "ratio": seconds["peer"] / seconds["ours"],
        "seconds": seconds,
        "single_points": differences,
        "close": float((off <= CLOSE).sum() / len(structures)),
        "median_difference_eV_per_atom": float(np.median(off)),
        "steps": float(np.mean([ours[i].steps for i in ended])),
        "statuses": {s: sum(r.status == s for r in ours.values()) for s in {r.status for r in ours.values()}},
    }


def single_points(structures: Sequence[Structure], potential: Potential, peer: Peer) -> dict[str, float]:
    """The largest differences of both sides' energies, forces and stresses of the crystals as they come."""
    from pymatgen.io.ase import AseAtomsAdaptor

    worst = dict.fromkeys(TOLERANCE, 0.0)
    for structure in structures:
        found, _ = potential.single_points(Systems.of([structure]))
        atoms = AseAtomsAdaptor.get_atoms(structure)
        atoms.calc = peer.calculator
        forces = atoms.get_forces()
        off = {
            "energy": abs(found.energies[0] - atoms.get_potential_energy()) / len(atoms),
            "force": np.abs(found.forces - forces).max() / max(1.0, np.abs(forces).max()),
            "stress": np.abs(found.stresses[0] - atoms.get_stress(voigt=False)).max(),
        }
        worst = {name: max(worst[name], float(off[name])) for name in worst}
    return worst


@contextlib.contextmanager
def timed(seconds: dict[str, float], side: str, device: str):
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    yield
    seconds[side] += clock() - start


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
