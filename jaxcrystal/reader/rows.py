"""What reading ends in: one typed row for every structure that a source holds or should hold, whatever became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from jaxcrystal.crystals.crystal import Crystal


class Outcome(StrEnum):
    """How the reading of a row ended. A row of a sampler's ledger that failed has the sampler's own word instead."""

    OK = "ok"
    MISSING = "missing"  # the row holds no structure
    MALFORMED_ROW = "malformed_row"  # the table is broken here: more or fewer fields than its header
    CIF_ERROR = "cif_error"  # not CIF, or a CIF that lacks what a crystal needs
    EXTXYZ_ERROR = "extxyz_error"
    POSCAR_ERROR = "poscar_error"
    JSON_ERROR = "json_error"
    UNKNOWN_ELEMENT = "unknown_element"
    NOT_FINITE = "not_finite"  # a length, angle or coordinate is NaN or infinite
    DISORDERED = "disordered"  # a site is partly occupied, or by several elements
    CELL_ERROR = "cell_error"  # no such cell, or beyond 256 Å
    NO_ATOMS = "no_atoms"
    NOT_PERIODIC = "not_periodic"  # in three directions
    SYMMETRY_ERROR = "symmetry_error"  # the space group's setting is unknown, ambiguous or contradicted
    MISSING_ATOMS = "missing_atoms"  # the source states atoms whose positions it does not give
    FORMULA_MISMATCH = "formula_mismatch"  # the atoms are not those of the stated formula
    CRASHED = "crashed"  # reading it ended the process
    TIMEOUT = "timeout"


#: Outcomes of a row that describes a crystal, though only `ok` is a crystal that can be built.
PARSED = (
    Outcome.OK,
    Outcome.CELL_ERROR,
    Outcome.DISORDERED,
    Outcome.NO_ATOMS,
    Outcome.NOT_PERIODIC,
    Outcome.SYMMETRY_ERROR,
    Outcome.MISSING_ATOMS,
    Outcome.FORMULA_MISMATCH,
)


class Refused(Exception):
    """A row that is no crystal: its outcome, and why, in words that say what would be right."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        self.outcome, self.reason = outcome.value, reason
        super().__init__(reason)


@dataclass(frozen=True)
class Row:
    """One structure of a source, or the reason why there is none."""

    id: str
    row: int  #: in the source, from 0
    outcome: str  #: an `Outcome`, or what the sampler's ledger says
    reason: str  #: empty when the outcome is `ok`
    crystal: Crystal | None
    cif: str  #: as the source has it; empty when the source holds none
    labels: Mapping[str, Any] = field(default_factory=dict)  #: what the source says of it beside its structure
    notes: tuple[str, ...] = ()  #: what was changed, or is stated and not used, in words that many rows share


@dataclass(frozen=True)
class Rows:
    """Everything that one source holds."""

    path: Path  #: of the file or folder; the name of what was in memory
    sha256: str  #: of the file's bytes; of a folder's files, names and bytes; of the crystals that were in memory
    rows: tuple[Row, ...]
    has_ids: bool = False  #: whether the source names its rows (a column, an index, file names), or we number them
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: what a folder holds beside, by kind
    ignored_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def tally(words: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    return {str(word): count for word, count in Counter(words).most_common()}
