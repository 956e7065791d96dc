"""pymatgen's JSON, in the shapes in which people keep many of its structures or computed entries in one file.

    {"lattice": …, "sites": …}                            one structure
    {"structure": …, "energy": …}                         one computed entry
    [item, item, …]                                       many; an item may be a row: {"material_id": …, "structure": …}
    {"mp-149": item, …}                                   by id
    {"material_id": {"0": …}, "structure": {"0": …}}      a table as pandas writes it, by columns in any order
    {"columns": […], "index": […], "data": [[…], …]}      the same, `orient="split"`
    {"@class": "PatchedPhaseDiagram", …}                  the entries of a phase diagram

In a row or a table, what holds the crystal is `structure`, else the one name that ends in `structure` or `entry`.
"""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError

#: File names that are read, the packed ones included.
SUFFIXES = (".json", ".json.gz", ".json.bz2")

_IDS = ("material_id", "id", "entry_id", "task_id")


def is_json(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def items(path: Path) -> list[tuple[str, Any]]:
    """(id, item) of everything in the file: a structure's dictionary, an entry's, a row, or whatever stands there.

    Raises UserError if the file is no JSON, or JSON that is no collection.
    """
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        elif raw[:3] == b"BZh":
            raw = bz2.decompress(raw)
        document = json.loads(raw)
    except (ValueError, OSError, EOFError) as error:  # a JSONDecodeError says line and column
        raise UserError(f"{path} is no JSON: {' '.join(str(error).split())}") from None
    if not isinstance(document, list | dict):
        raise UserError(f"{path} holds {str(document)[:40]!r}; expected structures as pymatgen writes them")
    return [(_id(item, default), item) for default, item in _listed(document)]


def structure_of(item: Any) -> Any:
    """The structure's dictionary in a structure, entry or row; None where the row leaves it empty.

    Raises ValueError if there is none, or more than one.
    """
    if not isinstance(item, dict):
        raise ValueError(f"{str(item)[:40]!r} is no structure")
    if _is_structure(item):
        return item
    named = ["structure"] if "structure" in item else [name for name in item if _names_a_crystal(name)]
    if len(named) != 1:
        found = f"has several: {', '.join(named)}" if named else f"has only {', '.join(map(str, item))[:80]}"
        raise ValueError(f"expected one structure, with lattice and sites; the item {found}")
    inside = item[named[0]]
    return None if inside is None else structure_of(inside)


def _is_structure(item: Any) -> bool:
    return isinstance(item, dict) and "lattice" in item and "sites" in item


def _is_entry(item: Any) -> bool:
    return isinstance(item, dict) and "energy" in item and "composition" in item


def _names_a_crystal(name: object) -> bool:
    return str(name).lower().endswith(("structure", "entry"))


def _listed(document: Any) -> list[tuple[str, Any]]:
    if isinstance(document, list):
        return [(str(row), item) for row, item in enumerate(document)]
    if document.get("@class") == "PatchedPhaseDiagram":
        # pymatgen of 2025 and before wrote the entries at the top.
        return _listed(document.get("computed_data", document).get("all_entries", []))
    if _is_structure(document) or _is_entry(document):
        return [("0", document)]
    if {"columns", "data"} <= document.keys():
        rows = [dict(zip(document["columns"], row, strict=False)) for row in document["data"]]
        names = document.get("index", range(len(rows)))
        return [(str(names[i] if i < len(names) else i), row) for i, row in enumerate(rows)]
    if any(_names_a_crystal(name) and _is_column(column) for name, column in document.items()):
        columns = {name: column for name, column in document.items() if isinstance(column, dict)}
        names = dict.fromkeys(row for column in columns.values() for row in column)
        return [(str(row), {name: column.get(row) for name, column in columns.items()}) for row in names]
    if sum(map(_holds_a_crystal, document.values())) == 1 and any(map(_names_a_crystal, document)):
        return [("0", document)]  # one row
    return list(document.items())


def _holds_a_crystal(item: Any) -> bool:
    return _is_structure(item) or _is_entry(item)


def _is_column(column: Any) -> bool:
    return isinstance(column, dict) and not _holds_a_crystal(column)


def _id(item: Any, default: str) -> str:
    if isinstance(item, dict):
        return next((str(item[name]) for name in _IDS if item.get(name) is not None), str(default))
    return str(default)
