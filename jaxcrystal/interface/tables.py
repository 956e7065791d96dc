"""What the functions return: crystals that were read, drawn or relaxed, a row each; shown by notebooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from html import escape
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

import numpy as np
import pandas as pd

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.errors import UserError
from jaxcrystal.interface import files
from jaxcrystal.interface.pictures import Pictures, picture
from jaxcrystal.interface.predicted import Prediction
from jaxcrystal.reader.rows import Row, Rows
from jaxcrystal.reader.sources import named
from jaxcrystal.relaxation.batch import Relaxation
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.resampling import by_wish, check_exact, effective_number, resample, weights
from jaxcrystal.sampling.templates import Substitution
from jaxcrystal.yardstick import Yardstick

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

    from jaxcrystal.sampling.sampler import SamplerSettings

SHOWN = 10  #: rows that a notebook shows

_STYLE = (
    "<style>.jaxcrystal td, .jaxcrystal th {text-align: left; vertical-align: middle; white-space: nowrap} "
    ".jaxcrystal .picture svg {width: 84px; height: 84px} .jaxcrystal .why {white-space: normal; max-width: 28em} "
    ".jaxcrystal .edge {stroke: #8b909b; stroke-width: 1.1} .jaxcrystal .bond {stroke-width: 4}</style>"
)


@dataclass(frozen=True)
class Relaxed:
    """Where one crystal went. What could not be known is None."""

    id: str
    outcome: str  #: of the relaxation (`relaxation.batch.RelaxationStatus`), or why there was no crystal to relax
    reason: str  #: in words, where the outcome is not `converged`
    start: Crystal | None
    structure: Structure | None = None  #: the last one
    energy: float | None = None  #: eV per cell
    energy_per_atom: float | None = None  #: eV/atom
    steps: int = 0
    fmax: float | None = None  #: largest force at the end, of atoms and of the cell's three, in eV/Å
    rmsd: float | None = None  #: of the atoms from start to end, Å
    volume_change: float | None = None  #: end over start, minus 1

    @classmethod
    def of(cls, sample: Row, found: Relaxation | None) -> Relaxed:
        """From what was read, and what became of it; None if there was no crystal."""
        if found is None:
            return cls(sample.id, sample.outcome, sample.reason, None)
        energy = found.energy
        return cls(
            sample.id,
            str(found.status),
            found.reason,
            sample.crystal,
            found.structure,
            energy,
            None if energy is None or found.structure is None else energy / len(found.structure),
            found.steps,
            found.fmax,
            found.rmsd,
            found.volume_change,
        )


Kind = TypeVar("Kind", Row, Relaxed, Attempt, Substitution, Prediction)


class _Table(ABC, Generic[Kind]):
    """Rows in their order, by number, slice or id."""

    @property
    @abstractmethod
    def rows(self) -> tuple[Kind, ...]:
        """All of them."""

    @abstractmethod
    def _of(self, rows: tuple[Kind, ...]) -> Self:
        """A table of these, a part of its own."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Kind]:
        return iter(self.rows)

    @overload
    def __getitem__(self, which: int | str) -> Kind: ...
    @overload
    def __getitem__(self, which: slice) -> Self: ...
    def __getitem__(self, which: int | str | slice) -> Kind | Self:
        """A row by its number, or by its id (the first of that id; KeyError if there is none); a slice of the table."""
        if isinstance(which, slice):
            return self._of(self.rows[which])
        if isinstance(which, str):
            found = next((row for row in self.rows if row.id == which), None)
            if found is None:
                raise KeyError(which)
            return found
        return self.rows[which]

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]

    @property
    def outcomes(self) -> list[str]:
        return [row.outcome for row in self.rows]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows ended with each outcome, the most frequent first."""
        return dict(Counter(self.outcomes).most_common())

    @abstractmethod
    def structures(self) -> list[Structure | None]:
        """pymatgen's, row by row; None where there is none."""

    def atoms(self) -> list[Atoms | None]:
        """ASE's, row by row; None where there is none."""
        return [None if structure is None else _atoms(structure) for structure in self.structures()]

    @property
    def crystals(self) -> list[Crystal | None]:
        """Ours, row by row; None where there is none."""
        return [None if found is None else Crystal.from_structure(found) for found in self.structures()]

    def write(self, out: str | PathLike[str], form: Literal["cif", "poscar"] = "cif") -> list[Path]:
        """A file of each crystal in a new folder, FORMULA_ID.cif or .vasp, which others read; their paths.

        Or, where the name ends in .csv or .parquet, one table: a row each, whatever became of it, with pymatgen's
        dictionary of the Structure as JSON in the column `structure`, as LeMat-GenBench takes it.

        Raises UserError if the folder exists and is not empty, or cannot be written.
        """
        out = Path(out)
        if out.suffix in files.TABLES and not out.is_dir():
            files.write_table(files.structures_table(zip(self.ids, self.outcomes, self.crystals, strict=True)), out)
            return [out]
        return files.write(zip(self.ids, self.structures(), strict=True), out, form)

    def pictures(self, count: int = 24) -> Pictures:
        """The first so many crystals, drawn side by side: what a notebook shows of it."""
        found = (pair for pair in zip(self.ids, self.structures(), strict=True) if pair[1] is not None)
        return Pictures.of([(structure, name) for name, structure in islice(found, count)])

    def __repr__(self) -> str:
        return f"<{self._summary()}>"

    def _summary(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items())
        return f"{type(self).__name__}: {len(self)} rows: {counts}"


class Crystals(_Table[Row]):
    """Crystals as they were read: `Row`s, each with `id`, `crystal` (None if there is none), `outcome` and `reason`,
    `labels` (what else the source says) and `notes` (what was changed, or is not used).
    """

    def __init__(self, source: Rows) -> None:
        self.source = source  #: with its name, its hash, and what it holds beside

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.source.rows

    def _of(self, rows: tuple[Row, ...]) -> Crystals:
        digest = sha256(f"{self.source.sha256} {[row.row for row in rows]}".encode()).hexdigest()
        return Crystals(replace(self.source, rows=rows, sha256=digest))  # a part is not the whole

    def _summary(self) -> str:
        unread = f"; not read: {named(self.source.unread)}" if self.source.unread else ""
        return f"{super()._summary()}{unread}"

    @property
    def crystals(self) -> list[Crystal | None]:
        return [row.crystal for row in self.rows]

    @property
    def notes(self) -> list[tuple[str, ...]]:
        return [row.notes for row in self.rows]

    def structures(self) -> list[Structure | None]:
        return [None if row.crystal is None else row.crystal.to_structure() for row in self.rows]

    def to_pandas(self) -> pd.DataFrame:
        """A row a crystal: `material_id`, outcome, formula, cell (Å, degrees, Å³), labels, and the CIF.

        `jaxcrystal.read` reads it again.
        """
        rows = []
        for row in self.rows:
            known: dict[str, Any] = {
                "material_id": row.id,
                "outcome": row.outcome,
                "reason": row.reason,
                "notes": "; ".join(row.notes),
            }
            crystal = row.crystal
            if crystal is not None:
                known |= {"formula": crystal.formula, "num_atoms": len(crystal), "volume": crystal.volume}
                known |= dict(zip("abc", map(float, crystal.lengths), strict=True))
                known |= dict(zip(("alpha", "beta", "gamma"), map(float, crystal.angles), strict=True))
            rows.append({**row.labels, **known, "cif": row.cif or (crystal.to_cif() if crystal is not None else "")})
        first = ["material_id", "outcome", "reason", "notes", "formula", "num_atoms"]
        first += ["a", "b", "c", "alpha", "beta", "gamma", "volume"]
        others = dict.fromkeys(name for row in rows for name in row if name not in (*first, "cif"))
        return pd.DataFrame(rows, columns=[*first, *others, "cif"]).astype({"num_atoms": "Int64"})

    def _repr_html_(self) -> str:
        cells = []
        for row in self.rows[:SHOWN]:
            crystal, why = row.crystal, "; ".join(filter(None, (row.reason, *row.notes)))
            shape = ["", "", ""] if crystal is None else [crystal.formula_html, str(len(crystal)), _cell(crystal)]
            structure = None if crystal is None else crystal.to_structure()
            cells.append([picture(structure), escape(row.id), *shape, escape(row.outcome), escape(why)])
        heads = ["", "id", "formula", "atoms", "a b c, Å; α β γ, °", "outcome", "why, and what to know"]
        return html_table(self._summary(), heads, cells, len(self))


class Attempts(_Table[Attempt]):
    """Attempts to draw a crystal: `Attempt`s, with `text`, `status`, `crystal`, `structure`, `log_probability` …"""

    def __init__(
        self,
        rows: Iterable[Attempt],
        settings: SamplerSettings | None = None,
        model: str | None = None,
        yardstick: Yardstick | None = None,
    ) -> None:
        self._rows = tuple(rows)
        self.settings = settings  #: of the sampler that drew them
        self.model = model  #: fingerprint of its model, as a ledger has it
        self.yardstick = yardstick  #: that the model had beside it

    @property
    def rows(self) -> tuple[Attempt, ...]:
        return self._rows

    def _of(self, rows: tuple[Attempt, ...]) -> Attempts:
        return Attempts(rows, self.settings, self.model, self.yardstick)

    @property
    def crystals(self) -> list[Crystal | None]:
        """None for an attempt that failed."""
        return [row.crystal for row in self.rows]

    @property
    def effective_number(self) -> float:
        """Of attempts, once they are weighted as `resample` weighs them; summed over wishes. Raises as it."""
        return sum(effective_number(weight) for _, weight in self._weighted())

    def resample(self, count: int, seed: int = 0) -> Attempts:
        """`count` of each wish's attempts, with repetition: as the model alone draws under the constraints.

        The grammar renormalises token by token, and its crystals are not the model's in proportion; resampling by their
        weights, exp(grammar_log_probability), makes them so as attempts grow in number (`effective_number` says how
        near that is). Raises UserError unless they were drawn with the grammar at temperature 1 and top-p 1, all of a
        wish from one prompt, and none was left out.
        """
        return self._of(tuple(rows[i] for rows, weight in self._weighted() for i in resample(weight, count, seed)))

    def _weighted(self) -> Iterator[tuple[tuple[Attempt, ...], np.ndarray]]:
        if self.settings is None:
            raise UserError("attempts are resampled as a sampler drew them; these have no settings")
        check_exact([*self.settings.methods, *(self.settings.composition_methods or [])], self.settings.guidance)
        for rows in by_wish(self.rows):
            yield rows, weights([row.grammar_log_probability for row in rows])

    def best(self, count: int) -> Attempts:
        """So many of the crystals, the likeliest first by log-probability a token; none twice."""
        ok: dict[str, Attempt] = {}
        for row in self.rows:
            if row.crystal is not None:
                ok.setdefault(row.text, row)
        return self._of(tuple(sorted(ok.values(), key=lambda row: -row.log_probability / row.tokens)[:count]))

    def structures(self) -> list[Structure | None]:
        return [row.structure for row in self.rows]

    def to_pandas(self) -> pd.DataFrame:
        """A row an attempt, with the columns of a ledger (docs/sampling.md); `jaxcrystal.read` reads it again."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=[field.name for field in fields(Attempt)])

    def _repr_html_(self) -> str:
        cells = []
        for row in self.rows[:SHOWN]:
            crystal = row.crystal
            shape = ["", "", ""] if crystal is None else [crystal.formula_html, str(len(crystal)), _cell(crystal)]
            group = "" if row.space_group is None else str(row.space_group)
            cells.append([picture(row.structure), row.id, *shape, group, escape(row.outcome)])
        heads = ["", "id", "formula", "atoms", "a b c, Å; α β γ, °", "space group", "status"]
        return html_table(self._summary(), heads, cells, len(self))


class Substitutions(_Table[Substitution]):
    """Attempts made of known crystals: `Substitution`s, with `template`, `swaps`, `status`, `crystal`, `redraws` …"""

    def __init__(self, rows: Iterable[Substitution]) -> None:
        self._rows = tuple(rows)

    @property
    def rows(self) -> tuple[Substitution, ...]:
        return self._rows

    def _of(self, rows: tuple[Substitution, ...]) -> Substitutions:
        return Substitutions(rows)

    @property
    def crystals(self) -> list[Crystal | None]:
        """None for an attempt that failed."""
        return [row.crystal for row in self.rows]

    def structures(self) -> list[Structure | None]:
        return [row.structure for row in self.rows]

    def to_pandas(self) -> pd.DataFrame:
        """A row an attempt (docs/templates.md); `jaxcrystal.read` reads it again."""
        texts = dict.fromkeys(("template", "swaps", "status", "formula", "cif"), "string")
        return pd.DataFrame([row.row() for row in self.rows], columns=["index", "seed", *texts, "redraws"]).astype(
            {"index": "int64", "seed": "int64", **texts, "redraws": "Int64"}
        )

    def _repr_html_(self) -> str:
        cells = []
        for row in self.rows[:SHOWN]:
            crystal = row.crystal
            shape = ["", "", ""] if crystal is None else [crystal.formula_html, str(len(crystal)), _cell(crystal)]
            swaps = ", ".join(f"{old} → {new}" for old, new in (row.swaps or {}).items())
            cells.append([picture(row.structure), row.id, *shape, escape(row.template), swaps, escape(row.outcome)])
        heads = ["", "id", "formula", "atoms", "a b c, Å; α β γ, °", "template", "swaps", "status"]
        return html_table(self._summary(), heads, cells, len(self))


class Predictions(_Table[Prediction]):
    """Attempts at crystals of stated formulas: `Prediction`s, with `id`, `rank`, `attempt`, `crystal`, `relaxed` …"""

    def __init__(self, rows: Iterable[Prediction]) -> None:
        self._rows = tuple(rows)

    @property
    def rows(self) -> tuple[Prediction, ...]:
        return self._rows

    def _of(self, rows: tuple[Prediction, ...]) -> Predictions:
        return Predictions(rows)

    @property
    def crystals(self) -> list[Crystal | None]:
        """None for an attempt that failed."""
        return [row.crystal for row in self.rows]

    def first(self, count: int = 1) -> Predictions:
        """So many predictions of each crystal, those of the lowest ranks."""
        return self._of(tuple(row for row in self.rows if row.rank <= count))

    def structures(self) -> list[Structure | None]:
        return [row.structure for row in self.rows]

    def __str__(self) -> str:
        """The first prediction of the first crystals, a line each."""
        best = [row for row in self.rows if row.rank == 1]
        lines = [self._summary()]
        for row in best[:SHOWN]:
            crystal, told = row.crystal, row.outcome
            if crystal is not None:
                group = "unknown" if row.attempt.space_group is None else row.attempt.space_group
                told = f"{spelled(crystal.formula)}, {len(crystal)} atoms, space group {group}"
                told += "" if row.attempt.log_probability is None else f", log p {row.attempt.log_probability:.1f}"
                told += "" if row.energy_per_atom is None else f", relaxed {row.energy_per_atom:.3f} eV/atom"
            lines.append(f"  {row.id}: {told}")
        return "\n".join(lines + [f"  … and {len(best) - SHOWN:,} more"] * (len(best) > SHOWN))

    def to_pandas(self) -> pd.DataFrame:
        """A row a prediction (docs/prediction.md); `jaxcrystal.read` reads it again."""
        relaxed = any(row.relaxed is not None for row in self.rows)
        rows = [row.row() | (row.relaxed_row() if relaxed else {}) for row in self.rows]
        return pd.DataFrame(rows).astype({"energy_per_atom": "float64"} if relaxed else {})

    def _repr_html_(self) -> str:
        cells = []
        for row in self.rows[:SHOWN]:
            crystal, energy = row.crystal, row.energy_per_atom
            shape = ["", "", ""] if crystal is None else [crystal.formula_html, str(len(crystal)), _cell(crystal)]
            group = "" if row.attempt.space_group is None else str(row.attempt.space_group)
            worth = "" if row.attempt.log_probability is None else f"{row.attempt.log_probability:.1f}"
            numbers = [str(row.rank), worth, "" if energy is None else f"{energy:.3f}"]
            cells.append([picture(row.structure), escape(row.id), *numbers, *shape, group, escape(row.outcome)])
        heads = ["", "id", "rank", "log p", "eV/atom", "formula", "atoms"]
        heads += ["a b c, Å; α β γ, °", "space group", "status"]
        return html_table(self._summary(), heads, cells, len(self))


class Relaxations(_Table[Relaxed]):
    """Crystals as they were relaxed: `Relaxed`s, each with `id`, `outcome`, `reason`, `structure`, `energy` …"""

    def __init__(self, rows: Sequence[Relaxed], potential: str) -> None:
        self._rows = tuple(rows)
        self.potential = potential  #: name of the potential

    @property
    def rows(self) -> tuple[Relaxed, ...]:
        return self._rows

    def _of(self, rows: tuple[Relaxed, ...]) -> Relaxations:
        return Relaxations(rows, self.potential)

    @property
    def energies(self) -> list[float | None]:
        """eV per cell, on the potential's scale."""
        return [row.energy for row in self.rows]

    def structures(self) -> list[Structure | None]:
        return [row.structure for row in self.rows]

    def to_pandas(self) -> pd.DataFrame:
        """A row a crystal, with the relaxed one's CIF: `jaxcrystal.read` reads it again. Units as in `Relaxed`."""
        rows = []
        for row in self.rows:
            known = asdict(replace(row, start=None, structure=None))
            known["material_id"] = known.pop("id")
            end = None if row.structure is None else Crystal.from_structure(row.structure)
            known |= {"formula": end and end.formula, "cif": "" if end is None else end.to_cif()}
            rows.append(known)
        measures = ["energy", "energy_per_atom", "fmax", "rmsd", "volume_change"]
        columns = ["material_id", "outcome", "reason", "formula", "steps", *measures, "cif"]
        return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(measures, "float64"))

    def _repr_html_(self) -> str:
        def number(value: float | None, form: str = ".3f") -> str:
            return "" if value is None else f"{value:{form}}".replace("-", "−")

        cells = []
        for row in self.rows[:SHOWN]:
            formula = "" if row.start is None else row.start.formula_html
            measures = [number(row.energy_per_atom), number(row.rmsd), number(row.volume_change, "+.1%")]
            ends = [str(row.steps), escape(row.outcome), escape(row.reason)]
            cells.append([picture(row.structure), escape(row.id), formula, *measures, *ends])
        heads = ["", "id", "formula", "eV/atom", "moved, Å", "volume", "steps", "outcome", "why"]
        return html_table(f"{self._summary()}; {self.potential}", heads, cells, len(self))


def _atoms(structure: Structure) -> Atoms:
    from ase import Atoms

    symbols = [site.specie.symbol for site in structure]
    return Atoms(symbols, scaled_positions=structure.frac_coords, cell=structure.lattice.matrix, pbc=True)


def _cell(crystal: Crystal) -> str:
    return (
        "&ensp;".join(f"{x:.2f}" for x in crystal.lengths) + "<br>" + "&ensp;".join(f"{x:.1f}" for x in crystal.angles)
    )


def html_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> str:
    """Cells are HTML; the first of a row is a picture, the last its reasons."""
    styles = ["picture", *[""] * (len(heads) - 2), "why"]
    body = "".join(
        "<tr>" + "".join(f'<td class="{s}">{cell}</td>' for s, cell in zip(styles, row, strict=True)) + "</tr>"
        for row in rows
    )
    more = f"<p>… and {count - len(rows):,} more</p>" if count > len(rows) else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f'{_STYLE}<div class="jaxcrystal"><p>{escape(title)}</p><table><tr>{head}</tr>{body}</table>{more}</div>'
