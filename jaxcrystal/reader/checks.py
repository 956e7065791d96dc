"""What a data set for training asks of a row beside that it reads: size, a reduced cell, atoms apart, typed labels.

The Niggli reduction is pymatgen's. It is checked: the volume must stay.
"""

from __future__ import annotations

import ast
import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetry import SYMPREC, Symmetrized, symmetrize
from jaxcrystal.errors import UserError
from jaxcrystal.reader.cif import check_cell
from jaxcrystal.reader.rows import Refused, Row

if TYPE_CHECKING:
    from pymatgen.core import Composition, Structure

#: Atoms nearer than this, in Å, are one atom written twice; no bond is shorter than 0.7 Å.
COINCIDENT = 0.1

#: Volume of the flattest cell that is reduced, of that of a box with its edges. pymatgen's reduction takes
#: minutes on flatter ones, and may not end.
FLATTEST = 1e-3


class Reason(StrEnum):
    """Why a row that reads as a crystal is left out all the same. One that does not read has its `rows.Outcome`."""

    TOO_MANY_ATOMS = "too_many_atoms"
    COINCIDENT_ATOMS = "coincident_atoms"
    FAILED_REDUCTION = "failed_reduction"


class Doubt(StrEnum):
    """What is wrong with the labels of a row that is kept."""

    FORMULA_DIFFERS = "formula_differs"  # the stated formula is not the structure's, which is stored
    ELEMENTS_DIFFER = "elements_differ"  # likewise
    BAD_LABEL = "bad_label"  # not a number, not finite, no space group: stored as missing


@dataclass(frozen=True)
class Checks:
    """What is asked of a row."""

    niggli: bool = True  #: store the Niggli-reduced cell
    max_atoms: int | None = 20  #: leave larger cells out
    symprec: float = SYMPREC  #: Å, how far a crystal may be from symmetric

    def __post_init__(self) -> None:
        if not 0 < self.symprec < math.inf:
            raise UserError(f"symprec is {self.symprec}; it must be above 0 Å")
        if self.max_atoms is not None and self.max_atoms < 1:
            raise UserError(f"max_atoms is {self.max_atoms}; every cell has at least 1")


@dataclass(frozen=True)
class Finding:
    """Something about a row that its owner should know."""

    row: int  #: from 0 within its file
    id: str
    kind: str  #: a Reason or an Outcome where the row is left out, a Doubt where a label is
    message: str


@dataclass(frozen=True)
class Checked:
    """A row that is kept."""

    row: int  #: from 0 within its file
    id: str
    crystal: Crystal
    symmetry: Symmetrized | None  #: None where no space group is found at any tolerance
    labels: dict[str, Any]  #: by name of `config.ATTRIBUTES`, and one's own; only what is known
    doubts: tuple[Finding, ...]
    notes: tuple[str, ...]  #: what reading changed, or did not use
    duplicate_key: str


class _LeftOut(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(message)


def check(row: Row, checks: Checks, own: Sequence[str] = ()) -> Checked | Finding:
    """The crystal of a row, or the Finding that says why it is left out; `own` are labels that are kept as they are."""
    if row.crystal is None:
        return Finding(row.row, row.id, str(row.outcome), row.reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen's
            crystal = _reduced(row.crystal, checks)
            distances = _distances(crystal.to_structure())
            labels, doubts = _labels(row.labels, crystal)
            labels |= {name: row.labels[name] for name in own if name in row.labels}
    except _LeftOut as error:
        return Finding(row.row, row.id, error.reason, error.message)
    findings = tuple(Finding(row.row, row.id, kind, message) for kind, message in doubts)
    symmetry = symmetrize(crystal, checks.symprec)
    if symmetry is not None:
        _ = symmetry.masked  # kept with it: found here, by one of many processes, and not where the rows are stored
    key = _duplicate_key(crystal, distances)
    return Checked(row.row, row.id, crystal, symmetry, labels, findings, row.notes, key)


def _reduced(crystal: Crystal, checks: Checks) -> Crystal:
    """In its Niggli cell, if that is asked for; a crystal that is in one already stays as it is, to the last bit."""
    if checks.max_atoms is not None and len(crystal) > checks.max_atoms:
        raise _LeftOut(Reason.TOO_MANY_ATOMS, f"{len(crystal)} atoms, more than {checks.max_atoms}")
    if not checks.niggli:
        return crystal
    flat = crystal.volume / float(np.prod(crystal.lengths))
    if flat < FLATTEST:
        raise _LeftOut(Reason.FAILED_REDUCTION, f"the cell is nearly flat: its volume is {flat:.1e} of that of a box")
    structure = crystal.to_structure()
    try:
        reduced = structure.get_reduced_structure("niggli")
        check_cell(np.array(reduced.lattice.abc), np.array(reduced.lattice.angles))
    except (ValueError, ArithmeticError, np.linalg.LinAlgError, Refused) as error:
        raise _LeftOut(Reason.FAILED_REDUCTION, f"{type(error).__name__}: {error}") from None
    if not math.isclose(reduced.volume, structure.volume, rel_tol=1e-4):
        raise _LeftOut(Reason.FAILED_REDUCTION, f"the volume went from {structure.volume} to {reduced.volume} Å³")
    if np.allclose([*reduced.lattice.abc, *reduced.lattice.angles], [*crystal.lengths, *crystal.angles], 0, 1e-6):
        return crystal
    return Crystal.from_structure(reduced)


def _distances(structure: Structure) -> Float[np.ndarray, "atoms atoms"]:
    """Å between nearest images; 0 from an atom to itself."""
    distances = structure.distance_matrix
    apart = distances + min(structure.lattice.abc) * np.eye(len(structure))  # an atom's own image is an edge away
    if apart.min() < COINCIDENT:
        i, j = np.unravel_index(apart.argmin(), apart.shape)
        raise _LeftOut(Reason.COINCIDENT_ATOMS, f"atoms {i} and {j} are {apart.min():.3f} Å apart")
    return distances


def _labels(stated: Mapping[str, Any], crystal: Crystal) -> tuple[dict[str, Any], list[tuple[Doubt, str]]]:
    """Typed labels, and what is wrong with the stated ones. Formula and elements are always the structure's own."""
    from pymatgen.core import Composition

    composition = Composition("".join(crystal.symbols))
    labels: dict[str, Any] = {"pretty_formula": composition.reduced_formula, "elements": sorted(set(crystal.symbols))}
    doubts = []
    formula, elements = stated.get("pretty_formula"), stated.get("elements")
    if formula is not None and _formula(formula) != composition.reduced_composition:
        doubts.append((Doubt.FORMULA_DIFFERS, f"stated {formula!r}, the structure is {labels['pretty_formula']}"))
    if elements is not None and _elements(elements) != labels["elements"]:
        doubts.append((Doubt.ELEMENTS_DIFFER, f"stated {elements!r}, the structure has {labels['elements']}"))
    for name in ("spacegroup.number", "formation_energy_per_atom", "band_gap", "e_above_hull"):
        try:
            number = float(stated.get(name, math.nan))
        except (TypeError, ValueError):
            number = math.inf
        if math.isnan(number):  # how a table without nulls writes what it does not know
            continue
        if math.isinf(number) or (name == "spacegroup.number" and number not in range(1, 231)):
            doubts.append((Doubt.BAD_LABEL, f"{name} is {stated[name]!r}; stored as missing"))
        else:
            labels[name] = int(number) if name == "spacegroup.number" else number
    return labels, doubts


def _formula(text: Any) -> Composition | None:
    from pymatgen.core import Composition

    try:
        return Composition(text).reduced_composition
    except (ValueError, TypeError):
        return None


def _elements(stated: Any) -> list[str] | None:
    """A list of symbols, or CDVAE's Python list in a string."""
    try:
        return sorted(ast.literal_eval(stated) if isinstance(stated, str) else stated)
    except (ValueError, SyntaxError, TypeError):
        return None


def _duplicate_key(crystal: Crystal, distances: Float[np.ndarray, "atoms atoms"]) -> str:
    """Equal for rows that hold the same crystal, whatever their origin, choice of axes and order of atoms.

    A digest of the volume (to 0.01 Å³), the three cell lengths and, element pair by element pair, the distances between
    the nearest images of all atoms (to 0.01 Å). Of a Niggli-reduced cell all of these depend on the crystal alone, and
    a mirror image shares them. It finds repetition, not similarity: two relaxations of one crystal mostly get two
    keys, and so does a number that rounds to either side.
    """
    i, j = np.triu_indices(len(crystal))
    pairs = np.sort([crystal.species[i], crystal.species[j]], axis=0)
    apart = np.round(distances[i, j] * 100)
    table = np.array([*pairs, np.where(i == j, 0, apart)]).T.astype(np.int64)
    cell = np.round(np.array([crystal.volume, *crystal.lengths]) * 100).astype(np.int64)
    ordered = table[np.lexsort(table.T)]
    return hashlib.blake2b(cell.tobytes() + ordered.tobytes(), digest_size=16).hexdigest()
