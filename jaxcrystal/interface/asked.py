"""Formulas whose crystals are to be predicted: of a table, of a set of the package, or one by one.

    material_id,formula,num_atoms
    mp-5229,SrTiO3,5
    mp-19017,LiFePO4,

Rows that ask for the same formula, and the same number of atoms, share their attempts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from jaxcrystal import box
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.formulas import read_formula, reduced, spelled
from jaxcrystal.errors import UserError
from jaxcrystal.reader.json_documents import IDS

FORMULAS = ("formula", "pretty_formula")  #: columns of a table, either of which will do
NUM_ATOMS = "num_atoms"  #: a column of a table, which may be missing, or empty
_TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class Asked:
    """A crystal to be predicted."""

    id: str  #: as its true crystal's
    formula: str  #: as data sets spell it
    num_atoms: int | None  #: of the cell; None: not stated
    where: str  #: how errors call the row

    @property
    def wish(self) -> tuple[str, int | None]:
        """What rows that share their attempts have in common."""
        return self.formula, self.num_atoms

    @property
    def condition(self) -> dict[str, Any]:
        """What a sampler is asked for."""
        atoms = {} if self.num_atoms is None else {NUM_ATOMS: self.num_atoms}
        return {"pretty_formula": self.formula, **atoms}


def asked(source: Any, *, num_atoms: bool = True, limit: int | None = None) -> list[Asked]:
    """What the first `limit` rows ask for: of a CSV or parquet file, a pandas table, the name of a set of the package,
    a mapping from ids to formulas, a formula or a list of them, whose ids are then the formulas.

    Without `num_atoms` that column is left aside. Raises UserError, with the row, for a table that cannot be read or
    has no column of formulas, for what is no formula, for a number of atoms that a formula cannot have, and for an id
    that is there twice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    name, table = _table(source, limit)
    by_name = {str(column).strip().lower(): column for column in table.columns}
    formulas = next((by_name[column] for column in FORMULAS if column in by_name), None)
    if formulas is None:
        raise UserError(
            f"{name} has no column `formula`; its columns are {', '.join(map(str, table.columns))[:200] or 'none'}"
        )
    if table.empty:
        raise UserError(f"{name} has no row: there is nothing to predict")
    ids = next((by_name[column] for column in IDS if column in by_name), formulas)
    atoms = by_name.get(NUM_ATOMS) if num_atoms else None
    found: dict[str, Asked] = {}
    for row in range(len(table)):
        where, cell = f"{name}, row {row}", table.iloc[row]
        with _named(where):
            one = _asked(cell[ids], cell[formulas], None if atoms is None else cell[atoms], where)
        if found.setdefault(one.id, one) is not one:
            raise UserError(
                f"{where}: {one.id!r} is there before, in {found[one.id].where}; give each crystal an id of its own, "
                f"as a column {IDS[0]}"
            )
    return list(found.values())


def wishes(crystals: Iterable[Asked]) -> dict[tuple[str, int | None], Asked]:
    """The first that has each wish, in their order."""
    found: dict[tuple[str, int | None], Asked] = {}
    for one in crystals:
        found.setdefault(one.wish, one)
    return found


@contextmanager
def naming(first: Sequence[Asked]) -> Iterator[None]:
    """What a sampler refuses of its n-th wish is refused of the n-th row of `first`."""
    try:
        yield
    except UserError as error:
        where = re.match(r"conditions, row (\d+): ", str(error))
        if where is None:
            raise
        raise UserError(f"{first[int(where[1]) - 1].where}: {str(error)[where.end() :]}") from None


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _asked(name: Any, formula: Any, atoms: Any, where: str) -> Asked:
    formula, number = _text(formula), _whole(atoms)
    unit = sum(reduced(read_formula(formula)).values())
    if number is not None and (number < 1 or number % unit):
        raise UserError(
            f"a cell of {formula} cannot have {number} atoms; those of whole formula units have {unit}, {2 * unit}, …"
        )
    return Asked(_text(name), spelled(formula), number, where)


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # a column of integers of which some are missing
        return str(int(value))
    return "" if value is None or value is pd.NA or value != value else str(value).strip()


def _whole(value: Any) -> int | None:
    text = _text(value)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+(\.0*)?", text):
        raise UserError(f"the number of atoms is {text!r}; give a whole number, or leave it empty")
    return int(float(text))


def _table(source: Any, limit: int | None) -> tuple[str, pd.DataFrame]:
    """What errors call it, and its first rows."""
    if isinstance(source, pd.DataFrame):
        return "the table", source.head(limit)
    if isinstance(source, Mapping):
        return "the formulas", pd.DataFrame({IDS[0]: list(source), "formula": list(source.values())}).head(limit)
    several = not isinstance(source, str | PathLike)
    listed = list(source) if several else [source]
    if len(listed) == 1 and _is_place(listed[0]):
        return str(listed[0]), _read(listed[0], limit)
    return "the formulas", pd.DataFrame({"formula": pd.Series(listed, dtype=object)}).head(limit)


def _is_place(typed: Any) -> bool:
    """Whether it is a table, and no formula."""
    known = isinstance(typed, PathLike) or box.crystals(typed) is not None
    return known or Path(str(typed)).suffix.lower() in _TABLES or Path(str(typed)).is_file()


def _read(place: Any, limit: int | None) -> pd.DataFrame:
    if box.crystals(place) is not None:
        crystals = dataset.load(str(place))
        few = crystals if limit is None else crystals.first(min(limit, len(crystals)))
        each = [few.crystal(i) for i in range(len(few.ids))]
        formulas = [crystal.formula for crystal in each]
        return pd.DataFrame({IDS[0]: few.ids, "formula": formulas, NUM_ATOMS: list(map(len, each))})
    path = Path(place)
    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path).head(limit)
        # Na N is a formula, and no missing value.
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", nrows=limit)
    except (OSError, ValueError, pa.ArrowException) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"cannot read {path} as a table: {why}; give a .csv or .parquet file with a column formula"
        ) from None
