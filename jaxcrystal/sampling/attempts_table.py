"""Attempts as a table: a parquet or CSV file, or a folder whose crystals are CIF files beside `attempts.parquet`."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.sampling.attempt import OK

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("draw", pa.int64()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("conditions", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),
        ("log_probability", pa.float64()),
        ("grammar_log_probability", pa.float64()),
        ("tokens", pa.int64()),
        ("formula", pa.string()),
        ("cif", pa.string()),
        ("space_group", pa.int64()),
        ("symmetrized_cif", pa.string()),
        ("symmetry_failure", pa.string()),
        ("resampled", pa.int64()),
        ("written_group", pa.int64()),
        ("higher_symmetry", pa.bool_()),
        ("redraws", pa.int64()),
        ("asked", pa.string()),
        ("forced", pa.string()),
    ]
)
ROWS_PER_GROUP = 1024
CIF_NAME = re.compile(r"\d{6,}\.cif")


def write_table(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Writes the rows as the name of `out` has it. Raises OSError for what the disk refuses."""
    if out.suffix == ".csv":
        write_whole(out, partial(_csv, rows))
    elif out.suffix == ".parquet":
        write_whole(out, partial(_parquet, rows))
    else:
        (out / "symmetrized").mkdir(parents=True, exist_ok=True)
        write_whole(out / "attempts.parquet", partial(_parquet, _with_files(out, rows)))


def read_table(out: Path) -> Iterator[dict[str, Any]]:
    """The rows that `write_table` wrote."""
    if out.suffix == ".csv":
        with out.open(newline="") as file:
            for row in csv.DictReader(file):
                yield {name: _of_csv(name, text) for name, text in row.items()}
    else:
        with pq.ParquetFile(out if out.suffix else out / "attempts.parquet") as table:
            for batch in table.iter_batches(ROWS_PER_GROUP):
                yield from batch.to_pylist()


def more_symmetric(out: Path) -> int:
    """Crystals of a table that have more symmetry than their text says."""
    return sum(row["status"] == OK and bool(row.get("higher_symmetry")) for row in read_table(out))


def redrawn(out: Path) -> int:
    """Compositions that were drawn again for a table, because training had their formula."""
    return sum(row.get("redraws") or 0 for row in read_table(out))


def checksum(out: Path) -> str:
    """SHA-256 of the table; of a folder, of its table and the names of its CIF files."""
    with (out if out.suffix else out / "attempts.parquet").open("rb") as table:
        digest = hashlib.file_digest(table, "sha256")
    if not out.suffix:
        names = sorted(path.name for path in out.iterdir() if CIF_NAME.fullmatch(path.name))
        digest.update("\n".join(names).encode())
    return digest.hexdigest()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file at `path` is whole or not there: it is written under another name first."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _with_files(out: Path, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows; each crystal is written to files of its own on the way, in place of those of a smaller `num`."""
    for path in [*out.iterdir(), *(out / "symmetrized").iterdir()]:
        if CIF_NAME.fullmatch(path.name):
            path.unlink()
    for row in rows:
        if row["status"] == OK:
            name = f"{row['index']:06d}.cif"
            (out / name).write_text(row["cif"])
            if row["symmetrized_cif"] is not None:
                (out / "symmetrized" / name).write_text(row["symmetrized_cif"])
        yield row


def _of_csv(name: str, text: str) -> int | float | bool | str | None:
    """A table has no field for None: it is what no text has, and `text` is never None."""
    if not text and name != "text":
        return None
    kind = SCHEMA.field(name).type
    if kind == pa.bool_():
        return text == "True"
    return int(text) if kind == pa.int64() else float(text) if kind == pa.float64() else text


def _csv(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        plain, quoted = (
            csv.DictWriter(file, SCHEMA.names, lineterminator="\n", quoting=quoting)
            for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        plain.writeheader()
        for row in rows:  # a carriage return ends a line unless it is quoted, which Python 3.11 does not
            (quoted if any("\r" in x for x in row.values() if isinstance(x, str)) else plain).writerow(row)


def _parquet(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with pq.ParquetWriter(path, SCHEMA) as table:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            table.write_table(pa.Table.from_pylist(group, SCHEMA))
