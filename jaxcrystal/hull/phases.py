"""The known phases of a hull, and how a table of formation energies is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from pymatgen.core import Composition

COLUMNS = ("formula", "formation_energy_per_atom")
#: What matbench-discovery's summary of the WBM crystals calls the latter.
_ALSO = "e_form_per_atom_mp2020_corrected"

#: A formula without brackets.
_PARTS = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d+)?)?")
_PLAIN = re.compile(f"(?:{_PARTS.pattern})+")


@dataclass(frozen=True)
class Phase:
    """One known crystal of the hull."""

    formula: str
    fractions: Mapping[str, float]  #: atomic fraction by element symbol
    energy: float  #: formation energy in eV/atom


def table_phases(path: Path) -> list[Phase]:
    """The rows of a table of formation energies; raises as `Hull.from_table` says."""
    try:
        columnar = path.suffix in (".parquet", ".pq")
        table = pd.read_parquet(path) if columnar else pd.read_csv(path, keep_default_na=False)
        table = table if COLUMNS[1] in table else table.rename(columns={_ALSO: COLUMNS[1]})
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no table of formation energies: {' '.join(str(error).split())}") from error
    for column in COLUMNS:
        if column not in table:
            also = f" or {_ALSO!r}" if column == COLUMNS[1] else ""
            raise UserError(
                f"{path} has no column {column!r}{also}; its columns are {', '.join(map(str, table.columns))}"
            )
    energies = pd.to_numeric(table[COLUMNS[1]], errors="coerce").to_numpy(np.float64)
    phases = []
    for row, (formula, energy) in enumerate(zip(table[COLUMNS[0]], energies, strict=True)):
        if not np.isfinite(energy):
            raise UserError(f"{path}, row {row} ({formula}): {table[COLUMNS[1]][row]!r} is no energy in eV/atom")
        phases.append(Phase(str(formula), parsed(formula, f"{path}, row {row}"), float(energy)))
    return phases


def fractions_of(composition: Composition) -> dict[str, float]:
    """Atomic fraction by element symbol."""
    composition = composition.element_composition  # Fe2+ and Fe3+ are one element
    return {element.symbol: composition.get_atomic_fraction(element) for element in composition.elements}


def parsed(formula: object, where: str) -> dict[str, float]:
    """Atomic fractions of a formula."""
    from pymatgen.core import Composition

    plain = _PARTS.findall(formula) if isinstance(formula, str) and _PLAIN.fullmatch(formula) else []
    if plain and all(symbol in ATOMIC_NUMBER for symbol, _ in plain):  # 20 times as fast as what follows
        amounts: Counter[str] = Counter()
        for symbol, amount in plain:
            amounts[symbol] += float(amount or 1)
        if all(amounts.values()):
            return {symbol: amount / sum(amounts.values()) for symbol, amount in amounts.items()}
    try:
        composition = Composition(formula, strict=True)
        if not composition:
            raise ValueError("it is empty")
    except ValueError as error:
        raise UserError(f"{where}: {formula!r} is no chemical formula ({error})") from error
    return fractions_of(composition)
