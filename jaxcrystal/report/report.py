"""`report.html`: one page that shows what a set of crystals is worth, and needs nothing but itself.

The page is made of the files that `jaxcrystal evaluate` leaves in a folder (`evaluation/results.py`), and of nothing
else: `jaxcrystal report DIR` writes it again. Its frame is `page/report.html`, with `{{names}}` where the sections of
this module, its style and its scripts go. Its data stand in it as JSON, which the scripts put in as text only: ids and
reasons are strangers' words. The page's own security policy forbids every connection, and every script but the one
whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.likelihoods import PER_TOKEN
from jaxcrystal.evaluation.metrics import METASTABLE, metastable_rows, stable_rows
from jaxcrystal.evaluation.protocols import protocol_named
from jaxcrystal.evaluation.results import Results, nearest_training, read
from jaxcrystal.reader.inputs import Input
from jaxcrystal.reader.reading import crystal_from_cif
from jaxcrystal.reader.rows import PARSED
from jaxcrystal.report import packed, plots
from jaxcrystal.report.drawing import colour, conventional, draw
from jaxcrystal.report.quantities import SECTIONS, Measured, measured

GALLERY = 6  #: crystals that are drawn
SPACE_GROUPS = 12  #: most frequent ones that are listed

#: Bytes of crystals that a page holds; base64 makes 10 MB of them. 10,000 of MP-20's size, sampled, relaxed and with
#: their nearest training crystals, take 3 MB.
MOST_BYTES = 7_500_000

#: Columns without which there is no page; whatever else is in the tables is shown if it is there.
_NEEDED = {
    "structures": "id outcome reason structural_valid compositional_valid invalid_because unique group formula "
    "chemical_system num_elements num_atoms spacegroup a b c alpha beta gamma volume density cif".split(),
    "reference": "structural_valid num_atoms volume".split(),
}

#: Outcomes of a relaxation that ended with an energy to place beside the hull.
_RELAXED = ("converged", "not_converged")

#: Of the page's scripts, in the order in which each needs those before it.
_SCRIPTS = ("crystal.js", "viewer.js", "page.js")

_LEGEND = '<p class="legend"><i class="is-bar"></i>these crystals<i class="is-reference"></i>reference</p>'


def write(out: Path) -> Path:
    """Writes `report.html` to the folder of an evaluation, of what lies there alone; its path.

    The same files make the same page, byte for byte. Raises UserError if the folder is not one that
    `jaxcrystal evaluate` wrote, or cannot be written.
    """
    results = read(out)
    for name, table in (("structures", results.table), ("reference", results.reference)):
        if table is not None and (lacking := [column for column in _NEEDED[name] if column not in table]):
            raise UserError(f"{out / name}.parquet has no column {', '.join(lacking)}: evaluate the crystals again")
    path = out / "report.html"
    try:
        # The script's hash is that of lines that end in \n.
        path.write_text(page(results), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def page(results: Results) -> str:
    """The page of what an evaluation found."""
    table, metrics, reference = results.table, results.metrics, results.reference
    numbers = list(measured(metrics))
    data, left_out = _data(table, results.training or {})
    script = "".join(_file(name) for name in _SCRIPTS)
    sections = {
        "title": escape(results.samples),
        "subtitle": _subtitle(metrics),
        "style": _file("report.css"),
        "headlines": _headlines(numbers),
        "numbers": _numbers(numbers),
        "funnel": plots.bars(funnel(table), len(table), "attempts that passed each step and all before it"),
        "gallery": _gallery(table),
        "gallery_note": _gallery_note(table),
        "histograms": _histograms(table, reference),
        "legend": "" if reference is None else _LEGEND,
        "elements": _elements(table),
        "spacegroups": _spacegroups(table),
        "failures": _failures(table),
        "embedded_note": f" {left_out:,} crystals are too many for this page and not drawn." if left_out else "",
        "widths": "".join(f'<col width="{_WIDTHS.get(kind, "")}">' for _, kind, *_ in data["columns"]),
        "versions": "".join(
            f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>"
            for k, v in [*metrics["versions"].items(), *_inputs(metrics), *_note(metrics)]
        ),
        "data": _json(data),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: sections[match[1]], _file("report.html"))


def funnel(table: pd.DataFrame) -> list[tuple[str, int]]:
    """Names of the evaluation's steps, each with how many attempts passed it and all before it."""
    steps = [
        ("attempts", pd.Series(True, table.index)),
        ("parsed", table["outcome"].isin(PARSED)),
        ("valid", table["structural_valid"] & table["compositional_valid"]),
    ]
    if "relaxation" in table:
        steps.append(("relaxed", table["energy_per_atom"].notna()))
    steps.append(("unique", table[_alike("unique", table)]))
    if "novel" in table:
        steps.append(("novel", table[_alike("novel", table)]))
    if "e_above_hull" in table:
        steps += [("metastable", metastable_rows(table)), ("stable", stable_rows(table))]
    passed, counts = pd.Series(True, table.index), []
    for name, mask in steps:
        passed = passed & mask
        counts.append((name, int(passed.sum())))
    return counts


def _alike(name: str, table: pd.DataFrame) -> str:
    """The column `group`, `unique` or `novel` of the relaxed crystals where there are any, else of those sampled."""
    return f"{name}_relaxed" if f"{name}_relaxed" in table else name


def statuses(table: pd.DataFrame) -> list[tuple[str, str]]:
    """For each attempt one word for what became of it, and why."""
    placed = "e_above_hull" in table
    never = pd.Series(False, table.index)
    near, on = (metastable_rows(table), stable_rows(table)) if placed else (never, never)
    group, unique = (_alike(name, table) for name in ("group", "unique"))
    found = []
    for row, metastable, stable in zip(table.itertuples(), near, on, strict=True):
        unbalanced = "" if row.compositional_valid else row.invalid_because
        repeats = not getattr(row, unique) and pd.notna(getattr(row, group))
        remark = unbalanced or (f"same as group {getattr(row, group)}" if repeats else "")
        relaxation = getattr(row, "relaxation", None)
        if row.outcome != "ok":
            found.append((row.outcome, row.reason))
        elif not row.structural_valid:
            found.append(("invalid", row.invalid_because))
        elif stable or metastable:
            found.append(("stable" if stable else "metastable", remark))
        elif placed and relaxation in _RELAXED and pd.notna(row.e_above_hull):
            found.append(("unstable", remark))
        elif relaxation is not None:  # whatever else the relaxation, or the place beside the hull, came to
            found.append((relaxation, row.relaxation_reason or remark))
        elif unbalanced:
            found.append(("unbalanced", remark))
        else:
            found.append(("duplicate" if repeats else "valid", remark))
    return found


def _subtitle(metrics: dict[str, Any]) -> str:
    stability = metrics.get("stability", {})
    parts = [f"{metrics['counts']['attempts']:,} attempts", f"protocol <b>{escape(metrics['protocol'])}</b>"]
    parts += [f"{name} <b>{escape(stability[name])}</b>" for name in ("potential", "hull") if stability.get(name)]
    return " · ".join(parts)


def _inputs(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of each input of which something was left out, what it is and what was left out."""
    inputs = {role: Input(**counted) for role, counted in metrics.get("inputs", {}).items()}
    return [
        (f"rows of {role}", counted.sentence) for role, counted in inputs.items() if counted.left_out or counted.unread
    ]


def _note(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What of the protocol is not counted, if anything."""
    note = protocol_named(metrics["protocol"]).note
    return [("protocol", note)] if note else []


def _headlines(numbers: list[Measured]) -> str:
    tiles = []
    for number in numbers:
        if number.quantity.headline and number.interval is not None:
            (low, high), quantity = number.interval, number.quantity
            tiles.append(
                f'<div class="tile"><h3>{quantity.title}</h3>'
                f'<p class="number">{quantity.write(number.value)}<small>%</small></p>'
                f"{plots.interval(low, high, number.value)}"
                f'<p class="note">{quantity.write_interval(low, high)} · {quantity.meaning}</p></div>'
            )
    # Rows of equal length, of at most six.
    columns = math.ceil(len(tiles) / math.ceil(len(tiles) / 6)) if tiles else 1
    return f'<div class="tiles" style="--columns:{columns}">{"".join(tiles)}</div>'


def _numbers(numbers: list[Measured]) -> str:
    """Every number, with its interval where it has one."""
    lines, section = [], None
    for number in numbers:
        quantity = number.quantity
        if quantity.section != section:
            section = quantity.section
            lines.append(f'<tr class="group"><th colspan="4">{escape(SECTIONS.get(section, section))}</th></tr>')
        picture, written = "", "no interval"
        if number.interval is not None:
            written = quantity.write_interval(*number.interval)
            picture = plots.interval(*number.interval, number.value) if quantity.is_rate else ""
        lines.append(
            f"<tr><td><b>{escape(quantity.title)}</b><span>{quantity.meaning}</span></td>"
            f'<td class="right">{quantity.write(number.value)} {quantity.unit}</td>'
            f'<td class="line">{picture}</td><td class="wide">{written}</td></tr>'
        )
    return f'<table class="numbers">{"".join(lines)}</table>'


def _gallery_note(table: pd.DataFrame) -> str:
    if "e_above_hull" in table:
        which = (
            "The unique, valid crystals of lowest energy above the hull, as relaxed, in their conventional cells. One "
            "below it beats the mixtures of the phases that the hull was given, not of all that exist."
        )
    else:
        which = "The first unique, valid crystals, in their conventional cells."
    return f"{which} Select one to turn it."


def _gallery(table: pd.DataFrame) -> str:
    best = table[table["structural_valid"] & table["compositional_valid"] & table[_alike("unique", table)]]
    if "e_above_hull" in best:
        best = best[best["e_above_hull"].notna() & best["relaxation"].isin(_RELAXED)].sort_values(
            "e_above_hull", kind="stable"
        )
    figures = []
    for place, row in enumerate(best.head(GALLERY).itertuples()):
        relaxed = getattr(row, "relaxed_cif", None)
        crystal = crystal_from_cif(relaxed if isinstance(relaxed, str) else row.cif)
        structure, number = conventional(crystal.to_structure())
        at = table.index.get_loc(row.Index)
        distance = getattr(row, "e_above_hull", None)
        note = "" if pd.isna(distance) else f"<br>{distance:+.3f} eV/atom".replace("-", "−")
        figures.append(
            f'<figure><button type="button" data-row="{at}">{draw(structure, prefix=f"crystal{place}")}'
            f"<figcaption><b>{_formula(row.formula)}</b>"
            f"<span>{_symbol(number)} · no. {escape(row.id)}{note}</span></figcaption></button></figure>"
        )
    return "".join(figures) or '<p class="note">No attempt got far enough to be drawn.</p>'


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
        ("elements in a crystal", ["num_elements"], {"whole": True}),
        ("displacement in relaxation, Å", ["rmsd"], {}),
        ("change of volume in relaxation", ["volume_change"], {}),
    ):
        values = numbers(_with_volume(table), *columns)
        if values is not None and len(values):
            chart = plots.histogram(values, numbers(_with_volume(reference), *columns), label=label, **options)
            charts.append(f'<div class="chart">{chart}</div>')
    if PER_TOKEN in table and "e_above_hull" in table:
        both = table[[PER_TOKEN, "e_above_hull"]].dropna().to_numpy(np.float64)
        if len(both):
            drawn = plots.scatter(-both[:, 0], both[:, 1], label="nats a token", above="energy above the hull, eV/atom")
            charts.append(f'<div class="chart">{drawn}</div>')
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


#: px, by kind of column; `why` has the rest. `relaxed` is a number of the relaxed crystal, `number` of the sampled one.
_WIDTHS = {
    "text": 84,
    "formula": 150,
    "status": 126,
    "relaxed": 172,
    "number": 96,
    "group": 104,
}


def _columns(table: pd.DataFrame) -> list[list[Any]]:
    """Heading, kind and, of numbers, decimals of each column of the page's table."""
    columns: list[list[Any]] = [["no.", "text"], ["formula", "formula"], ["status", "status"]]
    if "e_above_hull" in table:
        columns.append(["above hull, eV/atom", "relaxed", 3])
    if "competing_phases" in table:
        columns.append(["competing phases", "relaxed", 0])
    if PER_TOKEN in table:
        columns.append(["nats/token", "number", 2])
    measures = [["space group", "group"], ["group no.", "number", 0], ["atoms", "number", 0], ["g/cm³", "number", 2]]
    return [*columns, *measures, ["why", "why"]]


def _rows(table: pd.DataFrame) -> list[list[Any]]:
    """The cells of `_columns`, row by row; a missing number is null."""
    rows = []
    for row, (word, why) in zip(table.itertuples(), statuses(table), strict=True):
        placed = [_number(row.e_above_hull, 3)] if "e_above_hull" in table else []
        if "competing_phases" in table:
            placed.append(_number(row.competing_phases, 0))
        if PER_TOKEN in table:
            placed.append(_number(-getattr(row, PER_TOKEN), 2))
        symbol = None if pd.isna(row.spacegroup) else _symbols()[int(row.spacegroup)]
        measures = [symbol, _number(row.spacegroup, 0), _number(row.num_atoms, 0), _number(row.density, 2)]
        formula = None if pd.isna(row.formula) else row.formula
        rows.append([row.id, formula, word, *placed, *measures, why])
    return rows


def _number(value: Any, digits: int) -> float | int | None:
    if pd.isna(value):
        return None
    return round(float(value), digits) if digits else round(value)


def _data(table: pd.DataFrame, training: Mapping[str, Crystal]) -> tuple[dict[str, Any], int]:
    """What the page's scripts read, and how many crystals found no room in it.

    `views` says of each row where in `structures` its crystal is as sampled, as relaxed, and its nearest training
    crystal (-1: nowhere); `neighbours` the latter's id, whether it is the same crystal, and, where they are known, the
    distances of the nearest structure's and the nearest composition's fingerprint.
    """
    crystals: list[Crystal] = []
    room, left_out = MOST_BYTES, 0
    places: dict[str, int] = {}

    def place(crystal: Crystal | None) -> int:
        nonlocal room, left_out
        if crystal is None:
            return -1
        if len(crystal) > packed.MOST_ATOMS or packed.size(crystal) > room:
            left_out += 1
            return -1
        room -= packed.size(crystal)
        crystals.append(crystal)
        return len(crystals) - 1

    views, neighbours = [], []
    for row, neighbour in zip(table.itertuples(), nearest_training(table), strict=True):
        sampled = place(crystal_from_cif(row.cif) if row.outcome == "ok" else None)
        relaxed_cif = getattr(row, "relaxed_cif", None)
        relaxed = place(crystal_from_cif(relaxed_cif) if isinstance(relaxed_cif, str) else None)
        if neighbour is not None and neighbour not in places:
            places[neighbour] = place(training.get(neighbour))
        views.append([sampled, relaxed, places.get(neighbour, -1)])
        distances = [_number(getattr(row, f"train_{kind}_distance", None), 4) for kind in ("structure", "composition")]
        same = any(pd.notna(getattr(row, f"known_as{which}", None)) for which in ("", "_relaxed"))
        neighbours.append(None if neighbour is None else [neighbour, same, *distances])
    data = {
        "columns": _columns(table),
        "rows": _rows(table),
        "views": views,
        "neighbours": neighbours,
        "trained": "known_as" in table,
        "nearest": "train_nearest" in table,
        "elements": _palette({int(z) for crystal in crystals for z in crystal.species}),
        "structures": packed.pack(crystals),
    }
    return data, left_out


def _palette(elements: set[int]) -> dict[int, tuple[str, str, float]]:
    """Symbol, Jmol's colour and covalent radius (Å) by atomic number."""
    from ase.data import covalent_radii

    return {z: (ELEMENTS[z], colour(z), round(float(covalent_radii[z]), 2)) for z in sorted(elements)}


def _file(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


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
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
