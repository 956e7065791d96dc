"""One row of a foreign file: a crystal with typed labels, or the reason why it is none.

Parsing and Niggli reduction are pymatgen's, with its defaults (so a coordinate within 1e-4 of a special position of a
CIF is moved onto it). pymatgen is lenient: it reads the element `Nq` as nitrogen and clips angles that close no cell.
A row is therefore checked against what its text states, before and after.
"""

from __future__ import annotations

import ast
import hashlib
import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal, cell_volume
from jaxcrystal.errors import UserError
from jaxcrystal.reader.sources import Row

if TYPE_CHECKING:
    from pymatgen.core import Composition, Structure

#: Atoms nearer than this, in Å, are one atom written twice; no bond is shorter than 0.7 Å.
COINCIDENT = 0.1

_SYMBOL = re.compile(r"[A-Za-z]+")


class Reason(StrEnum):
    """Why a row is left out."""

    MALFORMED_ROW = "malformed_row"  # the file holds no structure at this row
    BROKEN_CIF = "broken_cif"  # pymatgen cannot read it
    BROKEN_FRAME = "broken_frame"  # ase cannot read it
    FORMULA_MISMATCH = "formula_mismatch"  # the atoms of the CIF are not those of the formula that it states
    UNKNOWN_ELEMENT = "unknown_element"
    NAN_COORDINATE = "nan_coordinate"  # or infinite
    PARTIAL_OCCUPANCY = "partial_occupancy"
    BAD_CELL = "bad_cell"  # no such cell, or beyond 256 Å
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

    def __post_init__(self) -> None:
        if self.max_atoms is not None and self.max_atoms < 1:
            raise UserError(f"max_atoms is {self.max_atoms}; every cell has at least 1")


@dataclass(frozen=True)
class Finding:
    """Something about a row that its owner should know."""

    row: int  #: from 0 within its file
    id: str
    kind: Reason | Doubt
    message: str


@dataclass(frozen=True)
class Checked:
    """A row that is kept."""

    id: str
    crystal: Crystal
    labels: dict[str, Any]  #: by name of `config.ATTRIBUTES`; only what is known
    doubts: tuple[Finding, ...]
    duplicate_key: str


class _LeftOut(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(message)


def check(row: Row, checks: Checks) -> Checked | Finding:
    """The crystal of a row, or the Finding, with a Reason, that there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen's, at every CIF; what matters of them is a Reason here
            structure, stated = _read(row)
            structure = _reduced(structure, checks)
            distances = _distances(structure)
            crystal = _right_handed(structure)
            labels, doubts = _labels(stated, crystal)
        identity = str(stated.get("material_id", row.id))  # a frame states its own
        findings = tuple(Finding(row.number, identity, kind, message) for kind, message in doubts)
        return Checked(identity, crystal, labels, findings, _duplicate_key(crystal, distances))
    except _LeftOut as error:
        return Finding(row.number, row.id, error.reason, error.message)


def _read(row: Row) -> tuple[Structure, Mapping[str, Any]]:
    """The structure as the row's text states it, and the labels."""
    if row.structure is None:
        raise _LeftOut(Reason.MALFORMED_ROW, row.problem)
    if isinstance(row.structure, Crystal):
        return row.structure.to_structure(), row.labels or {}
    read, reason = {"cif": (_cif, Reason.BROKEN_CIF), "extxyz": (_frame, Reason.BROKEN_FRAME)}[row.format]
    try:
        structure, found = read(row.structure)
    except _LeftOut:
        raise
    except Exception as error:  # a broken text makes these parsers raise anything; it costs one row, with its reason
        raise _LeftOut(reason, f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    return structure, {**found, **(row.labels or {})}


def _cif(text: str) -> tuple[Structure, dict[str, Any]]:
    from pymatgen.core import Composition
    from pymatgen.io.cif import CifParser, str2float

    parser = CifParser.from_str(text, check_cif=False)
    blocks = [block for block in parser.as_dict().values() if "_atom_site_fract_x" in block]
    if len(blocks) != 1:
        raise _LeftOut(Reason.BROKEN_CIF, f"the CIF holds {len(blocks)} structures, expected one")
    block = blocks[0]
    _check_cell(
        np.array([str2float(block[f"_cell_length_{name}"]) for name in ("a", "b", "c")]),
        np.array([str2float(block[f"_cell_angle_{name}"]) for name in ("alpha", "beta", "gamma")]),
    )
    for symbol in block.get("_atom_site_type_symbol", block["_atom_site_label"]):
        letters = _SYMBOL.match(symbol)
        if not letters or letters.group().title() not in ATOMIC_NUMBER:
            raise _LeftOut(Reason.UNKNOWN_ELEMENT, f"{symbol!r} is no chemical element")
    _check_coordinates(np.array([[str2float(x) for x in block[f"_atom_site_fract_{axis}"]] for axis in "xyz"]).T)
    for occupancy in block.get("_atom_site_occupancy", ()):
        if occupancy not in ("?", ".") and not math.isclose(str2float(occupancy), 1, abs_tol=1e-6):
            raise _LeftOut(Reason.PARTIAL_OCCUPANCY, f"a site has the occupancy {occupancy}")

    (structure,) = parser.parse_structures(primitive=False, on_error="raise")
    formula = block.get("_chemical_formula_sum", "?")
    if formula not in ("?", "."):
        stated, found = Composition(formula).fractional_composition, structure.composition.fractional_composition
        if not stated.almost_equals(found, rtol=0.01):
            raise _LeftOut(
                Reason.FORMULA_MISMATCH, f"the CIF states {formula}, its atoms are {structure.composition.formula}"
            )
    return structure, {}


def _frame(text: str) -> tuple[Structure, dict[str, Any]]:
    import ase.io
    from pymatgen.io.ase import AseAtomsAdaptor

    atoms = ase.io.read(io.StringIO(text), format="extxyz")
    if atoms.cell.rank < 3:
        raise _LeftOut(Reason.BAD_CELL, "the frame states no Lattice of three vectors")
    _check_cell(atoms.cell.lengths(), atoms.cell.angles())
    if not atoms.numbers.all():
        raise _LeftOut(Reason.UNKNOWN_ELEMENT, "'X' is no chemical element")
    _check_coordinates(atoms.get_scaled_positions(wrap=False))
    return AseAtomsAdaptor.get_structure(atoms), dict(atoms.info)


def _check_cell(lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]) -> None:
    if not ((lengths > 0) & (lengths < 256)).all():  # NaN fails too
        raise _LeftOut(Reason.BAD_CELL, f"lengths must lie between 0 and 256 Å, found {lengths.tolist()}")
    if not ((angles > 0) & (angles < 180)).all() or cell_volume(lengths, angles) <= 0:
        raise _LeftOut(Reason.BAD_CELL, f"no cell has the angles {angles.tolist()}")


def _check_coordinates(coords: Float[np.ndarray, "atoms 3"]) -> None:
    bad = np.flatnonzero(~np.isfinite(coords).all(1))
    if len(bad):
        raise _LeftOut(Reason.NAN_COORDINATE, f"atom {bad[0]} lies at {coords[bad[0]].tolist()}")


def _reduced(structure: Structure, checks: Checks) -> Structure:
    if not structure.is_ordered:
        raise _LeftOut(Reason.PARTIAL_OCCUPANCY, f"{structure.composition.formula} has partially occupied sites")
    if checks.max_atoms is not None and len(structure) > checks.max_atoms:
        raise _LeftOut(Reason.TOO_MANY_ATOMS, f"{len(structure)} atoms, more than {checks.max_atoms}")
    if not checks.niggli:
        return structure
    try:
        reduced = structure.get_reduced_structure("niggli")
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise _LeftOut(Reason.FAILED_REDUCTION, f"{type(error).__name__}: {error}") from None
    if not math.isclose(reduced.volume, structure.volume, rel_tol=1e-4):
        raise _LeftOut(Reason.FAILED_REDUCTION, f"the volume went from {structure.volume} to {reduced.volume} Å³")
    _check_cell(np.array(reduced.lattice.abc), np.array(reduced.lattice.angles))
    return reduced


def _distances(structure: Structure) -> Float[np.ndarray, "atoms atoms"]:
    """Å between nearest images; 0 from an atom to itself."""
    distances = structure.distance_matrix
    apart = distances + min(structure.lattice.abc) * np.eye(len(structure))  # an atom's own image is an edge away
    if apart.min() < COINCIDENT:
        i, j = np.unravel_index(apart.argmin(), apart.shape)
        raise _LeftOut(Reason.COINCIDENT_ATOMS, f"atoms {i} and {j} are {apart.min():.3f} Å apart")
    return distances


def _right_handed(structure: Structure) -> Crystal:
    """On the grid, with axes that form a right hand.

    Lengths and angles do not tell the hand of a cell: a left-handed one would come back as its mirror image. All three
    vectors turned round have the same lengths and angles and the other hand; the coordinates change their sign.
    """
    lattice = structure.lattice
    hand = np.sign(np.linalg.det(lattice.matrix))
    species = [ATOMIC_NUMBER[site.specie.symbol] for site in structure]
    return Crystal(lattice.abc, lattice.angles, species, hand * structure.frac_coords)


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
