"""An evaluation that was done: its numbers, its table, and the page that shows them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.evaluation import summary
from jaxcrystal.report.quantities import SECTIONS, measured


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What `jaxcrystal.evaluate` found."""

    out: Path  #: the folder that holds it
    metrics: Mapping[str, Any]  #: what metrics.json holds (docs/metrics.md)
    table: pd.DataFrame  #: a row an attempt, whatever became of it: what structures.parquet holds
    reference: pd.DataFrame | None = None  #: a row a reference crystal, if there was a reference
    temporary: TemporaryDirectory[str] | None = field(default=None, compare=False)  #: removed with this object

    @classmethod
    def read(cls, folder: str | PathLike[str], temporary: TemporaryDirectory[str] | None = None) -> Evaluation:
        """Of a folder that `jaxcrystal.evaluate` or the command of that name wrote. Raises UserError if it is none."""
        found = results.read(Path(folder))
        return cls(Path(folder), found.metrics, found.table, found.reference, temporary)

    @property
    def report(self) -> Path:
        """The page, one file that needs no other."""
        return self.out / "report.html"

    def save(self, folder: str | PathLike[str]) -> Evaluation:
        """Copies everything to a new folder; the evaluation there.

        Raises UserError if the folder exists or cannot be written.
        """
        try:
            shutil.copytree(self.out, folder)
        except OSError as error:
            raise UserError(f"cannot save to {folder}: {error.strerror or error}; name a new folder") from None
        return Evaluation.read(folder)

    def __str__(self) -> str:
        return summary(dict(self.metrics))

    def __repr__(self) -> str:
        return f"<Evaluation of {self.metrics['counts']['attempts']} attempts in {self.out}>"

    def _repr_html_(self) -> str:
        lines, section = [], None
        for number in measured(self.metrics):
            quantity = number.quantity
            if quantity.section != section:
                section = quantity.section
                lines.append(f'<tr><th colspan="3" style="text-align:left">{SECTIONS.get(section, section)}</th></tr>')
            interval = "" if number.interval is None else quantity.write_interval(*number.interval)
            value = f"{quantity.write(number.value)} {quantity.unit}"
            lines.append(f"<tr><td>{escape(quantity.title)}</td><td>{value}</td><td>{interval}</td></tr>")
        kept = "temporary; save(FOLDER) keeps it: " if self.temporary is not None else ""
        title = f"{self.metrics['counts']['attempts']:,} attempts, protocol {self.metrics['protocol']}; 95 % intervals"
        return f"<p>{escape(title)}</p><table>{''.join(lines)}</table><p>{kept}{escape(str(self.report))}</p>"
