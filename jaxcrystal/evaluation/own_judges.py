"""Judges of one's own: a Python function from a crystal to a property, by name.

    def volume_per_atom(structure):          # pymatgen's Structure
        return structure.volume / len(structure)

    jaxcrystal evaluate samples.parquet --judge volume_per_atom=judges.py:volume_per_atom --out report

What it says of the sampled and of the relaxed crystals are the columns `property.NAME` and `property.NAME_relaxed`, and
where a ledger asked for the property, how many attempts meet it (`conditions`).
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from pymatgen.core import Structure

Judge = Callable[["Structure"], Any]  #: a number or text; None, or an exception, where it cannot say


def load(typed: str) -> tuple[str, Judge]:
    """Name and function of NAME=MODULE:FUNCTION or NAME=FILE.py:FUNCTION.

    Raises UserError for what is written otherwise, a module that cannot be imported, or one without that function.
    """
    name, _, place = typed.partition("=")
    source, _, function = place.rpartition(":")
    if not (name and source and function):
        raise UserError(f"--judge {typed}: write NAME=MODULE:FUNCTION, or NAME=FILE.py:FUNCTION")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            try:
                module = importlib.import_module(source)
            finally:
                del sys.path[0]
    except Exception as error:  # whatever somebody's module does
        raise UserError(f"--judge {typed}: cannot import {source}: {type(error).__name__}: {error}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"--judge {typed}: {source} has no function {function}")
    return name, found


def column(name: str, suffix: str = "") -> str:
    """Of the table of attempts."""
    return f"property.{name}{suffix}"


def judged(
    table: pd.DataFrame, crystals: Sequence[Crystal | None], judges: Mapping[str, Judge], suffix: str = ""
) -> pd.DataFrame:
    """Adds what each judge says of the crystals of the rows, None where there is none, or the judge cannot say.

    Raises UserError for a judge that can say nothing of any crystal, or says numbers of some and words of others.
    """
    for name, judge in judges.items():
        values: list[Any] = []
        failed: list[str] = []
        for crystal in tqdm(crystals, f"{name}{suffix}", unit="crystal", disable=None):
            value = None
            if crystal is not None:
                try:
                    value = _value(judge(crystal.to_structure()))
                except Exception as error:  # somebody's function
                    failed.append(f"{type(error).__name__}: {error}")
            values.append(value)
        kinds = {type(value) for value in values if value is not None}
        if failed and not kinds:
            raise UserError(f"the judge of {name} can say nothing of any crystal: {failed[0]}")
        if len(kinds) > 1:
            raise UserError(f"the judge of {name} says numbers of some crystals and words of others")
        if failed:
            many = f"{len(failed)} crystal{'s' * (len(failed) > 1)}"
            print(f"note: the judge of {name}{suffix} failed for {many}, first with {failed[0]}", file=sys.stderr)
        dtype = "str" if kinds == {str} else "float64"
        table = table.assign(**{column(name, suffix): pd.array(values, dtype=dtype)})
    return table


def unsaid(table: pd.DataFrame) -> dict[str, int]:
    """Of how many sampled crystals each judge could not say anything, by its property; none where it always could."""
    names = [name.removeprefix(column("")) for name in table if name.startswith(column(""))]
    counts = {name: int((table[column(name)].isna() & (table["outcome"] == "ok")).sum()) for name in names}
    return {name: count for name, count in counts.items() if count and not name.endswith("_relaxed")}


def _value(said: Any) -> float | str | None:
    if said is None or isinstance(said, str):
        return said
    number = float(said)
    return number if math.isfinite(number) else None
