"""Crystals from memory, as a file for the one reader: no second set of rules decides what a crystal is.

    CIF texts, our Crystals                   ──▶ NAME.parquet, with a column `cif`
    Structures, Atoms, anything MSONable      ──▶ NAME.json, rows with pymatgen's dictionaries
    a DataFrame without such objects          ──▶ NAME.parquet, as it stands

A Crystal's CIF leads back to the same Crystal, bit for bit; JSON keeps every digit of a float.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
import pyarrow as pa

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError

_EXPECTED = "expected pymatgen Structures, ASE Atoms, Crystals, texts of CIFs, or a path"


def is_place(source: object) -> TypeGuard[str | PathLike[str]]:
    """Whether it names a file or folder; a text with a line feed is a CIF."""
    return isinstance(source, PathLike) or (isinstance(source, str) and "\n" not in source)


def stored(source: Any, folder: Path, name: str) -> Path:
    """Writes a source to a file in `folder` that the reader reads; its path.

    Raises UserError that names the position, if something in the source can be no crystal; what a crystal is worth is
    for the reader to say.
    """
    known, crystals = _parts(source)
    if not len(known):
        raise UserError(f"there are no crystals: the {type(source).__name__} is empty")
    if crystals is None:
        return _parquet(known, folder / f"{name}.parquet")
    if all(crystal is None or isinstance(crystal, (str, Crystal)) for crystal in crystals):
        cifs = [crystal.to_cif() if isinstance(crystal, Crystal) else crystal for crystal in crystals]
        return _parquet(known.assign(cif=pd.array(cifs, dtype="str")), folder / f"{name}.parquet")
    facts = known.astype(object).where(known.notna(), None).to_dict("index")
    rows = [{**facts[place], "structure": _dictionary(crystal, place)} for place, crystal in enumerate(crystals)]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows, default=_plain), encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays for JSON; of anything else, its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _parts(source: Any) -> tuple[pd.DataFrame, list[Any] | None]:
    """What is known of each crystal, with its id if it has one, and the crystals; None: they are in the table."""
    if isinstance(source, pd.DataFrame):
        columns = [column for column in source if _holds_crystals(source[column])]
        if len(columns) > 1:
            raise UserError(f"the table holds crystals in {', '.join(map(str, columns))}; leave one of these columns")
        known = source.drop(columns=columns)
        if "material_id" not in known and not isinstance(known.index, pd.RangeIndex):
            known = known.assign(material_id=known.index.map(str))
        return known.reset_index(drop=True), source[columns[0]].tolist() if columns else None
    if isinstance(source, pd.Series) and not isinstance(source.index, pd.RangeIndex):
        source = dict(zip(source.index.map(str), source, strict=True))
    if isinstance(source, Mapping) and "lattice" not in source:
        return pd.DataFrame({"material_id": list(map(str, source))}), list(source.values())
    if _is_crystal(source) or isinstance(source, (str, Mapping)):
        source = [source]
    if not isinstance(source, Iterable):
        raise UserError(f"a {type(source).__name__} holds no crystals; {_EXPECTED}")
    crystals = list(source)
    return pd.DataFrame(index=range(len(crystals))), crystals


def _is_crystal(value: object) -> bool:
    """pymatgen's objects say how they are written; ASE's Atoms have cell and numbers."""
    return isinstance(value, Crystal) or hasattr(value, "as_dict") or _is_atoms(value)


def _is_atoms(value: object) -> bool:
    return hasattr(value, "cell") and hasattr(value, "numbers")


def _holds_crystals(column: pd.Series) -> bool:
    return column.dtype == object and any(map(_is_crystal, column))


def _dictionary(crystal: Any, place: Any) -> Any:
    """A structure as pymatgen writes it."""
    if crystal is None or isinstance(crystal, Mapping):
        return crystal
    if isinstance(crystal, Crystal):
        crystal = crystal.to_structure()
    if _is_atoms(crystal):
        return _of_atoms(crystal)
    if hasattr(crystal, "as_dict"):
        return crystal.as_dict()
    raise UserError(f"crystal {place} is a {type(crystal).__name__}; {_EXPECTED}, all of one kind")


def _of_atoms(atoms: Any) -> dict[str, Any]:
    try:
        coords = atoms.cell.scaled_positions(atoms.positions)
    except np.linalg.LinAlgError:  # no cell: the reader will say so, wherever the atoms are
        coords = np.zeros((len(atoms), 3))
    # ASE keeps shared sites beside the atoms, by kind of site.
    shared = {str(kind): elements for kind, elements in atoms.info.get("occupancy", {}).items()}
    kinds = atoms.arrays.get("spacegroup_kinds", np.full(len(atoms), -1))
    sites = []
    for symbol, kind, abc in zip(atoms.get_chemical_symbols(), kinds, coords.tolist(), strict=True):
        species = [{"element": e, "occu": float(x)} for e, x in shared.get(str(kind), {symbol: 1}).items()]
        sites.append({"species": species, "abc": abc})
    return {"lattice": {"matrix": atoms.cell.tolist(), "pbc": atoms.pbc.tolist()}, "sites": sites}


def _parquet(table: pd.DataFrame, path: Path) -> Path:
    try:
        table.to_parquet(path, index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise UserError(f"the table cannot be read: {' '.join(str(error).split())}; {_EXPECTED} in it") from None
    return path
