"""Crystals from wherever they are: what the functions here take, as the reader reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import pandas as pd

from jaxcrystal.interface.tables import Attempts, Crystals, Predictions, Substitutions
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.rows import Rows
from jaxcrystal.reader.structures import is_structure
from jaxcrystal.workers import Workers

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import IStructure

    from jaxcrystal.crystals.crystal import Crystal

    Place: TypeAlias = str | PathLike[str]
    One: TypeAlias = IStructure | Atoms | Crystal | str | None
    Source: TypeAlias = (
        Place
        | Crystals
        | Attempts
        | Predictions
        | Substitutions
        | pd.DataFrame
        | pd.Series
        | Mapping[str, One]
        | Iterable[One]
        | IStructure
        | Atoms
        | Crystal
    )


def rows(source: Source, name: str, pool: Workers | None, limit: int | None = None) -> Rows:
    """What the reader reads of a source, under that name; a set that was read before keeps its own in an evaluation.

    A list of places is one set, whose crystals follow each other.
    """
    if isinstance(source, Crystals):
        return read(source.source, limit=limit)
    if isinstance(source, list | tuple) and source and all(map(is_place, source)):
        return joined([read(Path(place), workers=pool) for place in source], limit)
    found = read(_readable(source), workers=pool, limit=limit)
    return found if is_place(source) else replace(found, path=Path(name))


def joined(sets: Sequence[Rows], limit: int | None = None) -> Rows:
    """One set with the rows of all, numbered anew; with the ids that they had, where all had some."""
    if len(sets) == 1:
        return read(sets[0], limit=limit)
    everything = (replace(row, row=number) for number, row in enumerate(chain.from_iterable(one.rows for one in sets)))
    return read(
        Rows(
            path=Path(" and ".join(one.path.name for one in sets)),
            sha256=sha256("".join(f"{one.sha256}\n" for one in sets).encode()).hexdigest(),
            rows=tuple(everything),
            has_ids=all(one.has_ids for one in sets),
        ),
        limit=limit,
    )


def is_place(source: object) -> TypeGuard[str | PathLike[str]]:
    """Whether it names a file or folder; a text with a line feed is a CIF."""
    return isinstance(source, PathLike) or (isinstance(source, str) and "\n" not in source)


def _readable(source: Any) -> Any:
    """As the reader takes it: crystals by id as a table, which has a place for ids."""
    if isinstance(source, Attempts | Predictions | Substitutions):
        return source.to_pandas()
    if isinstance(source, pd.Series):
        source = list(source) if isinstance(source.index, pd.RangeIndex) else dict(source.items())
    if isinstance(source, Mapping) and not is_structure(source):
        return pd.DataFrame({"material_id": list(source), "structure": pd.Series(list(source.values()), dtype=object)})
    if isinstance(source, str) and not is_place(source):
        return [source]
    return Path(source) if is_place(source) else source
