"""Files, folders and objects as records: the description of one structure each, not yet interpreted.

    samples.csv, .parquet        a row a record: CIF text, a structure in any form, or the arrays that `prepare` writes
    samples.json, .jsonl         pymatgen's, ASE's, OPTIMADE's and others' shapes (`json_documents.py`)
    crystal.cif, POSCAR, a.vasp  one, or, of a CIF, one a block
    frames.extxyz                one a frame
    a folder                     its CIF and POSCAR files; all else that it holds is counted and named
    a list, a DataFrame          of pymatgen's Structures, ASE's Atoms, Crystals
    mp20, mp20-val, mp20-test    the package's own (`box`)
    prototypes                   the embedded set; `prototypes:train` and `prototypes:validation` are its two sides

Files may be packed (.gz, .bz2, .xz). What a record means is decided in `reading.py`.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import hashlib
import io
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal import box
from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.dataset import PROTOTYPES, load
from jaxcrystal.errors import UserError, printable
from jaxcrystal.locks import is_lock
from jaxcrystal.reader.cif import blocks
from jaxcrystal.reader.json_documents import IDS, items, names_a_crystal
from jaxcrystal.reader.rows import Outcome, Rows
from jaxcrystal.reader.structures import PREPARED

#: What is read, in words.
KINDS = (
    "a .csv, .parquet, .json, .cif, POSCAR or .extxyz file, a folder of CIFs or POSCARs, or a name of the package's "
    f"data: {', '.join(box.CRYSTALS)}, {PROTOTYPES}"
)

#: Columns that only our sampler's ledger has together.
LEDGER = frozenset(("index", "draw", "seed", "prompt", "conditions", "text", "status", "tokens"))
RANK = "rank"  #: a column of predictions: which of one crystal's is the first
WISHES = ("asked", "forced")  #: of a ledger: what was asked of each attempt, and what the grammar saw to, as JSON
SAID = ("log_probability", "tokens")  #: of a ledger: how probable the model found what it wrote, and how long that is
#: Columns that only the attempts of `templates` have together.
SUBSTITUTIONS = frozenset(("index", "seed", "template", "swaps", "status", "cif"))
_OPTIMADE = ("lattice_vectors", "cartesian_site_positions", "species_at_sites")
_OPTIMADE_BESIDE = ("species", "dimension_types", "nperiodic_dimensions", "structure_features", "nsites")
_EXPECTED = "a column `cif` or `structure`, OPTIMADE's columns, or those that `jaxcrystal prepare` writes"
_PACKED = (".gz", ".bz2", ".xz")
_PICKLES = re.compile(r"\.(pkl|pickle)(\.\w+)?$", re.IGNORECASE)
#: Columns of energies that matbench-discovery's summaries have, of crystals that lie in other files.
_SUMMARY = frozenset(("e_form_per_atom_mp2020_corrected", "e_above_hull_mp2020_corrected_ppd_mp"))
#: How text says that a field holds nothing.
_EMPTY = frozenset(("", "nan", "none", "null", "<na>"))


@dataclass(frozen=True)
class Record:
    """The description of one structure, as it stands in its source."""

    id: str
    row: int  #: in the source, from 0
    form: Literal["cif", "poscar", "extxyz", "structure", "object", "none"]
    content: Any  #: text; of `structure` a dictionary or text; of `object` what Python holds
    block: str | None = None  #: of a CIF that holds several
    labels: Mapping[str, Any] = field(default_factory=dict)  #: by name of `config.ATTRIBUTES`, as the source has them
    notes: tuple[str, ...] = ()
    outcome: str = Outcome.OK  #: of a record that holds no structure: why, and
    reason: str = ""  #: in words


@dataclass(frozen=True)
class Source:
    """Everything that one place holds."""

    path: Path
    sha256: str | None  #: None of what is in memory
    records: tuple[Record, ...]
    has_ids: bool  #: whether the source names its rows, or they are numbered
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: what a folder holds beside, by kind
    ignored_columns: tuple[str, ...] = ()


def open_source(origin: Any) -> Source:
    """The records of a file, folder, table or list; at least one.

    Raises UserError that names the place and what was expected, if it does not exist, is empty, is of no known kind,
    or is broken as a whole.
    """
    if isinstance(origin, Rows):
        return _read_before(origin)
    if not isinstance(origin, str | Path) or "\n" in str(origin):  # the text of a CIF is no path
        return _in_memory(origin)
    try:
        return _place(origin)
    except ValueError as error:  # a null byte
        raise UserError(f"{str(origin)!r} is no path: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {origin}: {error.strerror or error}") from None


def _place(origin: str | Path) -> Source:
    if str(origin).partition(":")[0] == PROTOTYPES and not Path(origin).exists():
        return _embedded(str(origin), None)
    if (file := box.crystals(origin)) is not None:
        return _embedded(str(origin), hashlib.sha256(file.read_bytes()).hexdigest())
    path = Path(origin)
    if (path / "attempts.parquet").is_file():  # a ledger as a folder: the CIF files alone would hide what failed
        path = path / "attempts.parquet"
    try:
        source = _folder(path) if path.is_dir() else _file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give {KINDS}") from None
    if not source.records:
        others = f"; it holds {named(source.unread)}, which are not read" if source.unread else ""
        raise UserError(f"{path} holds no crystals{others}; give {KINDS}")
    return source


def named(unread: Mapping[str, Sequence[str]]) -> str:
    """What a folder holds and we do not read, counted, with the first names."""
    parts = []
    for kind, names in unread.items():
        first = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        parts.append(f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({first})")
    return ", ".join(parts)


def _kind(name: str) -> str | None:
    """What a file of that name is, packed or not."""
    name = _unpacked_name(name).lower()
    if name.startswith("."):  # what systems and editors leave beside a file
        return None
    if Path(name).suffix in (".swp", ".tar", ".zip", ".bak", ".orig") or name.endswith("~"):
        return None
    if re.fullmatch(r"(.*[._-])?(poscar|contcar)([._-].*)?", name):
        return "poscar"
    kinds = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet", ".json": "json", ".jsonl": "jsonl"}
    kinds |= {".ndjson": "jsonl", ".cif": "cif", ".vasp": "poscar", ".extxyz": "extxyz", ".xyz": "extxyz"}
    return kinds.get(Path(name).suffix)


def _unpacked_name(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in _PACKED else name


def stem(name: str) -> str:
    """A file's name without its endings, packed or not, fit to be written."""
    return printable(Path(_unpacked_name(name)).stem)


def unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    for magic, unpack in ((b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress), (b"\xfd7zXZ", lzma.decompress)):
        if raw.startswith(magic):
            try:
                return unpack(raw)
            except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
                raise UserError(f"{path} cannot be unpacked: {error}") from None
    return raw


def decoded(raw: bytes) -> str:
    """Text in UTF-8 or, with their marks, UTF-16; else each byte as latin-1 has it, for authors' names in old files."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def is_json(path: Path) -> bool:
    """By its name, packed or not."""
    return _kind(path.name) in ("json", "jsonl")


def json_items(path: Path) -> list[tuple[str | None, Any]]:
    """(id, item) of everything in a JSON file, structure or not; `json_documents.py` says how it is taken apart."""
    return items(path, decoded(unpacked(path)), by_line=_kind(path.name) == "jsonl")


def _file(path: Path) -> Source:
    kind = _kind(path.name)
    if _PICKLES.search(path.name) and path.exists():
        raise UserError(f"{path} is a pickle, and reading one runs whatever code is in it: give its crystals as JSON")
    if kind is None and path.exists():
        raise UserError(f"{path}: the kind of file {path.suffix or 'without ending'!r} is not known; give {KINDS}")
    raw = unpacked(path)
    if not raw.strip():
        raise UserError(f"{path} is empty; give {KINDS}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if kind in ("csv", "parquet"):
        header, rows, index = _csv(path, raw) if kind == "csv" else _parquet(path, raw)
        records, has_ids, ignored = _table(path, header, rows, index)
        return Source(path, digest, tuple(records), has_ids, ignored_columns=ignored)
    if kind in ("json", "jsonl"):
        found = json_items(path)
        records = [_json_record(row, name, item) for row, (name, item) in enumerate(found)]
        return Source(path, digest, tuple(records), has_ids=any(name is not None for name, _ in found))
    if kind == "extxyz":
        records = _frames(path, decoded(raw))
        return Source(path, digest, tuple(records), has_ids=any(r.id != str(r.row) for r in records))
    records = _of_structure_file(stem(path.name), kind, decoded(raw), 0)
    return Source(path, digest, tuple(records), has_ids=len(records) > 1)


def _of_structure_file(name: str, kind: str, text: str, row: int) -> list[Record]:
    """The structures of a CIF or POSCAR file."""
    if kind == "poscar":
        return [Record(name, row, "poscar", text)]
    found = blocks(text)
    if found == [None]:
        return [Record(name, row, "cif", text)]
    return [Record(f"{name}#{block}", row + i, "cif", text, block) for i, block in enumerate(found)]


def _folder(folder: Path) -> Source:
    records: list[Record] = []
    unread: dict[str, list[str]] = defaultdict(list)
    digest = hashlib.sha256()
    files = sorted(path for path in folder.iterdir() if not is_lock(path))
    stems = Counter(stem(path.name) for path in files if _kind(path.name) in ("cif", "poscar"))
    for path in files:
        kind = _kind(path.name)
        if path.is_dir():
            unread["folder"].append(printable(path.name))
        elif kind not in ("cif", "poscar"):
            unread[f"{printable(path.suffix) or 'other'} file"].append(printable(path.name))
        else:
            name = stem(path.name) if stems[stem(path.name)] == 1 else printable(path.name)
            try:
                text = decoded(unpacked(path))
                digest.update(path.name.encode(errors="surrogateescape") + path.read_bytes())
                records += _of_structure_file(name, kind, text, len(records))
            except (OSError, UserError) as error:
                reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
                records.append(Record(name, len(records), "none", "", outcome=Outcome.MISSING, reason=reason))
    unread = {kind: tuple(names) for kind, names in unread.items() if names}
    return Source(folder, digest.hexdigest(), tuple(records), has_ids=True, unread=unread)


def _csv(path: Path, raw: bytes) -> tuple[list[str], list[list[Any] | str], list[str]]:
    rows: list[list[Any] | str] = []
    text = decoded(raw)
    first, _, rest = text.partition("\n")
    if named_separator := re.fullmatch(r"sep=(.)\s*", first):  # as Excel has it
        text, first = rest, rest.partition("\n")[0]
    separator = named_separator[1] if named_separator else next((s for s in ",;\t" if s in first), ",")
    limit = csv.field_size_limit(2**30)  # a CIF of a large cell is longer than the module's default
    try:
        # Strict: else a file that was cut off inside a field passes for whole.
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        header = next(lines, [])
        for fields in filter(None, lines):
            extra = fields[len(header) :]
            if len(fields) < len(header) or any(extra):
                rows.append(f"the row has {len(fields)} fields, the header {len(header)}")
            else:
                values = [value if value.strip() else None for value in fields[: len(header)]]
                rows.append([*values, bool(extra)])
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as CSV after {len(rows)} rows: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return header, rows, []


def _parquet(path: Path, raw: bytes) -> tuple[list[str], list[list[Any]], list[str]]:
    try:
        table = pq.ParquetFile(io.BytesIO(raw)).read()
        columns = [table.column(i).to_pylist() for i in range(table.num_columns)]
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"cannot read {path} as a table: {' '.join(str(error).split())}") from None
    stored = (table.schema.pandas_metadata or {}).get("index_columns", [])
    index = [name for name in stored if isinstance(name, str)]
    return table.column_names, [[*row, False] for row in zip(*columns, strict=True)], index


def _table(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[Any] | str], index: Sequence[str]
) -> tuple[list[Record], bool, tuple[str, ...]]:
    """The records of a table, whether it names its rows, and which columns are not read.

    A row is its values in the header's order with, last, whether empty fields were dropped behind them; or a problem.
    """
    plain = [str(name).strip() for name in header]
    twice = [name for name, n in Counter(name.lower() for name in plain if name).items() if n > 1]
    if twice:
        count = [name.lower() for name in plain].count(twice[0])
        raise UserError(f"{path} has {count} columns {twice[0]!r}; rename or remove all but one")
    content, form = _content_columns(path, plain)
    ledger = LEDGER <= set(plain) or SUBSTITUTIONS <= set(plain)
    by_name = {name.lower(): name for name in plain}
    ids = list(index) if len(index) > 1 else [by_name[n] for n in IDS if n in by_name][:1]
    if ledger and IDS[0] not in plain:  # predictions have the ids of what they predict
        ids = ["index"]
    if not ids:
        ids = list(index) or [name for name in plain[:1] if name in ("", "Unnamed: 0")]
    labels = (*ATTRIBUTES, RANK, *((*WISHES, *SAID) if ledger else ()))
    records = []
    for number, row in enumerate(rows):
        if isinstance(row, str):
            records.append(Record(str(number), number, "none", "", outcome=Outcome.MALFORMED_ROW, reason=row))
            continue
        values = dict(zip(plain, row, strict=False))
        name = "/".join(map(_as_id, (values[part] for part in ids))) if ids else ""
        stated = {label: values[label] for label in labels if str(values.get(label)).strip().lower() not in _EMPTY}
        notes = ("empty fields behind the last column were dropped",) if row[-1] else ()
        record = {"id": name or str(number), "row": number, "labels": stated, "notes": notes}
        status = values["status"] if ledger else None
        records.append(_of_row(record, form, [values[name] for name in content], content, status))
    numbered = all(record.id == str(record.row) for record in records)
    used = {*content, *labels, *ids, *(plain if ledger else ())}
    return records, not numbered or any(ids), tuple(n for n in plain if n and n not in used)


def _as_id(value: Any) -> str:
    """A value of a column of ids as text; empty where it is missing."""
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, float) and value.is_integer():  # a column of integers of which some are missing
        return str(int(value))
    return "" if _is_missing(value) else str(value)


def _is_missing(value: Any) -> bool:
    """None, NaN, and what pandas has for them."""
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _content_columns(path: Path, header: Sequence[str]) -> tuple[list[str], str]:
    """Which columns hold the crystals, and in which form."""
    by_name = {name.lower(): name for name in header}
    if "cif" in by_name:
        return [by_name["cif"]], "cif"
    if set(PREPARED) <= set(header):
        return list(PREPARED), "structure"
    if "structure" in by_name:
        return [by_name["structure"]], "structure"
    if set(_OPTIMADE) <= set(header):
        return [*_OPTIMADE, *(name for name in _OPTIMADE_BESIDE if name in header)], "structure"
    found = [name for name in header if names_a_crystal(name)]
    if not found and _SUMMARY & set(header):
        raise UserError(
            f"{path} has energies and no crystals: those of matbench-discovery are in its files of initial structures "
            "and computed entries; a summary is what `prepare --labels` and `hull build` take"
        )
    if len(found) == 1:
        return found, "structure"
    several = f"several columns that may hold the crystals ({', '.join(found)})" if found else "no column of crystals"
    columns = " ".join(", ".join(header).split())[:200]
    raise UserError(f"{path} has {several}; its columns are {columns}; expected {_EXPECTED}: name the one so")


def _of_row(record: dict[str, Any], form: str, values: list[Any], names: list[str], status: str | None) -> Record:
    value = values[0] if len(names) == 1 else {name: v for name, v in zip(names, values, strict=True) if v is not None}
    if isinstance(value, bytes):
        value = decoded(value)
    if isinstance(value, str) and re.match(r"b['\"]", value):  # bytes that went through a CSV
        with suppress(ValueError, SyntaxError):
            value = decoded(ast.literal_eval(value))
    empty = _is_missing(value) or (isinstance(value, str | dict) and not value)
    empty = empty or (isinstance(value, str) and value.strip().lower() in _EMPTY)
    if status is not None and status != Outcome.OK:
        reason = f"the sampler reported {status}"
        return Record(**record, form="none", content="" if empty else value, outcome=str(status), reason=reason)
    if empty:
        reason = "the row has no CIF" if form == "cif" else "the row has no structure"
        return Record(**record, form="none", content="", outcome=Outcome.MISSING, reason=reason)
    if not isinstance(value, str if form == "cif" else str | Mapping):
        form = "object"  # of a table in memory
    return Record(**record, form=form, content=value)


def _json_record(row: int, name: str | None, item: Any) -> Record:
    labels = item if isinstance(item, Mapping) else {}
    stated = {label: labels[label] for label in ATTRIBUTES if labels.get(label) is not None}
    return Record(str(row) if name is None else name, row, "structure", item, labels=stated)


def _frames(path: Path, text: str) -> list[Record]:
    """Frames of an extxyz file, cut apart by their numbers of atoms, so that a broken one costs only itself."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    records: list[Record] = []
    at = 0
    while at < len(lines):
        count = lines[at].strip()
        if not count:
            at += 1
            continue
        row = len(records)
        if not count.isdecimal():
            problem = f"line {at + 1}: expected a frame's number of atoms, found {count[:40]!r}"
            if not records:
                raise UserError(f"{path}, {problem}")
            reason = f"{problem}; all that follows is unread"
            records.append(Record(str(row), row, "none", "", outcome=Outcome.MALFORMED_ROW, reason=reason))
            break
        end = at + 2 + int(count)
        comment = lines[at + 1] if at + 1 < len(lines) else ""
        stated = dict(re.findall(rf"(?:^|\s)({'|'.join(IDS)})\s*=\s*(\"[^\"]*\"|'[^']*'|\S+)", comment))
        name = next((stated[name].strip("\"'") for name in IDS if name in stated), str(row))
        records.append(Record(name, row, "extxyz", "\n".join(lines[at:end]) + "\n"))
        at = end
    return records


def _read_before(rows: Rows) -> Source:
    records = [
        Record(row.id, row.row, "none", row.cif, None, row.labels, row.notes, row.outcome, row.reason)
        if row.crystal is None
        else Record(row.id, row.row, "object", row.crystal, None, row.labels, row.notes)
        for row in rows.rows
    ]
    return Source(rows.path, rows.sha256, tuple(records), rows.has_ids, rows.unread, rows.ignored_columns)


def _embedded(origin: str, sha256: str | None) -> Source:
    """A set of the package."""
    crystals = load(origin)
    records = [
        Record(name, i, "object", crystals.crystal(i), labels=crystals.attributes(i))
        for i, name in enumerate(crystals.ids)
    ]
    return Source(Path(origin), sha256, tuple(records), has_ids=True)


def _in_memory(origin: Any) -> Source:
    """A table of pandas, or structures one by one."""
    if hasattr(origin, "columns") and hasattr(origin, "index"):
        names = [f"index {i}" if name is None else str(name) for i, name in enumerate(origin.index.names)]
        plain = names == ["index 0"] and list(origin.index) == list(range(len(origin)))
        new = [i for i, name in enumerate(names) if not plain and name not in map(str, origin.columns)]
        levels = [origin.index.get_level_values(i) for i in new]
        rows = [
            [*(level[i] for level in levels), *row, False]
            for i, row in enumerate(origin.itertuples(index=False, name=None))
        ]
        header = [*(names[i] for i in new), *map(str, origin.columns)]
        records, has_ids, ignored = _table(Path("table"), header, rows, [] if plain else names)
        source = Source(Path("table"), None, tuple(records), has_ids, ignored_columns=ignored)
    else:
        one = isinstance(origin, str | Mapping) or not isinstance(origin, Iterable) or hasattr(origin, "lattice")
        one = one or hasattr(origin, "get_scaled_positions") or hasattr(origin, "frac_coords")
        records = [Record(str(i), i, "object", item) for i, item in enumerate([origin] if one else origin)]
        source = Source(Path("structures"), None, tuple(records), has_ids=False)
    if not source.records:
        raise UserError("there are no crystals: the list or table is empty")
    return source
