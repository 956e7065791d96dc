"""JSON, in the shapes in which people keep many structures in one file.

    {"lattice": …, "sites": …}                            one structure, of any kind that `structures.py` lists
    {"structure": …, "energy": …}                         one computed entry, or one row
    [item, item, …]                                       many; an item may be a row: {"material_id": …, "structure": …}
    {"mp-149": item, …}                                   by id; {"mp-149": {"mp-149-0-3": item, …}, …} as MPtrj
    {"material_id": {"0": …}, "structure": {"0": …}}      a table as pandas writes it, by columns in any order
    {"columns": […], "index": […], "data": [[…], …]}      the same, `orient="split"`
    {"1": item, "ids": [1], "nextid": 2}                  ASE's
    {"data": [{"id": …, "attributes": item}, …]}          an OPTIMADE response
    {"@class": "PatchedPhaseDiagram", …}                  the entries of a phase diagram
    one of these a line                                   .jsonl

In a row or a table, what holds the crystal is `cif`, else `structure`, else the one name that ends in `structure`,
`entry` or `atoms`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.reader.rows import Outcome, Refused
from jaxcrystal.reader.structures import is_structure

#: Names of a row's id, the first that there is.
IDS = ("material_id", "id", "immutable_id", "entry_id", "task_id", "mp_id", "jid", "unique_id")


def items(path: Path, text: str, *, by_line: bool = False) -> list[tuple[str | None, Any]]:
    """(id, item) of everything in the text of a file: a structure's dictionary, an entry's, a row, or whatever stands
    there; the id is None where none is stated.

    Raises UserError if it is no JSON, or JSON in which no item is or may be a structure.
    """
    try:
        document = _lines(text) if by_line else _parsed(text)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError says line and column
        hint = "; if it holds a document a line, name it .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path} is no JSON: {' '.join(str(error).split())}{hint}") from None
    if not isinstance(document, list | dict):
        raise UserError(f"{path} holds {str(document)[:40]!r}; expected structures, such as pymatgen's")
    found = _listed(document)
    if isinstance(document, dict) and found and not any(_may_hold(item) for _, item in found):
        keys = ", ".join(map(str, document))[:80]
        raise UserError(f"{path} holds no structures in a shape that is read; its keys are {keys}")
    return [(_id(item, stated), item) for stated, item in found]


@dataclass(frozen=True)
class Broken:
    """A line of a file of lines that is no JSON."""

    reason: str


def _parsed(text: str) -> Any:
    """JSON of which no object has a key twice. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
            raise ValueError(f"the key {twice!r} occurs twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def _lines(text: str) -> list[Any]:
    """The documents of the lines; OPTIMADE's files begin with lines about the file, which are none."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            item = _parsed(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            found.append(Broken(f"line {number} is no JSON: {' '.join(str(error).split())}"))
            continue
        about = {"x-optimade", "x_optimade"} & _keys(item) or (_keys(item) >= {"type"} and item["type"] == "info")
        if line.strip() and not about:
            found.append(item)
    if found and all(isinstance(item, Broken) for item in found):
        raise ValueError(found[0].reason)
    return found


def structure_of(item: Any) -> Any:
    """What describes the crystal in a structure, entry or row: a dictionary or text; None where it is left empty.

    Raises Refused (json_error) if there is none, or more than one.
    """
    if isinstance(item, str):
        return item
    if isinstance(item, Broken):
        raise Refused(Outcome.JSON_ERROR, item.reason)
    if not isinstance(item, Mapping):
        raise Refused(Outcome.JSON_ERROR, f"{str(item)[:40]!r} is no structure")
    if is_structure(item):
        return item
    if isinstance(item.get("attributes"), Mapping):
        return structure_of(item["attributes"])
    named = [name for name in ("cif", "structure") if name in item][:1] or list(filter(names_a_crystal, item))
    if len(named) != 1:
        found = f"has several: {', '.join(named)}" if named else f"has only {', '.join(map(str, item))[:80]}"
        raise Refused(Outcome.JSON_ERROR, f"expected one structure, with lattice and sites; the item {found}")
    inside = item[named[0]]
    return None if inside is None else structure_of(inside)


def names_a_crystal(name: object) -> bool:
    """Whether a column of that name may hold crystals; LeMat-GenBench has `structure`, `LeMatStructs`, `cif_string`."""
    lower = str(name).lower()
    if lower.startswith("wyckoff"):  # labels of the prototype of one, in matbench-discovery's summary
        return False
    return lower.endswith(("structure", "entry", "atoms")) or lower in ("cif", "cif_string", "lematstructs")


def _keys(item: Any) -> set[str]:
    return set(item) if isinstance(item, Mapping) else set()


def _is_entry(item: Any) -> bool:
    return {"energy", "composition"} <= _keys(item)


def _is_row(item: Any) -> bool:
    return isinstance(item, Mapping) and any(map(names_a_crystal, item))


def _holds_a_crystal(item: Any) -> bool:
    return is_structure(item) or _is_entry(item) or is_structure(_keys(item) and item.get("attributes"))


def _may_hold(item: Any) -> bool:
    return _holds_a_crystal(item) or _is_row(item) or (isinstance(item, str) and ("data_" in item or item[:1] == "{"))


def _listed(document: Any) -> Sequence[tuple[str | None, Any]]:
    if isinstance(document, list):
        return [(None, one) for item in document for one in (item if isinstance(item, list) else [item])]
    if document.get("@class") == "PatchedPhaseDiagram":
        # pymatgen of 2025 and before wrote the entries at the top.
        return _listed(document.get("computed_data", document).get("all_entries", []))
    if _holds_a_crystal(document):
        return [(None, document)]
    if {"columns", "data"} <= document.keys():
        rows = [dict(zip(document["columns"], row, strict=False)) for row in document["data"]]
        names = document.get("index", [])
        return [(str(names[i]) if i < len(names) else None, row) for i, row in enumerate(rows)]
    if {"data"} <= document.keys() and isinstance(document["data"], list | dict):  # OPTIMADE, pandas' orient="table"
        return [
            (None, item) for item in (document["data"] if isinstance(document["data"], list) else [document["data"]])
        ]
    for name in ("entries", "structures", "results"):  # of Alexandria, of pages of an API
        if isinstance(document.get(name), list) and any(map(_may_hold, document[name])):
            return _listed(document[name])
    if {"ids", "nextid"} <= document.keys():
        return [(str(i), document.get(str(i))) for i in document["ids"]]
    if any(names_a_crystal(name) and _is_column(column) for name, column in document.items()):
        columns = {name: column for name, column in document.items() if isinstance(column, dict)}
        names = dict.fromkeys(row for column in columns.values() for row in column)
        return [(str(row), {name: column.get(row) for name, column in columns.items()}) for row in names]
    if sum(map(_holds_a_crystal, document.values())) == 1 and _is_row(document):
        return [(None, document)]  # one row
    if _is_row(document) and isinstance(document.get("cif", document.get("structure")), str):
        return [(None, document)]  # one row, its structure as text
    return [pair for name, item in document.items() for pair in _nested(name, item)]


def _nested(name: str, item: Any) -> list[tuple[str, Any]]:
    """An item by its id, or the items by id that stand in its place."""
    deeper = isinstance(item, dict) and item and not _may_hold(item)
    if deeper and all(isinstance(inner, dict) and _may_hold(inner) for inner in item.values()):
        return [
            (f"{inner}" if str(inner).startswith(str(name)) else f"{name}/{inner}", it) for inner, it in item.items()
        ]
    return [(name, item)]


def _is_column(column: Any) -> bool:
    return isinstance(column, dict) and not _holds_a_crystal(column) and not _is_row(column)


def _id(item: Any, stated: str | None) -> str | None:
    """The key by which an item is kept, unless that is a number and the item has a name of its own."""
    if stated is not None and not stated.isdecimal():
        return stated
    own = next((item[name] for name in IDS if item.get(name) is not None), None) if isinstance(item, Mapping) else None
    return stated if own is None else str(own)
