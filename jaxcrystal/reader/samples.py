"""Reads any set of crystals, and loses none: every row of the source becomes one `Sample` with a typed outcome.

- parquet or CSV with a `cif` column: as CDVAE, crystal-text-llm and DiffCSP write them; with `status`: our ledger
- parquet with lengths, angles, species, frac_coords: what `jaxcrystal prepare` writes
- extxyz: one frame a crystal
- JSON, which may be packed: pymatgen's structures and computed entries in the shapes that `pymatgen_json.py` lists
- a folder: its *.cif files, or, where our sampler wrote them, all attempts of its ledger
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal
from jaxcrystal.errors import UserError, printable
from jaxcrystal.reader.pymatgen_json import is_json, items, structure_of
from jaxcrystal.workers import Lost, Workers, each

#: Outcomes of a row that reads as a crystal's description, though only `ok` is a crystal that can be built.
PARSED = ("ok", "cell_error", "disordered")

_PREPARED = ("lengths", "angles", "species", "frac_coords")
_EXPECTED = "a `cif` column, or the columns lengths, angles, species, frac_coords that `jaxcrystal prepare` writes"


@dataclass(frozen=True)
class Sample:
    """One attempt at a crystal.

    `outcome` is `ok`, or why there is no crystal: `missing` (an empty cell), `cif_error`, `extxyz_error`, `json_error`
    (malformed), `unknown_element`, `not_finite`, `disordered`, `cell_error` (no such cell), `crashed` or `timeout`
    (reading it killed a process), or what the sampler's ledger says.
    """

    id: str
    row: int  #: in the source, from 0
    outcome: str
    reason: str  #: empty when the outcome is `ok`
    crystal: Crystal | None
    cif: str  #: as the source has it; empty when the source holds none
    labels: Mapping[str, Any] = field(default_factory=dict)  #: what the source says of it beside its structure
    notes: tuple[str, ...] = ()  #: what was changed, or was stated and is not used, in words that many rows share


@dataclass(frozen=True)
class SampleSet:
    """Everything that was read from one place."""

    path: Path
    sha256: str  #: of the file's bytes; for a folder, of its CIF files' names and bytes
    samples: tuple[Sample, ...]
    has_ids: bool = False  #: whether the source names its rows (a column, an index, names of files), or we number them


def read(path: str | Path | SampleSet, *, workers: Workers | None = None, limit: int | None = None) -> SampleSet:
    """The first `limit` (default: all) samples of a file or folder, or of what was read before.

    Raises UserError that names the path and what was expected, if it does not exist, is empty, or lacks a column;
    and for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    if isinstance(path, SampleSet):
        return replace(path, samples=path.samples[:limit])
    path = Path(path)
    if (path / "attempts.parquet").is_file():  # a ledger as a folder: the CIF files alone would hide what failed
        path = path / "attempts.parquet"
    records = _records(path)
    if not records:
        raise UserError(f"{path} holds no crystals; expected at least one row, frame or *.cif file")
    records = records[:limit]
    samples = each(_sample, records, workers, label=f"reading {path.name}", lost=_lost)
    numbered = all(sample.id == str(sample.row) for sample in samples)
    return SampleSet(path, _sha256(path), tuple(samples), has_ids=not numbered)


@dataclass(frozen=True)
class _Record:
    """A row before it is read. `form` says what `content` is: cif, extxyz, json, arrays, or none after a failure."""

    id: str
    row: int
    form: str
    content: Any
    outcome: str = "ok"


def _records(path: Path) -> list[_Record]:
    if path.is_dir():
        files = _cif_files(path)
        return [_Record(printable(f.stem), row, "cif", f.read_text(errors="replace")) for row, f in enumerate(files)]
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; expected a parquet, CSV, JSON or extxyz file, or a folder of *.cif files"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; expected a table with {_EXPECTED}, or extxyz frames")
    if is_json(path):
        return [_Record(name, row, "json", item) for row, (name, item) in enumerate(items(path))]
    match path.suffix.lower():
        case ".parquet" | ".pq":
            return _rows(_table(path, pd.read_parquet), path)
        case ".csv":
            return _rows(_table(path, pd.read_csv, dtype=str, keep_default_na=False), path)
        case ".extxyz" | ".xyz":
            return _frames(path)
        case ".cif":
            return [_Record(printable(path.stem), 0, "cif", path.read_text(errors="replace"))]
    raise UserError(
        f"{path}: unknown kind of file {path.suffix!r}; expected .parquet, .csv, .json, .extxyz or a folder"
    )


def _cif_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cif"))


def _table(path: Path, reader: Any, **options: Any) -> pd.DataFrame:
    try:
        return reader(path, **options)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors are ValueErrors
        raise UserError(f"cannot read {path} as a table: {' '.join(str(error).split())}") from None


def _rows(table: pd.DataFrame, path: Path) -> list[_Record]:
    columns = set(table.columns)
    if "cif" not in columns and not columns.issuperset(_PREPARED):
        raise UserError(f"{path} has the columns {', '.join(map(str, table.columns))}; expected {_EXPECTED}")
    name = "index" if {"index", "status"} <= columns else "material_id"
    ids = table[name] if name in columns else range(len(table))
    if "cif" not in columns:
        contents = zip(*(table[column] for column in _PREPARED), strict=True)
        return [_Record(str(i), row, "arrays", x) for row, (i, x) in enumerate(zip(ids, contents, strict=True))]
    outcomes = table["status"] if "status" in columns else ["ok"] * len(table)
    records = []
    for row, (i, cif, outcome) in enumerate(zip(ids, table["cif"], outcomes, strict=True)):
        text = cif if isinstance(cif, str) else ""  # a missing CIF is None or NaN in parquet
        if outcome == "ok" and not text.strip():
            outcome = "missing"
        records.append(_Record(str(i), row, "cif" if outcome == "ok" else "none", text, outcome))
    return records


def _frames(path: Path) -> list[_Record]:
    """Frames of an extxyz file, cut apart by their atom counts, so that a broken frame costs only itself."""
    lines = path.read_text(errors="replace").rstrip().split("\n")
    records, at = [], 0
    while at < len(lines):
        if not lines[at].strip().isdigit():
            raise UserError(f"{path}, line {at + 1}: expected a frame's number of atoms, found {lines[at][:40]!r}")
        end = at + 2 + int(lines[at])
        records.append(_Record(str(len(records)), len(records), "extxyz", "\n".join(lines[at:end]) + "\n"))
        at = end
    return records


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _cif_files(path) if path.is_dir() else [path]:
        digest.update(os.fsencode(file.name) if path.is_dir() else b"")
        digest.update(file.read_bytes())
    return digest.hexdigest()


class _Unreadable(Exception):
    """Carries the outcome of a row that is no crystal."""

    def __init__(self, outcome: str, reason: str) -> None:
        self.outcome, self.reason = outcome, reason


def _lost(record: _Record, why: Lost) -> Sample:
    cif = record.content if record.form == "cif" else ""
    return Sample(record.id, record.row, why.value, why.reason, None, cif)


def _sample(record: _Record) -> Sample:
    cif = record.content if record.form == "cif" or record.form == "none" else ""
    if record.form == "none":
        reason = "the row has no CIF" if record.outcome == "missing" else f"the sampler reported {record.outcome}"
        return Sample(record.id, record.row, record.outcome, reason, None, cif)
    try:
        readers = {"cif": _from_cif, "extxyz": _from_extxyz, "json": _from_json, "arrays": _from_arrays}
        crystal = readers[record.form](record.content)
    except _Unreadable as failure:
        return Sample(record.id, record.row, failure.outcome, failure.reason, None, cif)
    return Sample(record.id, record.row, "ok", "", crystal, cif)


def _from_arrays(content: Sequence[Any]) -> Crystal:
    lengths, angles, species, coords = (np.asarray(x) for x in content)
    if coords.size != 3 * species.size:
        raise _Unreadable("cell_error", f"{species.size} atoms but {coords.size} coordinates; expected three an atom")
    return _crystal(lengths, angles, species, coords.reshape(-1, 3))


def _from_extxyz(frame: str) -> Crystal:
    import ase.io

    try:
        atoms = ase.io.read(io.StringIO(frame), format="extxyz")
    except Exception as error:  # a stranger's file can break the parser in any way: each is this counted outcome
        raise _Unreadable("extxyz_error", _one_line(error)) from None
    if not atoms.pbc.all():
        raise _Unreadable("cell_error", "the frame is not periodic in three directions; expected a Lattice")
    lengths, angles = atoms.cell.cellpar()[:3], atoms.cell.cellpar()[3:]
    return _crystal(lengths, angles, atoms.numbers, atoms.get_scaled_positions(wrap=False))


def _from_json(item: Any) -> Crystal:
    """From pymatgen's dictionaries as they stand: no class of pymatgen is made, so atoms may coincide."""
    try:
        structure = structure_of(item)
        if structure is None:
            raise _Unreadable("missing", "the row has no structure")
        if not all(structure["lattice"].get("pbc", (True,))):
            raise _Unreadable("cell_error", "the crystal is not periodic in three directions")
        matrix = np.array(structure["lattice"]["matrix"], float)
        if matrix.shape != (3, 3):
            raise ValueError(f"a cell has three vectors of three numbers, found {structure['lattice']['matrix']}")
        sites = structure["sites"]
        species = [[(one["element"], float(one["occu"])) for one in site["species"]] for site in sites]
        coords = np.array([site["abc"] for site in sites], float).reshape(len(sites), 3)
        symbols = [str(site[0][0]) for site in species]
    except _Unreadable:
        raise
    except KeyError as error:
        raise _Unreadable("json_error", f"the structure has no {error.args[0]}") from None
    except Exception as error:  # a stranger's file can break the reading in any way: each is this counted outcome
        raise _Unreadable("json_error", _one_line(error)) from None
    for site in species:
        # As pymatgen's `is_ordered`: one species, and that fully there.
        if len(site) != 1 or abs(site[0][1] - 1) > 1e-8:
            raise _Unreadable("disordered", f"partially occupied: {site}")
    if not np.isfinite(matrix).all():
        raise _Unreadable("not_finite", "a cell vector is not a finite number")
    return _crystal(*_cell(matrix), _atomic_numbers(symbols), coords)


def _cell(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in Å and angles in degrees of a cell's vectors."""
    lengths = np.linalg.norm(matrix, axis=1)
    if not lengths.all():
        raise _Unreadable("cell_error", "a cell vector has length 0")
    a, b, c = matrix / lengths[:, None]
    return lengths, np.degrees(np.arccos(np.clip([b @ c, c @ a, a @ b], -1, 1)))


def _atomic_numbers(symbols: Sequence[str]) -> list[int]:
    for symbol in symbols:
        if symbol not in ATOMIC_NUMBER:
            raise _Unreadable("unknown_element", f"{symbol!r} is no chemical element")
    return [ATOMIC_NUMBER[symbol] for symbol in symbols]


def _from_cif(text: str) -> Crystal:
    from pymatgen.io.cif import CifFile, CifParser, str2float

    try:
        # Only blocks with a cell describe a crystal; a file may open with blocks of remarks.
        block = next(b.data for b in CifFile.from_str(text).data.values() if "_cell_length_a" in b.data)
        if _plain(block):
            lengths = [str2float(block[f"_cell_length_{axis}"]) for axis in "abc"]
            angles = [str2float(block[f"_cell_angle_{angle}"]) for angle in ("alpha", "beta", "gamma")]
            symbols = _symbols(block)
            coords = np.array([[str2float(x) for x in block[f"_atom_site_fract_{axis}"]] for axis in "xyz"]).T
        else:
            structure = CifParser.from_str(text).parse_structures(primitive=False, on_error="raise")[0]
            if not structure.is_ordered:
                raise _Unreadable("disordered", f"{structure.formula} has partially occupied sites")
            lengths, angles, coords = structure.lattice.abc, structure.lattice.angles, structure.frac_coords
            symbols = [site.specie.symbol for site in structure]
    except StopIteration:
        raise _Unreadable("cif_error", "no block with a cell (_cell_length_a)") from None
    except _Unreadable:
        raise
    except KeyError as error:
        raise _Unreadable("cif_error", f"the CIF has no {error.args[0]}") from None
    except Exception as error:  # a stranger's file can break the parser in any way: each is this counted outcome
        raise _Unreadable("cif_error", _one_line(error)) from None
    return _crystal(lengths, angles, _atomic_numbers(symbols), coords)


def crystal_from_cif(text: str) -> Crystal | None:
    """The crystal that a CIF describes; None where a sample with this CIF would be counted as a failure."""
    try:
        return _from_cif(text)
    except _Unreadable:
        return None


def _plain(block: dict[str, Any]) -> bool:
    """Whether the CIF lists every atom of the cell, fully occupied: then it is read as it stands.

    Generative models write such files. pymatgen would merge or refuse atoms that coincide, which is the very failure
    that validity has to see.
    """
    operations = next((block[key] for key in block if key.endswith(("_pos_as_xyz", "_operation_xyz"))), None)
    if operations is None:
        group = block.get("_symmetry_space_group_name_H-M", block.get("_space_group_name_H-M_alt", "P 1"))
        identity = "".join(group.split()) == "P1"
    else:
        operations = [operations] if isinstance(operations, str) else operations
        identity = len(operations) == 1 and "".join(operations[0].split()) == "x,y,z"
    occupancies = block.get("_atom_site_occupancy", [])
    return identity and all(re.fullmatch(r"1(\.0*)?(\(\d+\))?", x) for x in occupancies)


def _symbols(block: dict[str, Any]) -> list[str]:
    """Element symbols, of `Fe`, `Fe3+` or a label like `Fe12`."""
    names = block.get("_atom_site_type_symbol") or block["_atom_site_label"]
    found = [re.match(r"[A-Za-z]+", name) for name in names]
    return [match.group() if match else name for match, name in zip(found, names, strict=True)]


def _crystal(lengths: Any, angles: Any, species: Any, coords: Any) -> Crystal:
    for name, values in (("cell length", lengths), ("cell angle", angles), ("coordinate", coords)):
        if not np.isfinite(np.asarray(values, float)).all():
            raise _Unreadable("not_finite", f"a {name} is not a finite number")
    try:
        return Crystal(lengths, angles, species, coords)
    except UserError as error:
        raise _Unreadable("cell_error", str(error)) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
