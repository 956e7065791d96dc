"""Conditions of many prompts, read from a CSV: a row a prompt, an empty cell for what is not stated.

pretty_formula,band_gap
LiFePO4,3.5
NaCl,
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.crystals.prompts import sentence
from jaxcrystal.errors import UserError

_KIND = {"pretty_formula": str, "elements": lambda text: re.split(r"[\s,-]+", text), "spacegroup.number": int}


def read(path: str | Path) -> list[dict[str, Any]]:
    """The conditions of each row, in the order of the columns.

    Raises UserError that names file, row and value, if the file cannot be read, a column is none of
    `config.ATTRIBUTES`, a row is longer or shorter than the header, or a value is none of its column.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except ValueError:
        raise UserError(f"{path} is empty; expected a header of {', '.join(ATTRIBUTES)}, or some of these") from None
    unknown = [name for name in header if name not in ATTRIBUTES]
    if unknown or len(set(header)) < len(header):
        what = f"the column {unknown[0]!r}" if unknown else "a column twice"
        raise UserError(f"{path} has {what}; columns are {', '.join(ATTRIBUTES)}, each at most once")
    if not rows:
        raise UserError(f"{path} has a header and no row")
    return [_conditions(f"{path}, row {number}", header, row) for number, row in enumerate(rows, start=1)]


def _conditions(where: str, header: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise UserError(f"{where}: {len(row)} cells, the header has {len(header)}")
    stated = {}
    for name, cell in zip(header, map(str.strip, row), strict=True):
        if cell:
            try:
                stated[name] = _KIND.get(name, float)(cell)
                sentence(name, stated[name])
            except ValueError:
                raise UserError(f"{where}: {cell!r} is no value of {name}") from None
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    return stated
