"""Reads any set of crystals, and loses none: every record of the source becomes a row with a typed outcome."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.cif import Found, read_cif
from jaxcrystal.reader.json_documents import structure_of
from jaxcrystal.reader.rows import Outcome, Refused, Row, Rows
from jaxcrystal.reader.sources import Record, open_source
from jaxcrystal.reader.structures import one_line, read_dictionary, read_extxyz, read_object, read_poscar
from jaxcrystal.workers import Lost, Workers, each

#: The outcome of a record that breaks its reader in a way that nobody foresaw.
_BROKEN = {
    "cif": Outcome.CIF_ERROR,
    "poscar": Outcome.POSCAR_ERROR,
    "extxyz": Outcome.EXTXYZ_ERROR,
    "structure": Outcome.JSON_ERROR,
    "object": Outcome.JSON_ERROR,
}


def read(source: Any, *, workers: Workers | None = None, limit: int | None = None) -> Rows:
    """The first `limit` (default: all) structures of a source.

    `source` is a path, a pandas table, a structure, a list of them (`sources.py` says which), or what was read before.
    Raises UserError that names it and what was expected, if it does not exist, is empty, or lacks a column; and for a
    limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    if isinstance(source, Rows):
        return replace(source, rows=source.rows[:limit])
    found = open_source(source)
    rows = each(interpret, found.records[:limit], workers, label=f"reading {found.path.name}", lost=lost)
    sha256 = _digest(rows) if found.sha256 is None else found.sha256
    return Rows(found.path, sha256, tuple(rows), found.has_ids, found.unread, found.ignored_columns)


def interpret(record: Record) -> Row:
    """What a record means."""
    # The text of a file with several structures is the CIF of none of them.
    own = record.form in ("cif", "none") and isinstance(record.content, str) and record.block is None
    cif = record.content if own else ""

    def refused(outcome: str, reason: str) -> Row:
        return Row(record.id, record.row, outcome, reason, None, cif, record.labels, record.notes)

    if record.form == "none":
        return refused(str(record.outcome), record.reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen's and ASE's; what matters of them is an outcome or a note
            found, stated = _found(record)
    except Refused as why:
        return refused(why.outcome, why.reason)
    except ImportError as error:  # no fault of the row's
        raise UserError(f"{error.name or error} is not installed; pip install 'jaxcrystal[evaluate]'") from None
    except Exception as error:  # what a stranger's file does to a parser costs this row, and is counted
        return refused(_BROKEN[record.form].value, one_line(error))
    labels = {name: stated[name] for name in ATTRIBUTES if stated.get(name) is not None} | dict(record.labels)
    return Row(record.id, record.row, Outcome.OK.value, "", found.crystal, cif, labels, (*record.notes, *found.notes))


def _found(record: Record) -> tuple[Found, dict[str, Any]]:
    """The crystal, and what its own text states beside it."""
    match record.form:
        case "cif":
            return read_cif(record.content, record.block), {}
        case "poscar":
            return read_poscar(record.content), {}
        case "extxyz":
            return read_extxyz(record.content)
        case "object":
            return read_object(record.content), {}
    inside = structure_of(record.content)
    if inside is None:
        raise Refused(Outcome.MISSING, "the row has no structure")
    return read_dictionary(inside), {}


def lost(record: Record, why: Lost) -> Row:
    """The row of a record whose reading ended its process."""
    cif = record.content if record.form == "cif" and record.block is None else ""
    return Row(record.id, record.row, why.value, why.reason, None, cif, record.labels, record.notes)


def crystal_from_cif(text: str) -> Crystal | None:
    """The crystal that a CIF describes; None where a row with this CIF would be counted as a failure."""
    return interpret(Record("", 0, "cif", text)).crystal


def _digest(rows: Sequence[Row]) -> str:
    """Of what was in memory: the crystals, or why there is none."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.id} {row.outcome}".encode())
        if row.crystal is not None:
            crystal = row.crystal
            for values in (crystal.lengths, crystal.angles, crystal.species, crystal.frac_coords):
                digest.update(values.tobytes())
    return digest.hexdigest()
