"""Crystals as small as they go: by their symmetry, every number an integer of 10⁻⁵, some fifty bytes each.

    mp-5229   SrTiO3   221   [394510]   [38, 22, 8]   abc   []        space group, cell, species, letters, coordinates

A row holds the free lattice parameters (10⁻⁵ Å, then 10⁻⁵ degrees), atomic number and Wyckoff letter of each orbit, and
the free coordinates of its representative, as `SymmetricCrystal` has them; beside them the labels of `dataset.LABELS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, cell_of
from jaxcrystal.crystals.wyckoff import group
from jaxcrystal.errors import UserError

DECIMALS = 5

SCHEMA = pa.schema(
    [
        ("material_id", pa.string()),
        ("space_group", pa.uint8()),
        ("cell", pa.list_(pa.int32())),
        ("species", pa.list_(pa.uint8())),
        ("letters", pa.string()),
        ("frac_coords", pa.list_(pa.int32())),
        ("pretty_formula", pa.string()),
        ("spacegroup.number", pa.uint8()),  # as the source states it
        ("formation_energy_per_atom", pa.float64()),  # eV/atom
        ("band_gap", pa.float64()),  # eV
        ("e_above_hull", pa.float64()),  # eV/atom
    ]
)
LABELS = SCHEMA.names[6:]


def packed(crystal: SymmetricCrystal) -> dict[str, Any]:
    """The columns of its structure."""
    coords = [
        coordinate
        for orbit in crystal.orbits
        for coordinate, free in zip(orbit.frac_coords, crystal.position(orbit).free, strict=True)
        if free
    ]
    return {
        "space_group": crystal.space_group,
        "cell": _integers(crystal.parameters),
        "species": [orbit.species for orbit in crystal.orbits],
        "letters": "".join(orbit.letter for orbit in crystal.orbits),
        "frac_coords": [value % 10**DECIMALS for value in _integers(coords)],
    }


def unpacked(row: dict[str, Any]) -> SymmetricCrystal:
    """The way back. Raises UserError for what is no crystal."""
    here = group(row["space_group"])
    cell = cell_of(here.system, np.array(row["cell"]) / 10**DECIMALS)
    coords = iter(row["frac_coords"])
    orbits = []
    for species, letter in zip(row["species"], row["letters"], strict=True):
        free = here.position(letter).free
        x, y, z = (next(coords) / 10**DECIMALS if here_free else 0.0 for here_free in free)
        orbits.append(Orbit(species, letter, (x, y, z)))
    return SymmetricCrystal(here.number, cell[:3], cell[3:], tuple(orbits))


def elements(row: dict[str, Any]) -> list[str]:
    """The label: symbols, sorted."""
    return sorted({ELEMENTS[z] for z in row["species"]})


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """`rows` have every column of `SCHEMA`."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=["letters"])


def read(path: Path) -> list[dict[str, Any]]:
    """What `write` wrote. Raises UserError for a file that is missing or something else."""
    try:
        return pq.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} holds no packed crystals: {' '.join(str(error).split())[:200]}") from None


def _integers(values: Any) -> list[int]:
    return np.round(np.array(values, np.float64) * 10**DECIMALS).astype(np.int64).tolist()
