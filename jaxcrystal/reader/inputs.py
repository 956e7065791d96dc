"""What was read of a source of crystals, and what of it could not be used: counted alike for whatever is compared.

A rate against a training set of which three quarters could not be read is a rate against another training set. So each
source that an evaluation takes has its counts in `metrics.json` and on the terminal, and one that gives nothing is an
error. One that gives less than half is a warning and no error: of a database of experiments more than half of all
entries may be disordered, and the rest is what one wants.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxcrystal.errors import UserError, printable
from jaxcrystal.reader.rows import Rows
from jaxcrystal.reader.sources import named

#: The outcome of a crystal that could be read, but that nothing is compared with.
NOT_NEEDED = "no_sample"


@dataclass(frozen=True)
class Input:
    """The rows of one source: `rows` are `used` or in `left_out`."""

    file: str  #: its name without folders
    sha256: str
    rows: int
    used: int
    left_out: Mapping[str, int] = field(default_factory=dict)  #: rows that were not used, by outcome
    reasons: Mapping[str, str] = field(default_factory=dict)  #: of each outcome in `left_out`, in words
    notes: Mapping[str, int] = field(default_factory=dict)  #: rows of which something was changed or not used, by what
    unread: str = ""  #: what a folder or table holds beside its crystals, counted and named

    @property
    def words(self) -> str:
        """What was left out, such as `9 cif_error (the CIF has no cell)`; empty if nothing was."""
        return ", ".join(
            f"{count} {outcome}" + (f" ({self.reasons[outcome]})" if self.reasons.get(outcome) else "")
            for outcome, count in sorted(self.left_out.items(), key=lambda item: -item[1])
        )

    @property
    def sentence(self) -> str:
        """How much was used, and what was left out."""
        left_out = f"; left out: {self.words}" if self.left_out else ""
        unread = f"; not read: {self.unread}" if self.unread else ""
        return f"{self.used} of {self.rows} rows of {self.file} are used{left_out}{unread}"


def count(found: Rows, not_needed: Collection[int] = ()) -> Input:
    """Counts the rows of `found`; those crystals whose positions are `not_needed` are left out too."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    notes: Counter[str] = Counter()
    unneeded = frozenset(not_needed)
    for position, sample in enumerate(found.rows):
        notes.update(set(sample.notes))
        if sample.crystal is None:
            reasons[sample.outcome][sample.reason] += 1
        elif position in unneeded:
            reasons[NOT_NEEDED]["no sample predicts it"] += 1
    left_out = {outcome: sum(why.values()) for outcome, why in sorted(reasons.items())}
    return Input(
        name_as_text(found.path),
        found.sha256,
        rows=len(found.rows),
        used=len(found.rows) - sum(left_out.values()),
        left_out=left_out,
        reasons={outcome: _shared(reasons[outcome]) for outcome in left_out},
        notes=dict(sorted(notes.items())),
        unread=named({**found.unread, **({"column": found.ignored_columns} if found.ignored_columns else {})}),
    )


def name_as_text(path: str | Path) -> str:
    """The last part of a path, fit to be written."""
    return printable(Path(path).name)


def require_crystals(role: str, found: Rows) -> Input:
    """Counts the rows of `found`, which is to be the `role`, such as `training set`.

    Says on stderr if less than half of the rows are crystals. Raises UserError, with the reasons in words, if none is.
    """
    counted = count(found)
    if not counted.used:
        raise UserError(
            f"{found.path} cannot be the {role}: none of its {counted.rows} rows can be read as a crystal: "
            f"{counted.words}"
        )
    if 2 * counted.used < counted.rows:
        lost = counted.rows - counted.used
        print(
            f"warning: {lost} of {counted.rows} rows of the {role} {found.path} cannot be used: {counted.words}",
            file=sys.stderr,
        )
    return counted


def _shared(reasons: Counter[str]) -> str:
    """The reason of all rows, or the most frequent one as an example."""
    most = reasons.most_common(1)[0][0]
    return most if len(reasons) == 1 else f"for example: {most}"
