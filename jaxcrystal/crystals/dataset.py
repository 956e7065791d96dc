"""The stored data set: one parquet file a part, readable by anyone, loaded as arrays.

A row is a crystal in natural units (Å, degrees, fractions) with the labels that are known of it; what is not known is
null, never 0. Every number stands on the grid of `crystals.crystal`, where a float64 holds it exactly: what was
stored is what is loaded, bit for bit. `jaxcrystal prepare` writes these files (`crystals.prepare`); reading them
needs no pymatgen, so a bare accelerator host does.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal import box
from jaxcrystal.crystals import packed
from jaxcrystal.crystals.crystal import CELL_BITS, COORD_BITS, ELEMENTS, Crystal, CrystalBatch
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.crystals.wyckoff import LETTERS
from jaxcrystal.errors import UserError
from jaxcrystal.paths import local

if TYPE_CHECKING:
    from jaxcrystal.crystals.symmetry import Symmetrized

#: What is known of a crystal beside its structure, under the names of `config.ATTRIBUTES`; all may be null.
LABELS = pa.schema(
    [
        ("pretty_formula", pa.string()),
        ("elements", pa.list_(pa.string())),  # symbols, sorted
        ("spacegroup.number", pa.int32()),
        ("formation_energy_per_atom", pa.float64()),  # eV/atom
        ("band_gap", pa.float64()),  # eV
        ("e_above_hull", pa.float64()),  # eV/atom
    ]
)

#: A stored crystal.
SCHEMA = pa.schema(
    [
        ("material_id", pa.string()),
        ("lengths", pa.list_(pa.float64(), 3)),  # a, b, c in Å
        ("angles", pa.list_(pa.float64(), 3)),  # α, β, γ in degrees
        ("species", pa.list_(pa.int32())),  # atomic numbers
        ("frac_coords", pa.list_(pa.float64())),  # x, y, z of the first atom, of the second, ...
        *LABELS,
    ]
)

#: The same crystal by its symmetry (`crystals.symmetric_batch`), made exactly symmetric; null where none was found.
SYMMETRY = pa.schema(
    [
        ("symmetry.space_group", pa.int32()),  # that was found, whatever the label states
        ("symmetry.cell", pa.list_(pa.float64())),  # a, b, c in Å, α, β, γ in degrees, of the conventional cell
        ("symmetry.species", pa.list_(pa.int32())),  # atomic number of each orbit
        ("symmetry.letters", pa.list_(pa.string())),  # of each description, its orbits' letters; the canonical first
        ("symmetry.frac_coords", pa.list_(pa.float64())),  # of description, orbit and axis, in this order
        ("symmetry.masked", pa.int32()),  # how many descriptions, the last, hide an element: one for each, in order
        ("symmetry.symprec", pa.float64()),  # Å, the tolerance at which the group was found
        ("symmetry.moved", pa.float64()),  # Å, by which the atom that moved most was moved
    ]
)

#: The column of these that came last: data that were prepared before lack it, and can be written, but not infilled.
MASKED = "symmetry.masked"

#: What a label of one's own may be.
OWN_TYPES = (pa.float64(), pa.string())

#: The key of the file's metadata under which `store` notes where the rows came from, as JSON.
PROVENANCE = b"jaxcrystal"

#: The name that stands for the embedded data set; with `:train` or `:validation` for one side of its split.
PROTOTYPES = "prototypes"


@dataclass(frozen=True)
class CrystalSet:
    """Crystals as arrays, in memory, with what is known of them."""

    ids: tuple[str, ...]
    batch: CrystalBatch  #: numpy arrays of all crystals, `[len(self), ...]`, padded to the largest
    labels: pa.Table  #: columns of `LABELS`, and of one's own; one row a crystal, null where not known
    #: All crystals by their symmetry. Raises UserError where a file does not hold it, or a crystal has none.
    symmetric: Callable[[], SymmetricBatch] = field(default=lambda: _unknown(), compare=False)
    canonical: bool = False  #: whether that has the canonical description of each alone

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> CrystalSet:
        """The first so many of them, or all if they are fewer."""
        few = slice(0, count)
        labels, symmetric = self.labels.slice(0, count), self.symmetric
        return CrystalSet(self.ids[few], self.batch[few], labels, lambda: symmetric()[few], self.canonical)

    def crystal(self, index: int) -> Crystal:
        """The structure of one row."""
        return self.batch.crystal(index)

    def attributes(self, index: int) -> dict[str, Any]:
        """What is known of one row: `config.ATTRIBUTES` in their order, then one's own; str, list[str], int or float by
        name."""
        values = {name: self.labels[name][index].as_py() for name in self.labels.column_names}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_crystals(
        cls, ids: Sequence[str], crystals: Sequence[Crystal], attributes: Sequence[Mapping[str, Any]]
    ) -> CrystalSet:
        """From crystals one by one; `attributes[i]` holds what is known of `crystals[i]`."""
        if not len(ids) == len(crystals) == len(attributes):
            raise UserError(f"{len(crystals)} crystals with {len(ids)} ids and {len(attributes)} sets of attributes")
        own = {name: value for known in attributes for name, value in known.items() if name not in LABELS.names}
        types = [(name, pa.string() if isinstance(value, str) else pa.float64()) for name, value in own.items()]
        schema = pa.schema([*LABELS, *map(pa.field, *zip(*types, strict=True))] if types else LABELS)
        labels = pa.Table.from_pylist([dict(known) for known in attributes], schema=schema)
        looking = partial(SymmetricBatch.found, crystals, ids)
        return cls(tuple(ids), CrystalBatch.from_crystals(crystals), labels, looking)


def _unknown() -> SymmetricBatch:
    raise UserError("nobody has looked for the symmetry of these crystals")


def store(
    crystals: CrystalSet,
    path: Path,
    provenance: Mapping[str, Any],
    symmetries: Sequence[Symmetrized | None] | None = None,
) -> None:
    """Writes a data set, whole or not at all, with the symmetry of each crystal where it was looked for.

    Raises UserError if `path` cannot be written.
    """
    batch = crystals.batch
    counts = np.asarray(batch.num_atoms, np.int64)
    present = np.arange(batch.species.shape[1]) < counts[:, None]
    coords = batch.frac_coords[present].astype(np.float64).reshape(-1) / 2**COORD_BITS

    def triples(grid: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays((grid.astype(np.float64) / 2**CELL_BITS).reshape(-1), 3)

    def ragged(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, values)

    columns = [
        pa.array(crystals.ids, pa.string()),
        triples(batch.lengths),
        triples(batch.angles),
        ragged(batch.species[present].astype(np.int32), counts),
        ragged(coords, 3 * counts),
        *(crystals.labels[name] for name in LABELS.names),
    ]
    schema = SCHEMA
    if symmetries is not None:
        schema = pa.schema([*schema, *SYMMETRY])
        found = pa.Table.from_pylist([_row(one) for one in symmetries], schema=SYMMETRY)
        columns += [found[name] for name in SYMMETRY.names]
    own = [field for field in crystals.labels.schema if field.name not in LABELS.names]
    schema, columns = pa.schema([*schema, *own]), [*columns, *(crystals.labels[field.name] for field in own)]
    schema = schema.with_metadata({PROVENANCE: json.dumps(provenance)})
    with written_whole(path) as unfinished, unfinished.open("wb") as file:  # pyarrow takes no path that is not UTF-8
        pq.write_table(pa.table(columns, schema=schema), file)


def load(path: str | Path) -> CrystalSet:
    """The data set that `jaxcrystal prepare` wrote to `path`, or one of the package's by its name.

    These are `box.CRYSTALS`, and `prototypes`, with its two sides `prototypes:train` and `prototypes:validation`, split
    by formula. Raises UserError that names the file, and the row where there is one, if the file is missing, was not
    prepared, or holds what is no crystal.
    """
    name, _, side = str(path).partition(":")
    if name == PROTOTYPES:
        return _prototypes(side)
    if (file := box.crystals(path)) is not None:
        return _boxed(file)
    try:
        with local(path).open("rb") as file:
            table = pq.ParquetFile(file).read()  # one file: read_table would merge whatever a folder holds
    except OSError as error:
        raise UserError(f"cannot read the data set {path}: {error.strerror or error}") from None
    except pa.ArrowInvalid:
        raise UserError(f"{path} is no parquet file; {_remedy(path)}") from None
    for column in SCHEMA:
        if column.name not in table.column_names:
            raise UserError(f"{path} has no column {column.name!r}: it is no prepared data set; {_remedy(path)}")
        found = table.schema.field(column.name).type
        if found != column.type:
            raise UserError(f"{path}: column {column.name!r} holds {found}, expected {column.type}; {_remedy(path)}")
    looking = partial(_symmetric, table, path)
    ours = {*SCHEMA.names, *SYMMETRY.names}
    own = [field.name for field in table.schema if field.name not in ours and field.type in OWN_TYPES]
    table = table.select([*SCHEMA.names, *own]).combine_chunks()
    labels = table.select([*LABELS.names, *own])
    return CrystalSet(tuple(table["material_id"].to_pylist()), _batch(table, path), labels, looking)


def _row(found: Symmetrized | None) -> dict[str, Any]:
    """Of the columns of `SYMMETRY`; every number on the grid."""
    if found is None:
        return dict.fromkeys(SYMMETRY.names)
    batch = SymmetricBatch.of([found.descriptions], [found.masked])
    values = (
        int(batch.space_group[0]),
        (batch.cell[0] / 2**CELL_BITS).tolist(),
        batch.species[0].tolist(),
        ["".join(LETTERS[i] for i in letters) for letters in batch.letters[0]],
        (batch.frac_coords[0].reshape(-1) / 2**COORD_BITS).tolist(),
        len(found.masked),
        found.symprec,
        found.moved,
    )
    return dict(zip(SYMMETRY.names, values, strict=True))


def _symmetric(table: pa.Table, path: str | Path) -> SymmetricBatch:
    """The crystals of a table by their symmetry."""
    if not set(SYMMETRY.names) - {MASKED} <= set(table.column_names):
        raise UserError(f"{path} was prepared without symmetry, before there was any; prepare it again")
    hiding = table[MASKED].to_pylist() if MASKED in table.column_names else [0] * len(table)
    rows = table.select(SYMMETRY.names[:5]).to_pylist()
    names = [name.partition(".")[2] for name in SYMMETRY.names]
    crystals = []
    for number, row in enumerate(rows):
        group, cell, species, letters, coords = row.values()
        where = f"{path}, row {number} ({table['material_id'][number]})"
        if group is None:
            raise UserError(f"{where}: no space group was found at any tolerance; leave this row out")
        try:
            shaped = np.reshape(np.array(coords, np.float64), (len(letters), len(species), 3))
            last = hiding[number] or 0
            if last and (last != len(set(species)) or last >= len(letters)):
                raise ValueError
            crystals.append((group, cell, species, letters, shaped, last))
        except (TypeError, ValueError):
            raise UserError(f"{where}: {', '.join(names[2:6])} disagree; prepare it again") from None
    return SymmetricBatch.read(crystals)


def _remedy(path: str | Path) -> str:
    return f"run `jaxcrystal prepare {path} --out DIR` and read what it writes to DIR"


def _batch(table: pa.Table, path: str | Path) -> CrystalBatch:
    """The structures of a table of `SCHEMA`, checked as `Crystal` checks one, but all at once."""

    def check(good: np.ndarray, what: str) -> None:
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise UserError(f"{path}, row {row} ({table['material_id'][row]}): {what}; {_remedy(path)}")

    for column in ("material_id", "lengths", "angles", "species", "frac_coords"):
        check(table[column].is_valid().to_numpy(), f"{column} is null")
    n = len(table)
    lengths = table["lengths"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(n, 3)
    angles = table["angles"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(n, 3)
    counts = np.diff(_offsets(table["species"]))
    species = table["species"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    coords = table["frac_coords"].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    row = np.repeat(np.arange(n), counts)
    check(counts > 0, "it has no atoms")
    check(np.diff(_offsets(table["frac_coords"])) == 3 * counts, "there must be three coordinates an atom")
    check(((lengths > 0) & (lengths < 256)).all(1), "lengths must lie between 0 and 256 Å")
    check(((angles > 0) & (angles < 180)).all(1), "angles must lie between 0 and 180 degrees")
    ca, cb, cg = np.cos(np.radians(angles)).T
    check(1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg > 0, "its angles close no cell")
    known, finite = np.ones(n, bool), np.ones(n, bool)
    np.logical_and.at(known, row, (species > 0) & (species < len(ELEMENTS)))
    np.logical_and.at(finite, row, np.isfinite(coords).reshape(-1, 3).all(1))
    check(known, f"atomic numbers run from 1 to {len(ELEMENTS) - 1}")
    check(finite, "a coordinate is not a finite number")

    max_atoms = int(counts.max(initial=0))
    padded_species = np.zeros((n, max_atoms), np.int32)
    padded_coords = np.zeros((n, max_atoms, 3), np.uint32)
    present = np.arange(max_atoms) < counts[:, None]
    padded_species[present] = species
    on_grid = np.round((coords % 1.0) * 2**COORD_BITS) % 2**COORD_BITS
    padded_coords[present] = on_grid.astype(np.uint32).reshape(-1, 3)
    return CrystalBatch(
        lengths=np.round(lengths * 2**CELL_BITS).astype(np.uint32),
        angles=np.floor(angles * 2**CELL_BITS).astype(np.uint32),
        species=padded_species,
        frac_coords=padded_coords,
        num_atoms=counts.astype(np.int32),
    )


def _offsets(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().offsets.to_numpy()


@cache
def _boxed(file: Path) -> CrystalSet:
    """A file of the package's, with one description of each crystal; it does not change while a program runs."""
    rows = packed.read(file)
    crystals = [packed.unpacked(row) for row in rows]
    labels = pa.Table.from_pylist([row | {"elements": packed.elements(row)} for row in rows], schema=LABELS)
    ids = tuple(row["material_id"] for row in rows)
    batch = CrystalBatch.from_crystals([one.to_crystal(niggli=True) for one in crystals])
    return CrystalSet(ids, batch, labels, lambda: SymmetricBatch.of([[one] for one in crystals]), canonical=True)


def is_validation(formula: str) -> bool:
    """Whether a formula of the embedded set belongs to validation: about 1 in 20, by its checksum, everywhere alike."""
    return zlib.crc32(formula.encode()) % 20 == 0


def _prototypes(side: str) -> CrystalSet:
    if side not in ("", "train", "validation"):
        raise UserError(f"{PROTOTYPES}:{side} does not exist; write {PROTOTYPES}:train or {PROTOTYPES}:validation")
    from jaxcrystal.crystals.prototypes import embedded

    chosen = [e for e in embedded() if not side or is_validation(e.formula) == (side == "validation")]
    return CrystalSet.from_crystals(
        [f"{e.prototype}/{e.formula}" for e in chosen],
        [e.crystal for e in chosen],
        [
            {
                "pretty_formula": e.formula,
                "elements": sorted(set(e.crystal.symbols)),
                "spacegroup.number": e.spacegroup,
            }
            for e in chosen
        ],
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when all went well: a reader never meets half a file.

    Raises UserError if the place cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place with --out") from None
