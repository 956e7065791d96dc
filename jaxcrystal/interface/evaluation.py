"""An evaluation that was done: its numbers, its table, and the page that shows them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.evaluation.evaluation import summary
from jaxcrystal.report.quantities import SECTIONS, measured

if TYPE_CHECKING:
    from jaxcrystal.interface.dft import Code
    from jaxcrystal.interface.pictures import Pictures
    from jaxcrystal.interface.tables import Crystals


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

    def best(self, count: int, new: bool = True) -> Crystals:
        """So many of the relaxed crystals, the nearest to the hull first; none twice.

        Without `new` also those that match a crystal of the training set. Labels: `e_above_hull` and
        `formation_energy_per_atom` (eV/atom), and `known_as`, the training crystal that it matches, or None.
        Raises UserError where nothing was placed against a hull.
        """
        from jaxcrystal.interface.tables import Crystals
        from jaxcrystal.reader.reading import crystal_from_cif
        from jaxcrystal.reader.rows import Row, Rows

        if "e_above_hull" not in self.table:
            raise UserError(f"{self.out} has no distances to a hull; evaluate with a potential and a hull")
        wanted = self.table["unique_relaxed"] & self.table["e_above_hull"].notna()
        if new and "novel_relaxed" in self.table:
            wanted &= self.table["novel_relaxed"]
        rows = []
        for found in self.table[wanted].sort_values("e_above_hull", kind="stable").head(count).to_dict("records"):
            labels = {name: found[name] for name in ("e_above_hull", "formation_energy_per_atom")}
            known = found.get("known_as_relaxed")
            labels["known_as"] = known if isinstance(known, str) else None
            cif = found["relaxed_cif"]
            rows.append(Row(found["id"], found["row"], "ok", "", crystal_from_cif(cif), cif, labels))
        digest = hashlib.sha256("".join(row.cif for row in rows).encode()).hexdigest()
        return Crystals(Rows(self.out / "best", digest, tuple(rows), has_ids=True))

    def dft_inputs(
        self,
        out: str | PathLike[str],
        *,
        rows: Sequence[int] | None = None,
        best: int = 100,
        code: Code = "vasp",
        pseudopotentials: str | PathLike[str] | None = None,
    ) -> pd.DataFrame:
        """Inputs of DFT calculations in a new folder: of `rows` of the table, or else of the `best` new crystals.

        The index of what was written: `folder`, `id`, `row`, `formula`, `num_atoms`, `structure` (relaxed or as
        sampled), `relaxation` (its outcome), `e_above_hull` (eV/atom), `notes`. `interface.dft.write` explains `code`
        and `pseudopotentials`, and says what is refused; so is an evaluation without distances to a hull, unless rows
        are given.
        """
        from jaxcrystal.interface import dft

        if rows is None:
            rows = [row.row for row in self.best(best)] if best > 0 else []
        if not len(rows):
            raise UserError(f"no crystal of {self.out} is among the best {best} new ones; choose rows yourself")
        return dft.write(self.table, rows, Path(out), code, pseudopotentials)

    def pictures(self, count: int = 24, new: bool = True) -> Pictures:
        """The `best`, drawn side by side with their distance to the hull, for a notebook."""
        from jaxcrystal.interface.pictures import Pictures

        rows = self.best(count, new).rows
        return Pictures.of([(r.crystal.to_structure(), f"{r.labels['e_above_hull']:+.3f} eV/atom") for r in rows])

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
