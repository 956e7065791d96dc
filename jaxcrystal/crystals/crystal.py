"""A crystal: on the host (`Crystal`) and, many at once, on the device (`CrystalBatch`).

All numbers live on a fixed-point grid: a fractional coordinate is a multiple of 2⁻³², a length in Å or an angle in
degrees a multiple of 2⁻²⁴. Three things follow. The unit interval with its ends glued together *is* the ring of
uint32: a translation modulo 1 is one wrapping addition, without error. Decimal digits come out of integer
arithmetic on the device exactly as Python's `format` gives them. And host and device hold the same crystal, bit for
bit. The grid is far below what a CIF states (2.3e-10 of a cell edge, 6e-8 Å).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

#: Symbols by atomic number: ELEMENTS[3] == "Li". Index 0 is no element.
ELEMENTS: tuple[str, ...] = tuple(
    "- H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr "
    "Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt "
    "Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv "
    "Ts Og".split()
)
ATOMIC_NUMBER: dict[str, int] = {symbol: z for z, symbol in enumerate(ELEMENTS) if z}

COORD_BITS = 32  #: fractional coordinates are multiples of 2**-32
SHOWN_ATOMS = 20  #: in a notebook
CELL_BITS = 24  #: lengths (Å) and angles (degrees) are multiples of 2**-24, below 256


#: Elements in alphabetical order with their counts.
Composition = tuple[tuple[str, int], ...]


def reduced_composition(symbols: Iterable[str]) -> Composition:
    """Elements in alphabetical order with their counts, divided by the greatest common divisor."""
    counts = Counter(symbols)
    unit = math.gcd(*counts.values())
    return tuple((symbol, n // unit) for symbol, n in sorted(counts.items()))


def formula_of(counts: Mapping[str, int]) -> str:
    """Of atoms of each element: OPTIMADE's `chemical_formula_reduced`, elements in alphabetical order (FeLiO4P)."""
    unit = math.gcd(*counts.values())
    return "".join(f"{symbol}{n // unit if n > unit else ''}" for symbol, n in sorted(counts.items()))


#: (V / abc)² of a cell that float64 cannot tell from a flat one: the flattest that six decimals write has 3e-13.
FLAT = 1e-13


@dataclass(frozen=True, eq=False)
class Crystal:
    """One crystal. Construction puts it on the grid, wraps coordinates into [0, 1), and checks it.

    Raises UserError if a number is not finite, a length is not in (0, 256) Å, an angle not in (0, 180)°, the angles
    close no cell, an atomic number is unknown, or the shapes disagree.
    """

    lengths: Float[np.ndarray, "3"]  #: a, b, c in Å
    angles: Float[np.ndarray, "3"]  #: α, β, γ in degrees
    species: Int[np.ndarray, "atoms"]  #: atomic numbers
    frac_coords: Float[np.ndarray, "atoms 3"]  #: fractional coordinates

    def __post_init__(self) -> None:
        lengths = np.asarray(self.lengths, np.float64)
        angles = np.asarray(self.angles, np.float64)
        species = np.asarray(self.species, np.int32).reshape(-1)
        coords = np.asarray(self.frac_coords, np.float64)
        if lengths.shape != (3,) or angles.shape != (3,):
            raise UserError(f"a cell has 3 lengths and 3 angles, found {lengths.size} and {angles.size}")
        if coords.shape != (len(species), 3) or not len(species):
            raise UserError(f"{len(species)} atoms need coordinates ({len(species)}, 3), found {coords.shape}")
        for name, values in (("length", lengths), ("angle", angles), ("coordinate", coords)):
            if not np.isfinite(values).all():
                raise UserError(f"a {name} is not a finite number: {values[~np.isfinite(values)][0]}")
        if not ((lengths > 0) & (lengths < 256)).all():
            raise UserError(f"lengths must lie between 0 and 256 Å, found {lengths.tolist()}")
        if not ((angles > 0) & (angles < 180)).all():
            raise UserError(f"angles must lie between 0 and 180 degrees, found {angles.tolist()}")
        if not closes(lengths, angles):
            raise UserError(f"no cell closes with the lengths {lengths.tolist()} and the angles {angles.tolist()}")
        if not ((species > 0) & (species < len(ELEMENTS))).all():
            raise UserError(f"atomic numbers run from 1 to {len(ELEMENTS) - 1}, found {species.tolist()}")
        lengths, angles = _on_grid(lengths, angles)
        grid = {
            "lengths": lengths,
            "angles": angles,
            "species": species,
            "frac_coords": np.round((coords % 1.0) * 2**COORD_BITS) % 2**COORD_BITS / 2**COORD_BITS,
        }
        for name, values in grid.items():
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(self.species)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Crystal) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("lengths", "angles", "species", "frac_coords")
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def symbols(self) -> list[str]:
        """Element symbols, atom by atom."""
        return [ELEMENTS[z] for z in self.species]

    @property
    def formula(self) -> str:
        """OPTIMADE's `chemical_formula_reduced`: elements in alphabetical order, for example FeLiO4P."""
        return formula_of(Counter(self.symbols))

    @property
    def formula_html(self) -> str:
        """The formula with its numbers as subscripts."""
        return re.sub(r"(\d+)", r"<sub>\1</sub>", self.formula)

    @cached_property
    def volume(self) -> float:
        """Cell volume in Å³."""
        return cell_volume(self.lengths, self.angles)

    @classmethod
    def from_structure(cls, structure: Structure) -> Crystal:
        """From an ordered pymatgen Structure. Raises UserError on partial occupancy or an unknown element."""
        if not structure.is_ordered:
            raise UserError(f"{structure.composition.formula} has partially occupied sites")
        symbols = [site.specie.symbol for site in structure]
        for symbol in symbols:
            if symbol not in ATOMIC_NUMBER:
                raise UserError(f"{symbol!r} is no chemical element")
        return cls.from_vectors(structure.lattice.matrix, [ATOMIC_NUMBER[s] for s in symbols], structure.frac_coords)

    @classmethod
    def from_vectors(
        cls, vectors: Float[np.ndarray, "3 3"], species: Int[np.ndarray, "atoms"], frac_coords: Float[np.ndarray, "a 3"]
    ) -> Crystal:
        """From cell vectors (rows, Å). Raises UserError as construction does, and for a cell of no volume.

        Lengths and angles do not tell the hand of the vectors: a left-handed cell would come back as its mirror image.
        All three turned round have the same lengths and angles and the other hand; the coordinates change their sign.
        """
        vectors, frac_coords = np.asarray(vectors, np.float64), np.asarray(frac_coords, np.float64)
        lengths = np.linalg.norm(vectors, axis=1)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise UserError(f"a cell vector has no finite length: {vectors.tolist()}")
        a, b, c = vectors / lengths[:, None]
        angles = np.degrees(np.arccos(np.clip([b @ c, c @ a, a @ b], -1, 1)))
        hand = -1 if np.linalg.det(vectors) < 0 else 1
        return cls(lengths, angles, species, hand * frac_coords)

    def to_structure(self) -> Structure:
        """The same crystal as a pymatgen Structure."""
        from pymatgen.core import Lattice, Structure

        lattice = Lattice.from_parameters(*self.lengths, *self.angles)
        return Structure(lattice, self.symbols, self.frac_coords)

    def to_atoms(self) -> Atoms:
        """The same crystal as ASE's Atoms."""
        from ase import Atoms

        cell = [*self.lengths, *self.angles]
        return Atoms(self.symbols, scaled_positions=self.frac_coords, cell=cell, pbc=True)

    def _repr_html_(self) -> str:
        """How a notebook shows it: formula, cell, and the first atoms."""
        shown = min(len(self), SHOWN_ATOMS)
        atoms = "".join(
            f"<tr><td>{symbol}</td>" + "".join(f"<td>{x:.4f}</td>" for x in coords) + "</tr>"
            for symbol, coords in zip(self.symbols[:shown], self.frac_coords, strict=False)
        )
        more = f"<p>… and {len(self) - shown} more atoms</p>" if shown < len(self) else ""
        cell = f"{' '.join(f'{x:.3f}' for x in self.lengths)} Å, {' '.join(f'{x:.2f}' for x in self.angles)}°"
        title = f"<b>{self.formula_html}</b>, {len(self)} atoms in {self.volume:.2f} Å³: {cell}"
        return f"<p>{title}</p><table><tr><th></th><th>x</th><th>y</th><th>z</th></tr>{atoms}</table>{more}"

    def to_cif(self) -> str:
        """CIF in P1 with every atom; each number is the shortest decimal that leads back to the same crystal."""
        cell = zip("abc", ("alpha", "beta", "gamma"), self.lengths, self.angles, strict=True)
        lengths, angles = [], []
        for edge, corner, length, angle in cell:
            lengths.append(f"_cell_length_{edge} {_shortest(length, CELL_BITS, round)}")
            angles.append(f"_cell_angle_{corner} {_shortest(angle, CELL_BITS, math.floor)}")
        atoms = [
            f"{symbol} {symbol}{i} {' '.join(_shortest(x, COORD_BITS, round) for x in coords)} 1"
            for i, (symbol, coords) in enumerate(zip(self.symbols, self.frac_coords, strict=True))
        ]
        return "\n".join(
            [
                f"data_{self.formula}",
                "_symmetry_space_group_name_H-M 'P 1'",
                "_symmetry_Int_Tables_number 1",
                *lengths,
                *angles,
                "loop_",
                "_symmetry_equiv_pos_site_id",
                "_symmetry_equiv_pos_as_xyz",
                "1 'x, y, z'",
                "loop_",
                *(f"_atom_site_{column}" for column in ("type_symbol", "label", "fract_x", "fract_y", "fract_z")),
                "_atom_site_occupancy",
                *atoms,
                "",
            ]
        )


def _shortest(value: float, bits: int, to_grid: Callable[[float], int]) -> str:
    """The decimal of fewest digits that `Crystal` puts on the same point of its grid of 2**-bits."""
    for decimals in itertools.count():
        written = f"{value:.{decimals}f}"
        if to_grid(float(written) * 2**bits) == value * 2**bits:
            return written


def cell_volume(lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]) -> float:
    """Volume in Å³ of the cell with these lengths (Å) and angles (degrees); 0 if no such cell closes, or is flat."""
    ca, cb, cg = np.cos(np.radians(angles))
    squared = 1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg
    return float(np.prod(lengths) * np.sqrt(squared)) if squared > FLAT else 0.0


def closes(lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]) -> bool:
    """Whether lengths (Å) and angles (degrees) are those of a cell, also as a `Crystal` has them, on its grid."""
    return all(cell_volume(*cell) > 0 for cell in ((lengths, angles), _on_grid(lengths, angles)))


def _on_grid(
    lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    # Angles down, not to the nearest: 119.9999999999 must not become 120, or truncation could not be reproduced.
    return np.round(lengths * 2**CELL_BITS) / 2**CELL_BITS, np.floor(angles * 2**CELL_BITS) / 2**CELL_BITS


@struct.dataclass
class CrystalBatch:
    """Many crystals on the device, padded to the same number of atoms; any leading shape (`*n`).

    Units are those of the grid: lengths 2⁻²⁴ Å, angles 2⁻²⁴ degrees, coordinates 2⁻³² of the cell edge.
    """

    lengths: UInt32[Array, "*n 3"]
    angles: UInt32[Array, "*n 3"]
    species: Int[Array, "*n atoms"]  #: atomic numbers, 0 beyond `num_atoms`
    frac_coords: UInt32[Array, "*n atoms 3"]  #: 0 beyond `num_atoms`
    num_atoms: Int[Array, "*n"]

    @classmethod
    def from_crystals(cls, crystals: Sequence[Crystal], max_atoms: int | None = None) -> CrystalBatch:
        """Numpy arrays, padded to `max_atoms` (default: the largest). Raises UserError if a crystal is larger."""
        largest = max((len(c) for c in crystals), default=0)
        max_atoms = largest if max_atoms is None else max_atoms
        if largest > max_atoms:
            raise UserError(f"a crystal has {largest} atoms, more than the {max_atoms} that the batch holds")
        n = len(crystals)
        species = np.zeros((n, max_atoms), np.int32)
        coords = np.zeros((n, max_atoms, 3), np.uint32)
        for i, crystal in enumerate(crystals):
            species[i, : len(crystal)] = crystal.species
            coords[i, : len(crystal)] = np.round(crystal.frac_coords * 2**COORD_BITS).astype(np.uint32)

        def cell(values: list[np.ndarray]) -> np.ndarray:
            return np.round(np.reshape(values, (n, 3)) * 2**CELL_BITS).astype(np.uint32)

        return cls(
            lengths=cell([c.lengths for c in crystals]),
            angles=cell([c.angles for c in crystals]),
            species=species,
            frac_coords=coords,
            num_atoms=np.array([len(c) for c in crystals], np.int32),
        )

    def __len__(self) -> int:
        return len(self.num_atoms)

    def __getitem__(self, index: object) -> CrystalBatch:
        return jax.tree.map(lambda x: x[index], self)

    def crystal(self, index: int) -> Crystal:
        """One of them, back on the host; exactly what `from_crystals` was given."""
        n = int(self.num_atoms[index])
        return Crystal(
            np.asarray(self.lengths[index], np.float64) / 2**CELL_BITS,
            np.asarray(self.angles[index], np.float64) / 2**CELL_BITS,
            np.asarray(self.species[index])[:n],
            np.asarray(self.frac_coords[index], np.float64)[:n] / 2**COORD_BITS,
        )
