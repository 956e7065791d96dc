"""Interatomic potentials: read from disk, checked against known crystals, handed out as ASE calculators.

`chgnet` comes with its weights and needs no file. Any other name is a directory in matgl's format. Everything runs on
the CPU in float32, the precision of the weights.

M3GNet weights from before matgl 3.0 are recognised by what they compute, since their files carry the same version
numbers as later ones. In matgl ≥ 3.0 the message of an edge i → j is summed at i; before, at j:

    trained before 3.0        trained since 3.0
        m_ij                       m_ij
      i ─────▶ j += m_ij     i += m_ij ◀───── j

Both ways are put to the self-check, and the one that agrees with nature is kept for this model alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.chgnet import chgnet_calculator
from jaxcrystal.evaluate.selfcheck import TOLERANCE, EnergyReference, SelfCheck, check

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from pymatgen.core import Structure

MATGL_FILES = ("model.json", "model.pt", "state.pt")

#: Z ≤ 94 without those of which MPtrj, CHGNet's training set, holds no crystal.
CHGNET_MISSING = {"Po", "At", "Rn", "Fr", "Ra"}


@dataclass(frozen=True)
class Potential:
    """A potential that has passed its self-check."""

    name: str
    source: str  #: what `load_potential` reads again: `chgnet` or an absolute directory
    sha256: str  #: of the files that hold the weights
    elements: frozenset[str]  #: symbols that it knows
    check: SelfCheck
    note: str  #: how it is run, where that is not plain
    make_calculator: Callable[[], Calculator] = field(repr=False, compare=False)

    @property
    def reference(self) -> EnergyReference:
        """The scale of its total energies, as its self-check found it."""
        return self.check.reference

    def calculator(self) -> Calculator:
        """A new ASE calculator: energy in eV, forces in eV/Å, stress in eV/Å³."""
        return self.make_calculator()

    def unknown(self, symbols: Sequence[str]) -> list[str]:
        """Those of the element symbols that the potential does not know."""
        return sorted(set(symbols) - self.elements)

    def energies(self, structures: Sequence[Structure]) -> list[float]:
        """Energies in eV per cell, of the structures as they are.

        Raises UserError, naming the row, for an element that the potential does not know.
        """
        calculator = self.calculator()
        energies = []
        for row, structure in enumerate(structures):
            atoms = to_atoms(structure)
            if unknown := self.unknown(atoms.get_chemical_symbols()):
                raise UserError(f"row {row}, {structure.formula}: {self.name} does not know {', '.join(unknown)}")
            atoms.calc = calculator
            energies.append(float(atoms.get_potential_energy()))
        return energies

    def to_spec(self) -> str:
        """What another process passes to `load_potential` to have the same potential."""
        return self.source


def to_atoms(structure: Structure) -> Atoms:
    """The same crystal for ase; charges and site properties, which no potential here reads, stay behind."""
    from ase import Atoms

    symbols = [site.specie.symbol for site in structure]
    return Atoms(symbols, scaled_positions=structure.frac_coords, cell=structure.lattice.matrix, pbc=True)


def load_potential(name_or_dir: str | Path = "chgnet") -> Potential:
    """The potential of that name (`chgnet`) or in that directory (matgl's format).

    Raises UserError if files are missing or cannot be read, an optional package is missing, or the self-check fails.
    """
    candidates = list(_chgnet() if str(name_or_dir) == "chgnet" else _matgl(Path(name_or_dir)))
    best = min(candidates, key=lambda potential: potential.check.worst)
    if not best.check.passed:
        raise UserError(
            f"{best.source} fails its self-check by more than {TOLERANCE} eV/atom ({best.check}). "
            "Its weights do not fit the installed code: take weights published for this version of the package"
        )
    return best


def _chgnet() -> Iterator[Potential]:
    with _evaluate_extra():
        import chgnet
        from chgnet.model import CHGNet
    from ase.data import chemical_symbols

    with contextlib.redirect_stdout(io.StringIO()):  # CHGNet greets on standard output
        model = CHGNet.load(use_device="cpu", verbose=False)

    weights = sorted((Path(chgnet.__file__).parent / "pretrained" / model.version).glob("*.tar"))
    yield Potential(
        name=f"CHGNet {model.version}",
        source="chgnet",
        sha256=_sha256(weights),
        elements=frozenset(chemical_symbols[1:95]) - CHGNET_MISSING,
        check=check(chgnet_calculator(model)),
        note="",
        make_calculator=partial(chgnet_calculator, model),
    )


def _matgl(directory: Path) -> Iterator[Potential]:
    """The model in `directory`, once for each way in which its messages may be summed."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no potential: name `chgnet`, or a directory in matgl's format")
    files = {name: directory / name for name in MATGL_FILES}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} is missing; a directory in matgl's format holds {', '.join(MATGL_FILES)}")
    with _evaluate_extra():
        from matgl.apps.pes import Potential as MatglPotential
        from matgl.ext.ase import PESCalculator
        from matgl.layers._graph_convolution import M3GNetGraphConv

    def read() -> Any:
        try:
            return MatglPotential.load(files).to("cpu").eval()  # a dictionary of files: matgl then downloads nothing
        except (
            Exception
        ) as error:  # torch, json and matgl each raise their own for a file that is not what it should be
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{directory} cannot be read as a matgl potential: {reason}") from error

    def potential(model: Any, note: str) -> Potential:
        def calculator() -> Calculator:
            return PESCalculator(model, stress_unit="eV/A3", use_voigt=True)

        return Potential(
            name=directory.resolve().name,
            source=str(directory.resolve()),
            sha256=_sha256(list(files.values())),
            elements=frozenset(model.model.element_types),
            check=check(calculator()),
            note=note,
            make_calculator=calculator,
        )

    model = read()
    yield potential(model, "")
    if any(type(module) is M3GNetGraphConv for module in model.modules()):
        model = read()
        for module in model.modules():
            if type(module) is M3GNetGraphConv:
                module.node_update_ = types.MethodType(_sum_at_destination, module)
        yield potential(model, "weights from before matgl 3.0: messages summed at the destination, as trained")


def _sum_at_destination(
    conv: Any, edge_index: Any, edge_feat: Any, node_feat: Any, rbf: Any, u_per_edge: Any, num_nodes: int
) -> Any:
    """M3GNet's node update (arXiv 2202.02450, eq. 5) as matgl ran it before 3.0, for one convolution.

    Shapes: edge_index [2, edges], edge_feat [edges, features], node_feat [nodes, features], rbf [edges, degree],
    u_per_edge [edges, features] or None; the result is [nodes, features].
    """
    from matgl.utils.maths import scatter_add
    from torch import hstack

    source, destination = edge_index
    inputs = [node_feat[source], node_feat[destination], edge_feat]
    if conv.include_state:
        inputs.append(u_per_edge)
    messages = conv.node_update_func(hstack(inputs)) * conv.node_weight_func(rbf)
    return scatter_add(messages, destination, dim_size=num_nodes, dim=0)


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _evaluate_extra() -> Iterator[None]:
    """Turns the import error of an optional package into one that says how to get it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error.name or error} is not installed; pip install 'jaxcrystal[evaluate]'") from error
