"""Interatomic potentials: read from disk, checked against known crystals, asked about many crystals at once.

`chgnet` comes with its weights and needs no file. Any other name is a directory in matgl's format. Everything runs in
float32, the precision of the weights: on a GPU if there is one, else on the CPU.

M3GNet weights from before matgl 3.0 are recognised by what they compute, since their files carry the same version
numbers as later ones. In matgl ≥ 3.0 the message of an edge i → j is summed at i; before, at j:

    trained before 3.0        trained since 3.0
        m_ij                       m_ij
      i ─────▶ j += m_ij     i += m_ij ◀───── j

Both ways are put to the self-check, and the one that agrees with the known energies is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrystal.errors import UserError
from jaxcrystal.relaxation.chgnet import chgnet_single_points
from jaxcrystal.relaxation.m3gnet import M3GNet
from jaxcrystal.relaxation.matgl import matgl_single_points
from jaxcrystal.relaxation.neighbours import Candidates, candidates, edges
from jaxcrystal.relaxation.selfcheck import FEWEST, TOLERANCE, EnergyReference, SelfCheck, check
from jaxcrystal.relaxation.systems import Edges, SinglePoints, Systems

if TYPE_CHECKING:
    from pymatgen.core import Structure

#: Atoms of a batch. On a CPU more would not be faster; on a GPU they fill it.
ATOMS_AT_ONCE = {"cpu": 200, "gpu": 8000}
MATGL_FILES = ("model.json", "model.pt", "state.pt")

#: Z ≤ 94 without those of which MPtrj, CHGNet's training set, holds no crystal.
CHGNET_MISSING = {"Po", "At", "Rn", "Fr", "Ra"}


@dataclass(frozen=True)
class PotentialCard:
    """What is known of a potential, without the means to compute: for a process that leaves that to others."""

    name: str
    source: str  #: what `load_potential` reads again: `chgnet` or an absolute directory
    sha256: str  #: of the files that hold the weights
    elements: frozenset[str]  #: symbols that it knows
    check: SelfCheck
    note: str  #: how it is run, where that is not plain
    device: str = "cpu"
    package: str = ""  #: whose code it runs, with its version

    @property
    def reference(self) -> EnergyReference:
        """The scale of its total energies, as its self-check found it."""
        return self.check.reference

    @property
    def atoms_at_once(self) -> int:
        """How many atoms a batch of crystals should have."""
        return ATOMS_AT_ONCE["cpu" if self.device == "cpu" else "gpu"]

    def unknown(self, symbols: Sequence[str]) -> list[str]:
        """Those of the element symbols that the potential does not know."""
        return sorted(set(symbols) - self.elements)


@dataclass(frozen=True, kw_only=True)
class Potential(PotentialCard):
    """A potential: what it says of crystals, and how far that is to be believed."""

    cutoff: float  #: Å; beyond it atoms do not see each other
    answer: Callable[[Systems, Edges], SinglePoints] = field(repr=False, compare=False)

    @classmethod
    def checked(cls, **what: Any) -> Potential:
        """One that has been put to the self-check, whatever that found; takes the fields beside `check`."""
        potential = cls(check=SelfCheck((), (), EnergyReference.OWN), **what)
        return replace(potential, check=check(potential.energies, potential.elements))

    @property
    def card(self) -> PotentialCard:
        """What is known of it, which other processes can be sent."""
        return PotentialCard(**{known.name: getattr(self, known.name) for known in fields(PotentialCard)})

    def single_points(
        self, systems: Systems, known: Sequence[Candidates | None] | None = None
    ) -> tuple[SinglePoints, list[Candidates]]:
        """Energies, forces and stresses, and the pairs of atoms that may be near: pass them on after a small step.

        Raises what the potential or the search for neighbours raises; not for an energy that is not finite.
        """
        found = candidates(systems, self.cutoff, known)
        return self.answer(systems, edges(systems, found, self.cutoff)), found

    def energies(self, structures: Sequence[Structure]) -> list[float]:
        """Energies in eV per cell, of the structures as they are.

        Raises UserError, naming the row, for an element that the potential does not know.
        """
        energies: list[float] = []
        for row, structure in enumerate(structures):
            if unknown := self.unknown([element.symbol for element in structure.composition.elements]):
                raise UserError(f"row {row}, {structure.formula}: {self.name} does not know {', '.join(unknown)}")
        for batch in in_batches(structures, self.atoms_at_once):
            found, _ = self.single_points(Systems.of(batch))
            energies += found.energies.tolist()
        return energies


def in_batches(structures: Sequence[Structure], atoms: int) -> Iterator[Sequence[Structure]]:
    """Runs of the structures with at most so many atoms, or of one that has more."""
    start = size = 0
    for end, structure in enumerate(structures):
        if end > start and size + len(structure) > atoms:
            yield structures[start:end]
            start, size = end, 0
        size += len(structure)
    if structures:
        yield structures[start:]


def load_potential(name_or_dir: str | Path = "chgnet", device: str | None = None) -> Potential:
    """The potential of that name (`chgnet`) or in that directory (matgl's format), once it has passed its self-check.

    `device` is torch's name of one (`cpu`, `cuda`); None takes a GPU if there is one.
    Raises UserError if files are missing or cannot be read, an optional package is missing, or the self-check fails.
    """
    with _evaluate_extra():
        import torch
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = _chgnet(device) if str(name_or_dir) == "chgnet" else _matgl(Path(name_or_dir), device)
    best = min(found, key=lambda potential: potential.check.worst)
    if len(best.check.rows) < FEWEST:
        raise UserError(f"{best.source} cannot be checked, and is not used: {best.check}")
    if not best.check.passed:
        raise UserError(
            f"{best.source} fails its self-check by more than {TOLERANCE} eV/atom ({best.check}). Its weights are "
            "damaged or do not fit the installed code: take weights published for this version of the package"
        )
    return best


def _chgnet(device: str) -> Iterator[Potential]:
    with _evaluate_extra():
        import chgnet
        from chgnet.model import CHGNet
    from ase.data import chemical_symbols

    with contextlib.redirect_stdout(io.StringIO()):  # CHGNet greets on standard output
        model = CHGNet.load(use_device=device, verbose=False)

    weights = sorted((Path(chgnet.__file__).parent / "pretrained" / model.version).glob("*.tar"))
    yield Potential.checked(
        name=f"CHGNet {model.version}",
        source="chgnet",
        sha256=_sha256(weights),
        elements=frozenset(chemical_symbols[1:95]) - CHGNET_MISSING,
        note="",
        cutoff=float(model.graph_converter.atom_graph_cutoff),
        answer=partial(chgnet_single_points, model.eval()),
        device=device,
        package=f"chgnet {version('chgnet')}",
    )


def _matgl(directory: Path, device: str) -> Iterator[Potential]:
    """The model in `directory`; an M3GNet once for each way in which its messages may be summed."""
    if not directory.is_dir():
        raise UserError(f"{directory} is no potential: name `chgnet`, or a directory in matgl's format")
    files = {name: directory / name for name in MATGL_FILES}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} is missing; a directory in matgl's format holds {', '.join(MATGL_FILES)}")
    with _evaluate_extra():
        from matgl.apps.pes import Potential as MatglPotential

    for name in ("model.pt", "state.pt"):
        _refuse_code(files[name])
    try:
        model = MatglPotential.load(files).to(device).eval()  # a dictionary of files: matgl then downloads nothing
    except Exception as error:  # torch, json and matgl each raise their own for a file that is not what it should be
        reason = " ".join(str(error).split())[:300]
        if "weights_only" in reason:  # torch's advice to read it without that safeguard
            reason = "model.pt or state.pt is damaged, or no file of torch's"
        raise UserError(f"{directory} cannot be read as a matgl potential: {reason}") from error
    potential = partial(
        Potential.checked,
        name=directory.resolve().name,
        source=str(directory.resolve()),
        sha256=_sha256(list(files.values())),
        elements=frozenset(model.model.element_types),
        cutoff=float(model.model.cutoff),
        device=device,
        package=f"matgl {version('matgl')}",
    )
    if M3GNet.can_run(model):
        yield potential(note="", answer=M3GNet(model, at_source=True))
        note = "weights from before matgl 3.0: messages summed at the destination, as trained"
        yield potential(note=note, answer=M3GNet(model, at_source=False))
    else:
        yield potential(note="", answer=partial(matgl_single_points, model))


def _refuse_code(path: Path) -> None:
    """Raises UserError if to read the file would run what it names, and not only take numbers from it.

    torch refuses a pickle that does, and advises how to read it all the same. matgl makes an object of any class that
    a dictionary names, with the arguments that it gives.
    """
    import torch

    try:
        found, runs = torch.load(path, map_location="cpu", weights_only=True), ""
    except Exception as error:  # of a file that is damaged, matgl's reading says more
        found, runs = None, "".join(re.findall(r"GLOBAL (\S+)", str(error))[:1])
    for part in found.values() if isinstance(found, dict) else ():
        if isinstance(part, dict) and "@class" in part and not str(part.get("@module")).startswith("matgl.models"):
            runs = f"{part.get('@module')}.{part['@class']}"
    if runs:
        raise UserError(
            f"{path} is not read: it is more than a file of weights, and would run {runs}. Such files do harm; take "
            "the weights from who published them, or have who made them save them again by matgl's `save`"
        )


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
