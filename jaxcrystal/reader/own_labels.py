"""Labels of one's own: a table beside the crystals, joined to them by id, whose columns prompts may state.

material_id,bulk_modulus,method
NaCl,24.3,by hand
MgO,160.1,sintered

A column is numbers where every cell that is not empty is one, and text otherwise. A column that is called as one of
`config.ATTRIBUTES`, or as matbench-discovery's summary of the WBM crystals calls it, takes the place of what the
crystals' own source says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.dataset import SCHEMA, SYMMETRY
from jaxcrystal.errors import UserError
from jaxcrystal.reader.json_documents import IDS
from jaxcrystal.reader.sources import Source

#: Columns that hold the crystals themselves.
_STRUCTURE = ("cif", "structure")

#: What matbench-discovery's `wbm-summary.csv` calls the labels that prompts state: the ones that it takes for true.
MATBENCH = {
    "e_form_per_atom_mp2020_corrected": "formation_energy_per_atom",
    "e_above_hull_mp2020_corrected_ppd_mp": "e_above_hull",
    "bandgap_pbe": "band_gap",
}


@dataclass(frozen=True)
class OwnLabels:
    """What a table says of crystals."""

    path: Path
    of: Mapping[str, Mapping[str, Any]]  #: by id: float or str by column; what is not known is not there
    columns: Mapping[str, int]  #: of one's own: how many of its cells are not empty

    @classmethod
    def read(cls, path: str | Path) -> OwnLabels:
        """Of a CSV or parquet file. Raises UserError if it cannot be read, has no column of ids or no other, or an id
        is there twice."""
        path = Path(path)
        table = _table(path)
        by_name = {str(name).strip().lower(): name for name in table.columns}
        ids = next((by_name[name] for name in IDS if name in by_name), None)
        if ids is None:
            raise UserError(f"{path} has no column of ids that crystals are joined by; call it {IDS[0]}")
        names = [_as_id(value) for value in table[ids]]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{path} has the id {twice[0]!r} twice; keep one row of it")
        table = table.rename(columns={old: new for old, new in MATBENCH.items() if new not in table})
        taken = {*SCHEMA.names, *SYMMETRY.names} - {*ATTRIBUTES}
        kept = [name for name in table.columns if name != ids and str(name).lower() not in _STRUCTURE]
        if wrong := [name for name in kept if str(name) in taken]:
            raise UserError(f"{path} has a column {wrong[0]!r}, as data sets have for the crystals; rename it")
        if not kept:
            raise UserError(f"{path} has no column but {ids}: there is nothing to keep")
        found: dict[str, dict[str, Any]] = {name: {} for name in names}
        for column in kept:
            for name, value in zip(names, _typed(table[column]), strict=True):
                if value is not None:
                    found[name][str(column).strip()] = value
        own = [str(name).strip() for name in kept if str(name).strip() not in ATTRIBUTES]
        return cls(path, found, {name: sum(name in row for row in found.values()) for name in own})

    def joined(self, source: Source) -> Source:
        """A source with these labels. Raises UserError if it has no ids, or none that the table has."""
        if not source.has_ids:
            raise UserError(f"{source.path} does not name its crystals, so that {self.path} says nothing of them")
        if not any(record.id in self.of for record in source.records):
            first, theirs = source.records[0].id, next(iter(self.of), "none")
            raise UserError(f"{self.path} has no id of {source.path}: {first!r} is one there, {theirs!r} here")
        records = [replace(record, labels={**record.labels, **self.of.get(record.id, {})}) for record in source.records]
        return replace(source, records=tuple(records))


def _table(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read the labels {path}: {getattr(error, 'strerror', None) or error}") from None


def _as_id(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _typed(column: Sequence[Any]) -> list[float | str | None]:
    """Numbers, or else text; None where nothing is known."""
    missing = [pd.api.types.is_scalar(value) and pd.isna(value) for value in column]
    cells = [
        None if nothing or str(value).strip().lower() in ("", "nan") else value
        for value, nothing in zip(column, missing, strict=True)
    ]
    try:
        numbers = [None if cell is None else float(cell) for cell in cells]
        if all(number is None or math.isfinite(number) for number in numbers):
            return numbers
    except (TypeError, ValueError):
        pass
    return [None if cell is None else str(cell).strip() for cell in cells]
