"""A crystal with its symmetry: the conventional cell, the space group, its operations and one atom of every orbit.

spglib (Togo et al., Sci. Technol. Adv. Mater. Methods 4, 2384822 (2024), arXiv 1808.01590) finds the group of a
crystal that is symmetric to within a tolerance, and refines it: cell and positions become exactly symmetric. The
refined crystal stands in the first setting that spglib's table has for the group: origin choice 1, hexagonal axes for
rhombohedral groups, unique axis b and cell choice 1 for monoclinic ones. The operations are the table's for that same
setting, not those found in the crystal as it was given, whose axes and origin are others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import spglib
from jaxtyping import Float, Int

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.errors import UserError

#: Digits behind the point. 1/3 comes out near enough that readers see that images coincide; `Crystal` holds no more.
DECIMALS = 8


@dataclass(frozen=True)
class Site:
    """An atom of the asymmetric unit; it stands for its whole orbit."""

    symbol: str  #: of the element
    multiplicity: int  #: atoms of the orbit in the conventional cell
    wyckoff: str  #: letter
    frac_coords: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class SymmetrizedCrystal:
    """A crystal that its space group maps exactly onto itself, in the group's standard setting."""

    formula: str  #: reduced, as `Crystal.formula`
    number: int  #: of the space group, 1 to 230
    symbol: str  #: short Hermann-Mauguin symbol with blanks and without underscores, for example P 21/c
    hall_symbol: str  #: says the setting too
    lengths: Float[np.ndarray, "3"]  #: a, b, c of the conventional cell in Å
    angles: Float[np.ndarray, "3"]  #: α, β, γ in degrees
    rotations: Int[np.ndarray, "operations 3 3"]  #: the identity first; x goes to rotation @ x + translation
    translations: Float[np.ndarray, "operations 3"]  #: centring translations are operations of their own
    sites: tuple[Site, ...]  #: in the order in which the crystal first names them
    symprec: float  #: Å, the tolerance that the group was looked for with

    def to_cif(self) -> str:
        """CIF with the operations, multiplicities and Wyckoff letters; its first line names spglib and symprec."""
        lengths = [f"_cell_length_{edge} {_decimal(x)}" for edge, x in zip("abc", self.lengths, strict=True)]
        corners = zip(("alpha", "beta", "gamma"), self.angles, strict=True)
        operations = zip(self.rotations, self.translations, strict=True)
        return "\n".join(
            [
                f"# refined by spglib {spglib.__version__} with symprec {self.symprec:g} Angstrom",
                f"data_{self.formula}",
                f"_space_group_name_H-M_alt '{self.symbol}'",
                f"_space_group_name_Hall '{self.hall_symbol}'",
                f"_space_group_IT_number {self.number}",
                *lengths,
                *(f"_cell_angle_{corner} {_decimal(x)}" for corner, x in corners),
                "loop_",
                "_space_group_symop_id",
                "_space_group_symop_operation_xyz",
                *(f"{i} '{_xyz(*operation)}'" for i, operation in enumerate(operations, start=1)),
                "loop_",
                *(f"_atom_site_{column}" for column in ("type_symbol", "label", "symmetry_multiplicity")),
                *(f"_atom_site_{column}" for column in ("Wyckoff_symbol", "fract_x", "fract_y", "fract_z")),
                "_atom_site_occupancy",
                *(
                    f"{s.symbol} {s.symbol}{i} {s.multiplicity} {s.wyckoff} {' '.join(map(_decimal, s.frac_coords))} 1"
                    for i, s in enumerate(self.sites)
                ),
                "",
            ]
        )


def symmetrize(crystal: Crystal, symprec: float = 0.1) -> SymmetrizedCrystal | None:
    """The crystal in the conventional cell of its space group, made exactly symmetric; None if spglib finds no group.

    `symprec`, in Å, is how far atoms and cell may be from symmetric; where no group fits at that tolerance, spglib
    tries smaller ones by itself. None is rare and means that all failed, mostly because atoms of one element lie
    closer than `symprec`; or that the cell is flat to within float64. A crystal without symmetry is not None but of
    space group 1, in its reduced cell.
    Raises UserError if `symprec` is not a positive number (spglib would end the process).
    """
    if not 0 < symprec < np.inf:
        raise UserError(f"symprec is a distance in Å above 0, found {symprec}")
    found = _dataset(crystal, symprec)
    if found is None:
        return None
    group = spglib.get_spacegroup_type(found.hall_number)
    operations = spglib.get_symmetry_from_database(found.hall_number)
    metric = found.std_lattice @ found.std_lattice.T
    lengths = np.sqrt(np.diag(metric))
    return SymmetrizedCrystal(
        formula=crystal.formula,
        number=found.number,
        symbol=group.international.split(" = ")[0].replace("_", ""),
        hall_symbol=group.hall_symbol,
        lengths=lengths,
        angles=np.degrees(np.arccos((metric / np.outer(lengths, lengths))[[1, 0, 0], [2, 2, 1]])),
        rotations=operations["rotations"],
        translations=operations["translations"],
        sites=_sites(found, operations),
        symprec=symprec,
    )


def _dataset(crystal: Crystal, symprec: float) -> spglib.SpglibDataset | None:
    # A failure is an answer of ours; spglib need not also print about it.
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    try:
        cell = _lattice(crystal), crystal.frac_coords, crystal.species
    except np.linalg.LinAlgError:  # so flat that float64 finds no third direction
        return None
    try:
        return spglib.get_symmetry_dataset(cell, symprec=symprec)
    except getattr(spglib, "SpglibError", ()):  # what returns None up to spglib 2.8 is announced to raise later
        return None


def _lattice(crystal: Crystal) -> Float[np.ndarray, "3 3"]:
    """Cell vectors as rows, in Å; right-handed. Their scalar products say all, and Cholesky's factor has these."""
    ca, cb, cg = np.cos(np.radians(crystal.angles))
    cosines = np.array([[1, cg, cb], [cg, 1, ca], [cb, ca, 1]])
    return np.linalg.cholesky(cosines * np.outer(crystal.lengths, crystal.lengths))


def _sites(found: spglib.SpglibDataset, operations: dict[str, np.ndarray]) -> tuple[Site, ...]:
    """One refined atom of every orbit. Given and refined atoms are matched through the primitive cell of both."""
    given = {p: atom for atom, p in enumerate(found.mapping_to_primitive)}
    atoms = [given[p] for p in found.std_mapping_to_primitive]
    orbits = found.crystallographic_orbits[atoms]
    sites = []
    for orbit in np.unique(orbits):
        first, *others = np.flatnonzero(orbits == orbit)
        symbol, letter, multiplicity = ELEMENTS[found.std_types[first]], found.wyckoffs[atoms[first]], 1 + len(others)
        exact = _on_site(found.std_positions[first], multiplicity, found.std_lattice, **operations)
        coords = np.round(exact, DECIMALS) % 1
        sites.append(Site(symbol, multiplicity, letter, tuple(coords.tolist())))
    return tuple(sites)


def _on_site(
    point: Float[np.ndarray, "3"],
    multiplicity: int,
    lattice: Float[np.ndarray, "3 3"],
    rotations: Int[np.ndarray, "operations 3 3"],
    translations: Float[np.ndarray, "operations 3"],
) -> Float[np.ndarray, "3"]:
    """The special position near a point: the mean of its images under the operations that leave the position alone.

    spglib has done this already, except that some crystals come back with an orbit where it was found (2.5 to 2.8.0).
    """
    moves = rotations @ point + translations - point
    moves -= np.round(moves)
    nearest = np.argsort(np.linalg.norm(moves @ lattice, axis=1))
    return point + moves[nearest[: len(rotations) // multiplicity]].mean(axis=0)


def _decimal(x: float) -> str:
    return np.format_float_positional(np.round(x, DECIMALS), trim="-")


def _xyz(rotation: Int[np.ndarray, "3 3"], translation: Float[np.ndarray, "3"]) -> str:
    """An operation as CIF writes it: -x+y, x, z+1/3. Translations of all space groups are multiples of 1/12."""
    rows = []
    for row, shift in zip(rotation, translation, strict=True):
        terms = "".join(f"{'-' if n < 0 else '+'}{axis}" for n, axis in zip(row, "xyz", strict=True) if n)
        rows.append(terms.removeprefix("+") + (f"+{Fraction(round(12 * shift), 12)}" if shift else ""))
    return ", ".join(rows)
