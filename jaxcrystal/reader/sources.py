"""Foreign files as rows: CSV and parquet with CDVAE's columns, folders of CIFs, extxyz, the embedded set.

Nothing is interpreted here. A row is the text of one structure with the labels as its file states them; a row that
cannot even be cut out of its file is a row that says so. What a row means is the matter of `crystals.checks`.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.dataset import PROTOTYPES, CrystalSet, load
from jaxcrystal.errors import UserError

#: The columns of a table that are read: CDVAE's. Any other is ignored, and the report names it.
COLUMNS = ("material_id", "cif", *ATTRIBUTES)

_KINDS = "a .csv or .parquet file with a `cif` column, a .cif file, a folder of them, an .extxyz file, or `prototypes`"


@dataclass(frozen=True)
class Row:
    """One structure as it came."""

    number: int  #: from 0 within its file
    id: str
    structure: str | Crystal | None  #: text in `format`, or already a crystal; None if the row holds neither
    format: Literal["cif", "extxyz"] = "cif"
    labels: Mapping[str, Any] | None = None  #: by column name, as the file states them
    problem: str = ""  #: why `structure` is None


@dataclass(frozen=True)
class Source:
    """The rows that become one part of the stored data set."""

    part: str  #: the part's name
    origin: str  #: what the user named
    sha256: str | None  #: of the file, or of all files of the folder in order of their names
    rows: tuple[Row, ...]
    ignored_columns: tuple[str, ...] = ()


def read(origin: str | Path) -> list[Source]:
    """What `origin` holds; one source, but two for `prototypes`.

    Raises UserError if it does not exist, is empty, is of no known kind, or lacks the column `cif`.
    """
    if str(origin) == PROTOTYPES:
        return [_embedded(side) for side in ("train", "validation")]
    path = Path(origin)
    try:
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".cif")
            rows, ignored = [_cif_row(i, p) for i, p in enumerate(files)], ()
        else:
            files = [path]
            rows, ignored = _file_rows(path)
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path} is empty: it holds no structure; give {_KINDS}")
    part = path.stem if path.is_file() else path.resolve().name  # "." has a name too
    return [Source(part, str(path), digest.hexdigest(), tuple(rows), ignored)]


def _file_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    match path.suffix.lower():
        case ".csv":
            return _csv_rows(path)
        case ".parquet":
            return _parquet_rows(path)
        case ".cif":
            return [_cif_row(0, path)], ()
        case ".extxyz" | ".xyz":
            return list(_frames(path)), ()
    if not path.exists():
        raise UserError(f"{path} does not exist; give {_KINDS}")
    raise UserError(f"{path}: the kind of file {path.suffix or 'without ending'!r} is not known; give {_KINDS}")


def _cif_row(number: int, path: Path) -> Row:
    # Old CIFs hold author names in other encodings; nothing that is read of them is beyond ASCII.
    return Row(number, path.stem, path.read_text("utf-8", errors="replace"))


def _csv_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    csv.field_size_limit(2**30)  # a CIF of a large cell is longer than the module's default
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)  # else a file that was cut off inside a field passes for whole
            header = next(lines, [])
            if not header:
                raise UserError(f"{path} is empty: it has no header; give {_KINDS}")
            ignored = _check_columns(path, header)
            for number, fields in enumerate(fields for fields in lines if fields):
                if len(fields) == len(header):
                    stated = {name: value for name, value in zip(header, fields, strict=True) if value != ""}
                    rows.append(_table_row(number, stated))
                else:
                    problem = f"the row has {len(fields)} fields, the header {len(header)}"
                    rows.append(Row(number, str(number), None, problem=problem))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV after {len(rows)} rows: {error}") from None
    return rows, ignored


def _parquet_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    try:
        table = pq.ParquetFile(path).read()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None
    ignored = _check_columns(path, table.column_names)
    table = table.select([name for name in COLUMNS if name in table.column_names])
    return [_table_row(number, row) for number, row in enumerate(table.to_pylist())], ignored


def _check_columns(path: Path, header: list[str]) -> tuple[str, ...]:
    """The columns that nothing reads."""
    if "cif" not in header:
        if {"lengths", "species", "frac_coords"} <= set(header):
            raise UserError(f"{path} is already prepared; read it as it is")
        raise UserError(f"{path} has no column 'cif'; it has {', '.join(header)}: name the one with the CIFs so")
    return tuple(name for name in header if name not in COLUMNS)


def _table_row(number: int, stated: Mapping[str, Any]) -> Row:
    labels = {name: stated[name] for name in ATTRIBUTES if stated.get(name) is not None}
    identity, cif = stated.get("material_id"), stated.get("cif")
    identity = str(number) if identity is None else str(identity)
    if not isinstance(cif, str):
        return Row(number, identity, None, problem=f"the field `cif` holds no text: {cif!r}")
    return Row(number, identity, cif, labels=labels)


def _frames(path: Path) -> Iterator[Row]:
    """The frames of an extxyz file: a line with the number of atoms, a comment, a line an atom."""
    lines = path.read_text("utf-8", errors="replace").splitlines()
    start = number = 0
    while start < len(lines):
        count = lines[start].strip()
        if not count and not any(line.strip() for line in lines[start:]):
            return
        if not count.isdecimal():
            problem = f"line {start + 1}: expected a number of atoms, found {count!r}; all that follows is unread"
            yield Row(number, str(number), None, problem=problem)
            return
        end = start + 2 + int(count)
        yield Row(number, str(number), "\n".join(lines[start:end]) + "\n", "extxyz")
        start, number = end, number + 1


def _embedded(side: str) -> Source:
    crystals: CrystalSet = load(f"{PROTOTYPES}:{side}")
    rows = [Row(i, crystals.ids[i], crystals.crystal(i), labels=crystals.attributes(i)) for i in range(len(crystals))]
    return Source(f"{PROTOTYPES}_{side}", PROTOTYPES, None, tuple(rows))
