"""A symmetric crystal as CIF: the conventional cell, the operations, and one atom of every orbit."""

from __future__ import annotations

from fractions import Fraction

import moyopy
import numpy as np
from jaxtyping import Int

from jaxcrystal.crystals.symmetric import SymmetricCrystal
from jaxcrystal.crystals.wyckoff import GRID

#: Digits behind the point. 1/3 comes out near enough that readers see that images coincide; `Crystal` holds no more.
DECIMALS = 8


def to_cif(crystal: SymmetricCrystal, symprec: float) -> str:
    """With operations, multiplicities and Wyckoff letters; the first line names moyo and the tolerance (Å)."""
    here = crystal.group
    lengths = [f"_cell_length_{edge} {_decimal(x)}" for edge, x in zip("abc", crystal.lengths, strict=True)]
    corners = zip(("alpha", "beta", "gamma"), crystal.angles, strict=True)
    atoms = [
        f"{o.symbol} {o.symbol}{i} {p.multiplicity} {o.letter} {' '.join(map(_decimal, o.frac_coords))} 1"
        for i, o in enumerate(crystal.orbits)
        for p in [crystal.position(o)]
    ]
    return "\n".join(
        [
            f"# refined by moyo {moyopy.__version__} with symprec {symprec:g} Angstrom",
            f"data_{crystal.formula}",
            f"_space_group_name_H-M_alt '{here.symbol.replace('_', '')}'",
            f"_space_group_name_Hall '{here.hall_symbol}'",
            f"_space_group_IT_number {here.number}",
            *lengths,
            *(f"_cell_angle_{corner} {_decimal(x)}" for corner, x in corners),
            "loop_",
            "_space_group_symop_id",
            "_space_group_symop_operation_xyz",
            *(f"{i} '{_xyz(*operation)}'" for i, operation in enumerate(here.operations, start=1)),
            "loop_",
            *(f"_atom_site_{column}" for column in ("type_symbol", "label", "symmetry_multiplicity")),
            *(f"_atom_site_{column}" for column in ("Wyckoff_symbol", "fract_x", "fract_y", "fract_z")),
            "_atom_site_occupancy",
            *atoms,
            "",
        ]
    )


def _decimal(x: float) -> str:
    return np.format_float_positional(np.round(x, DECIMALS), trim="-")


def _xyz(rotation: Int[np.ndarray, "3 3"], translation: Int[np.ndarray, "3"]) -> str:
    """An operation as CIF writes it: -x+y, x, z+1/3."""
    rows = []
    for row, shift in zip(rotation, translation, strict=True):
        terms = "".join(f"{'-' if n < 0 else '+'}{axis}" for n, axis in zip(row, "xyz", strict=True) if n)
        rows.append(terms.removeprefix("+") + (f"+{Fraction(int(shift), GRID)}" if shift else ""))
    return ", ".join(rows)
