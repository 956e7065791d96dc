"""What a model that infills has answered: of each crystal, the probability of every element where one is masked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd

from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.errors import UserError
from jaxcrystal.interface.pictures import Pictures, picture
from jaxcrystal.interface.questions import Question
from jaxcrystal.interface.tables import SHOWN, html_table
from jaxcrystal.report import plots
from jaxcrystal.sampling.attempts_table import write_whole
from jaxcrystal.sampling.infilling import Answer

FIRST = 5  #: elements that are shown of a crystal
PRINTED = 5  #: crystals
LEAST = 5e-4  #: probability of an element that a picture shows
TABLES = (".parquet", ".csv")

_STYLE = (
    ".elements text {font-family: sans-serif; text-anchor: middle; fill: #30343c} .elements .cell {fill: #eef0f4} "
    ".elements .heat {fill: #2563b8} .elements .cell-text {font-size: 14px; font-weight: 600} "
    ".elements .small {font-size: 9.5px; font-weight: 400} .elements .strong {fill: white} "
    ".elements .absent {fill: #9aa0ab; font-weight: 400} .elements .title {font-size: 14px; text-anchor: start}"
)


@dataclass(frozen=True, eq=False, repr=False)
class Infilled:
    """Answers to questions, a crystal each, in their order: a table, the likeliest elements, pictures."""

    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, which: int | str | slice) -> Infilled:
        """One crystal by its number or id (the first of that id; KeyError if there is none), or a slice of them."""
        if isinstance(which, str):
            ids = [question.id for question in self.questions]
            if which not in ids:
                raise KeyError(which)
            which = ids.index(which)
        if isinstance(which, int):
            return Infilled((self.questions[which],), (self.answers[which],))
        return Infilled(self.questions[which], self.answers[which])

    @property
    def outside(self) -> pd.Series:
        """Of each crystal by its id, the probability of all that is no element."""
        ids = [question.id for question in self.questions]
        return pd.Series([answer.outside for answer in self.answers], ids, name="outside")

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each crystal and element that is allowed, the likeliest first.

        `id`, `row` (in the source), `formula`; `masked`, the element that was there, and its `atoms` that are masked;
        `element`; `probability`, among the elements that are allowed; `log_probability`, in nats, of the element's
        tokens and the end among all texts; `rank`, from 1; `outside`, the probability of all that is no element.
        """
        parts = []
        for question, answer in zip(self.questions, self.answers, strict=True):
            allowed = np.array([ELEMENTS.index(symbol) for symbol in question.allowed])
            logs = answer.log_probabilities[allowed - 1]
            order = np.argsort(-logs, kind="stable")
            weights = np.exp(logs[order] - logs[order][0])
            parts.append(
                pd.DataFrame(
                    {
                        "id": question.id,
                        "row": question.row,
                        "formula": spelled(question.crystal.formula),
                        "masked": question.masked.element,
                        "atoms": question.masked.atoms,
                        "element": [ELEMENTS[z] for z in allowed[order]],
                        "probability": weights / weights.sum(),
                        "log_probability": logs[order],
                        "rank": np.arange(1, len(order) + 1),
                        "outside": answer.outside,
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def best(self, count: int) -> pd.DataFrame:
        """The rows of so many elements of each crystal, the likeliest."""
        return self.table[self.table["rank"] <= count].reset_index(drop=True)

    @property
    def own(self) -> pd.DataFrame:
        """The row of each crystal's own element, where that is allowed: its `rank` says how well it is guessed."""
        return self.table[self.table["element"] == self.table["masked"]].reset_index(drop=True)

    def picture(self, which: int | str = 0) -> Pictures:
        """The periodic table for one crystal, by its number or id: darker where an element is likelier."""
        one = self[which]
        (question,) = one.questions
        likely = one.table[one.table["probability"] >= LEAST]
        drawn = plots.periodic_table(
            dict(zip(likely["element"], likely["probability"], strict=True)),
            f"elements in place of {question.masked.element} in {question.name}",
            said=lambda p: _percent(p) if p else f"below {_percent(LEAST)}, or not allowed",
            written=lambda p: f"{100 * p:.1f}",
        )
        width, height = 737, 395
        title = f'<text class="title" x="90" y="22">{escape(_title(question))}</text>'
        inner = drawn.replace("<svg ", f'<svg x="8" y="8" width="{width - 16}" height="{height - 16}" ', 1)
        return Pictures(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="white"/>'
            f'<g class="elements">{inner}{title}</g></svg>'
        )

    def write(self, out: str | PathLike[str]) -> list[Path]:
        """Writes the table and a page that shows it: to elements.parquet and elements.html in the folder `out`, or to
        x.csv (or x.parquet) and x.html. Their paths; raises UserError for what the disk refuses.
        """
        table = table_of(out)
        page = table.with_suffix(".html")
        try:
            table.parent.mkdir(parents=True, exist_ok=True)
            write = self.table.to_csv if table.suffix == ".csv" else self.table.to_parquet
            write_whole(table, lambda path: write(path, index=False))
            write_whole(page, lambda path: path.write_text(self._page(), encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}; choose another output") from None
        return [table, page]

    def _page(self) -> str:
        pictures = "".join(self.picture(i).svg for i in range(min(len(self), SHOWN)))
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Elements</title><style>'
            "body {margin: 2em; font-family: sans-serif} td, th {padding: 4px 12px} svg {max-width: 100%}"
            f"</style></head><body>{self._html()}{pictures}</body></html>\n"
        )

    def _repr_html_(self) -> str:
        return self._html() + self.picture(0).svg

    def _html(self) -> str:
        cells = []
        for i, question in enumerate(self.questions[:SHOWN]):
            cells.append(
                [
                    picture(question.crystal.to_structure()),
                    escape(question.id),
                    question.crystal.formula_html,
                    question.masked.element,
                    str(question.masked.atoms),
                    _percent(self.answers[i].outside),
                    escape(_likeliest(self[i].best(FIRST))),
                ]
            )
        heads = ["", "id", "formula", "masked", "atoms", "no element", "likeliest in its place"]
        return html_table(self._summary(), heads, cells, len(self))

    def _summary(self) -> str:
        ranks = self.own["rank"]
        known = (
            f"; the element that was there is the likeliest in {(ranks == 1).sum()}, among the first {FIRST} in "
            f"{(ranks <= FIRST).sum()}"
        )
        return f"{len(self)} crystal{'s' * (len(self) != 1)}{known if len(ranks) else ''}"

    def __str__(self) -> str:
        lines = [self._summary()]
        for i, question in enumerate(self.questions[:PRINTED]):
            outside = _percent(self.answers[i].outside)
            lines.append(f"{_title(question)}: {_likeliest(self[i].best(FIRST))}; no element {outside}")
        more = len(self) - PRINTED
        return "\n".join([*lines, *([f"… and {more:,} more"] if more > 0 else [])])

    def __repr__(self) -> str:
        return f"<Infilled: {self._summary()}>"


def table_of(out: str | PathLike[str]) -> Path:
    """Where the table lies of what is written to `out`."""
    return Path(out) if Path(out).suffix in TABLES else Path(out) / "elements.parquet"


def _title(question: Question) -> str:
    masked = question.masked
    where = f" at {masked.atoms} of its sites" if masked.elsewhere else ""
    return f"{question.name}, {masked.element} masked{where}"


def _likeliest(rows: pd.DataFrame) -> str:
    return ", ".join(f"{row.element} {_percent(row.probability)}" for row in rows.itertuples())


def _percent(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= LEAST else f"{100 * p:.1g} %"
