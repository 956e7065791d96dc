"""`report.html`: one page that shows what a set of crystals is worth, and needs nothing but itself.

The page is `report.html` beside this file, with `{{names}}` where the sections of this module go.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.evaluate import plots
from jaxcrystal.evaluate.drawing import draw
from jaxcrystal.evaluate.metrics import METASTABLE, metastable_rows, stable_rows
from jaxcrystal.evaluate.samples import PARSED
from jaxcrystal.evaluate.table import SYMPREC

if TYPE_CHECKING:
    from pymatgen.core import Structure

GALLERY = 6  #: crystals that are drawn
SPACE_GROUPS = 12  #: most frequent ones that are listed
#: A conventional cell of more atoms is too crowded to be read as a picture; the cell as it stands is drawn instead.
DRAWN_ATOMS = 40

_LEGEND = '<p class="legend"><i class="is-bar"></i>these crystals<i class="is-reference"></i>reference</p>'

_HEADLINES = {
    "stability.metastable_rate": ("Metastable", "less than 0.1 eV/atom above the hull"),
    "stability.stable_rate": ("Stable", "on the hull or below it"),
    "sun.rate": ("Stable, unique, novel", "all three at once"),
    "sun.metastable_rate": ("Metastable, unique, novel", "all three at once"),
    "validity.both": ("Valid", "in structure and composition"),
    "validity.structural": ("Valid structure", "atoms keep their distance"),
    "validity.compositional": ("Valid composition", "charges can balance"),
    "uniqueness.rate": ("Unique", "distinct, structurally valid crystals"),
    "novelty.by_matching": ("Novel", "valid, and in no training crystal's likeness"),
}


def write(
    path: Path, table: pd.DataFrame, metrics: dict[str, Any], *, title: str, reference: pd.DataFrame | None = None
) -> None:
    """Writes the page of a table of attempts and its metrics; `reference` is a table to compare distributions with."""
    sections = {
        "title": escape(title),
        "subtitle": _subtitle(metrics),
        "headlines": _headlines(metrics),
        "funnel": plots.bars(funnel(table), len(table), "attempts that passed each step and all before it"),
        "gallery": _gallery(table),
        "gallery_note": (
            "The unique, valid crystals of lowest energy above the hull, as relaxed, in their conventional cells. One "
            "below it beats the mixtures of the phases that the hull was given, not of all that exist."
            if "e_above_hull" in table
            else "The first unique, valid crystals, in their conventional cells."
        ),
        "histograms": _histograms(table, reference),
        "legend": "" if reference is None else _LEGEND,
        "elements": _elements(table),
        "spacegroups": _spacegroups(table),
        "failures": _failures(table),
        "columns": _json(_columns(table)),
        "rows": _json(_rows(table)),
        "versions": "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in metrics["versions"].items()),
    }
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda match: sections[match[1]], template), encoding="utf-8")


def funnel(table: pd.DataFrame) -> list[tuple[str, int]]:
    """Names of the evaluation's steps, each with how many attempts passed it and all before it."""
    steps = [
        ("attempts", pd.Series(True, table.index)),
        ("parsed", table["outcome"].isin(PARSED)),
        ("valid", table["structural_valid"] & table["compositional_valid"]),
        ("unique", table["unique"]),
    ]
    if "novel" in table:
        steps.append(("novel", table["novel"]))
    if "relaxation" in table:
        steps.append(("relaxed", table["energy_per_atom"].notna()))
    if "e_above_hull" in table:
        steps += [("metastable", metastable_rows(table)), ("stable", stable_rows(table))]
    passed, counts = pd.Series(True, table.index), []
    for name, mask in steps:
        passed = passed & mask
        counts.append((name, int(passed.sum())))
    return counts


def status(row: Any) -> tuple[str, str]:
    """One word for what became of an attempt (a row of the table), and why."""
    if row.outcome != "ok":
        return row.outcome, row.reason
    if not row.structural_valid:
        return "invalid", row.invalid_because
    remark = row.invalid_because if not row.compositional_valid else "" if row.unique else f"same as group {row.group}"
    if pd.notna(distance := getattr(row, "e_above_hull", None)):
        return ("stable" if distance <= 0 else "metastable" if distance < METASTABLE else "unstable"), remark
    if hasattr(row, "relaxation"):
        return row.relaxation, row.relaxation_reason or remark
    if not row.compositional_valid:
        return "unbalanced", remark
    return ("valid" if row.unique else "duplicate"), remark


def _subtitle(metrics: dict[str, Any]) -> str:
    stability = metrics.get("stability", {})
    parts = [f"{metrics['counts']['attempts']:,} attempts", f"protocol <b>{escape(metrics['protocol'])}</b>"]
    parts += [f"{name} <b>{escape(stability[name])}</b>" for name in ("potential", "hull") if stability.get(name)]
    return " · ".join(parts)


def _headlines(metrics: dict[str, Any]) -> str:
    tiles = []
    for name, (title, meaning) in _HEADLINES.items():
        if name in metrics["confidence_95"]:
            section, key = name.split(".")
            value, (low, high) = metrics[section][key], metrics["confidence_95"][name]
            tiles.append(
                f'<div class="tile"><h3>{title}</h3><p class="number">{100 * value:.1f}<small>%</small></p>'
                f"{plots.interval(low, high, value)}"
                f'<p class="note">{100 * low:.1f} to {100 * high:.1f} % · {meaning}</p></div>'
            )
    return "".join(tiles)


def _gallery(table: pd.DataFrame) -> str:
    from pymatgen.core import Structure

    best = table[table["structural_valid"] & table["compositional_valid"] & table["unique"]]
    if "e_above_hull" in best:
        best = best[best["e_above_hull"].notna()].sort_values("e_above_hull", kind="stable")
    figures = []
    for place, row in enumerate(best.head(GALLERY).itertuples()):
        relaxed = getattr(row, "relaxed_cif", None)
        structure, number = _conventional(Structure.from_str(relaxed or row.cif, fmt="cif"))
        distance = getattr(row, "e_above_hull", None)
        note = "" if pd.isna(distance) else f"<br>{distance:+.3f} eV/atom".replace("-", "−")
        figures.append(
            f"<figure>{draw(structure, prefix=f'crystal{place}')}<figcaption><b>{_formula(row.formula)}</b>"
            f"<span>{_symbol(number)} · no. {escape(row.id)}{note}</span></figcaption></figure>"
        )
    return "".join(figures) or '<p class="note">No attempt got far enough to be drawn.</p>'


def _conventional(structure: Structure) -> tuple[Structure, int | None]:
    """The conventional cell, which shows symmetry best, and its space group; the cell as it is if that is crowded."""
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer, SymmetryUndeterminedError

    try:
        symmetry = SpacegroupAnalyzer(structure, symprec=SYMPREC)
        conventional = symmetry.get_conventional_standard_structure()
    except (SymmetryUndeterminedError, ValueError, TypeError):
        return structure, None
    return conventional if len(conventional) <= DRAWN_ATOMS else structure, symmetry.get_space_group_number()


def _histograms(table: pd.DataFrame, reference: pd.DataFrame | None) -> str:
    def numbers(source: pd.DataFrame | None, *columns: str) -> Float[np.ndarray, "n"] | None:
        if source is None or columns[0] not in source:
            return None
        source = source[source["structural_valid"]]
        return np.concatenate([source[column].dropna().to_numpy(np.float64) for column in columns])

    charts = []
    for label, columns, options in (
        ("energy above the hull, eV/atom", ["e_above_hull"], {"marks": {"hull": 0.0, "metastable": METASTABLE}}),
        ("density, g/cm³", ["density"], {}),
        ("atoms in the cell", ["num_atoms"], {"whole": True}),
        ("lengths a, b, c, Å", ["a", "b", "c"], {}),
        ("angles α, β, γ, degrees", ["alpha", "beta", "gamma"], {}),
        ("volume per atom, Å³", ["volume_per_atom"], {}),
    ):
        values = numbers(_with_volume(table), *columns)
        if values is not None and len(values):
            chart = plots.histogram(values, numbers(_with_volume(reference), *columns), label=label, **options)
            charts.append(f'<div class="chart">{chart}</div>')
    return "".join(charts) or '<p class="note">No attempt is a structurally valid crystal.</p>'


def _with_volume(table: pd.DataFrame | None) -> pd.DataFrame | None:
    return None if table is None else table.assign(volume_per_atom=table["volume"] / table["num_atoms"])


def _elements(table: pd.DataFrame) -> str:
    systems = table["chemical_system"].dropna()
    return plots.periodic_table(Counter(symbol for system in systems for symbol in system.split("-")), "elements")


def _spacegroups(table: pd.DataFrame) -> str:
    groups = table["spacegroup"].dropna()
    frequent = [(_symbol(number, plain=True), int(n)) for number, n in groups.value_counts().head(SPACE_GROUPS).items()]
    return plots.bars(frequent, len(table), "space groups") if frequent else '<p class="note">None was found.</p>'


def _failures(table: pd.DataFrame) -> str:
    """What failed at which step, how often, and one example."""
    kinds: list[tuple[str, str, pd.DataFrame, str]] = []
    for outcome, rows in table[table["outcome"] != "ok"].groupby("outcome"):
        kinds.append(("reading", str(outcome), rows, "reason"))
    built = table[table["outcome"] == "ok"]
    for step in ("structural", "compositional"):
        rows = built[~built[f"{step}_valid"]]
        if len(rows):
            kinds.append(("validity", f"{step}ly invalid", rows, "invalid_because"))
    if "relaxation" in table:
        sent = built[built["structural_valid"] & (built["relaxation_reason"] != "")]
        for outcome, rows in sent.groupby("relaxation"):
            kinds.append(("relaxation", str(outcome).replace("_", " "), rows, "relaxation_reason"))
    if not kinds:
        return '<p class="note">Nothing failed.</p>'
    lines = [
        f"<tr><td>{step}</td><td>{escape(kind)}</td><td class='right'>{len(rows):,}</td>"
        f"<td class='why'>no. {escape(rows.iloc[0]['id'])}: {escape(rows.iloc[0][column])}</td></tr>"
        for step, kind, rows, column in kinds
    ]
    head = "<tr><th>step</th><th>outcome</th><th class='right'>attempts</th><th>for example</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _columns(table: pd.DataFrame) -> list[list[Any]]:
    """Heading, kind and, of numbers, decimals of each column of the page's table."""
    columns: list[list[Any]] = [["no.", "text"], ["formula", "formula"], ["status", "status"]]
    if "e_above_hull" in table:
        columns.append(["eV/atom above hull", "number", 3])
    return [*columns, ["space group", "number", 0], ["atoms", "number", 0], ["g/cm³", "number", 2], ["why", "why"]]


def _rows(table: pd.DataFrame) -> list[list[Any]]:
    """The cells of `_columns`, row by row; a missing number is null."""

    def number(value: Any, digits: int) -> float | None:
        return None if pd.isna(value) else round(float(value), digits)

    rows = []
    for row in table.itertuples():
        word, why = status(row)
        distance = [number(row.e_above_hull, 3)] if "e_above_hull" in table else []
        measures = [number(row.spacegroup, 0), number(row.num_atoms, 0), number(row.density, 2)]
        rows.append([row.id, row.formula, word, *distance, *measures, why])
    return rows


def _symbol(number: Any, plain: bool = False) -> str:
    """The short Hermann-Mauguin symbol, as HTML or as plain text with the number behind it."""
    if pd.isna(number):
        return "no space group found"
    symbol = _symbols()[int(number)]
    if plain:
        return f"{symbol} ({number})"
    return re.sub(r"-(\d)", r'<span class="over">\1</span>', re.sub(r"_(\d)", r"<sub>\1</sub>", symbol))


@cache
def _symbols() -> dict[int, str]:
    """Symbols of the 230 space groups, in the first of spglib's 530 settings of each."""
    import spglib

    kinds = [spglib.get_spacegroup_type(hall) for hall in range(530, 0, -1)]
    return {kind.number: kind.international_short for kind in kinds}


def _formula(formula: str) -> str:
    return re.sub(r"(\d+)", r"<sub>\1</sub>", escape(formula))


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
