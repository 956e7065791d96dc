"""Whether attempts are what was asked for.

A ledger says of each attempt what was asked (`asked`) and what of it the grammar saw to (`forced`). Attempts of which
the same attributes were asked are a group, `formula+spacegroup`, and of each group are told

    conditions.formula+spacegroup.spacegroup.met_rate    the share of its attempts that meet it
    conditions.formula+spacegroup.formula.forced_rate    the same where the grammar forced it, and says nothing of the
                                                         model
    conditions.formula+spacegroup.all.met_rate           all at once, of those that can be judged
    ….base_rate                                          the share of crystals for which nothing was asked that would
                                                         meet the same wishes, taken over the wishes of the group

A wish for a range is met within it, one for an energy within `TOLERANCE` of it, one for a property of one's own within
`SHARE` of it, or word for word. An attempt that is no crystal meets nothing, nor does one that was not relaxed where
that is needed. Band gaps have no judge, and properties the one that is given (`own_judges`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from jaxcrystal.config import ATTRIBUTES
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import bootstrap_mean, wilson
from jaxcrystal.evaluation.own_judges import column
from jaxcrystal.evaluation.results import Results

TOLERANCE = 0.05  #: eV/atom, of an energy that was asked for as one value
SHARE = 0.05  #: of a property that was asked for as one value

#: What is asked for, by attribute: as these numbers call it.
NAMES = {
    "pretty_formula": "formula",
    "elements": "elements",
    "num_atoms": "num_atoms",
    "spacegroup.number": "spacegroup",
    "formation_energy_per_atom": "formation_energy",
    "e_above_hull": "e_above_hull",
    "band_gap": "band_gap",
}
GROUP = "spacegroup.number"

Judge = Callable[[Any, pd.DataFrame], "Bool[np.ndarray, 'attempts']"]


def _within(column: str, tolerance: float = 0.0, least: float = -np.inf) -> Judge:
    """Within the range, or the tolerance of the value; values below `least` count as that."""

    def judge(wanted: Any, table: pd.DataFrame) -> Bool[np.ndarray, "attempts"]:
        values = table[column].to_numpy(np.float64, na_value=np.nan).clip(least)
        low, high = wanted if isinstance(wanted, list) else (wanted - tolerance, wanted + tolerance)
        return (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))

    return judge


def _formula(wanted: Any, table: pd.DataFrame) -> Bool[np.ndarray, "attempts"]:
    return table["formula"].eq(wanted).to_numpy(bool, na_value=False)


def _elements(wanted: Any, table: pd.DataFrame) -> Bool[np.ndarray, "attempts"]:
    return table["chemical_system"].eq("-".join(sorted(wanted))).to_numpy(bool, na_value=False)


def _property(place: str) -> Judge:
    def judge(wanted: Any, table: pd.DataFrame) -> Bool[np.ndarray, "attempts"]:
        if isinstance(wanted, str):
            return table[place].eq(wanted).to_numpy(bool, na_value=False)
        tolerance = 0.0 if isinstance(wanted, list) else SHARE * abs(wanted)
        return _within(place, tolerance)(wanted, table)

    return judge


#: By attribute, and the name of what is told: the column that is judged, and how. A crystal below the hull is on it, as
#: labels have it.
_JUDGES: dict[str, dict[str, tuple[str, Judge]]] = {
    "pretty_formula": {"formula": ("formula", _formula)},
    "elements": {"elements": ("chemical_system", _elements)},
    "num_atoms": {"num_atoms": ("num_atoms", _within("num_atoms"))},
    GROUP: {
        "spacegroup": ("spacegroup", _within("spacegroup")),
        "spacegroup_relaxed": ("spacegroup_relaxed", _within("spacegroup_relaxed")),
    },
    "formation_energy_per_atom": {
        "formation_energy": ("formation_energy_per_atom", _within("formation_energy_per_atom", TOLERANCE))
    },
    "e_above_hull": {"e_above_hull": ("e_above_hull", _within("e_above_hull", TOLERANCE, least=0.0))},
}

Numbers = dict[str, float]
Intervals = dict[str, tuple[float, float]]


def comparable(unconditional: Results, table: pd.DataFrame, versions: Mapping[str, str]) -> pd.DataFrame:
    """The table of crystals for which nothing was asked, where those of `table` can be compared with them.

    Raises UserError if nothing was asked for these either, or the others were judged otherwise.
    """
    if not any(asked_of(table)):
        raise UserError("nothing was asked for these samples, so that there is nothing to find in unconditional ones")
    if any(asked_of(unconditional.table)):
        raise UserError(f"{unconditional.samples} has attempts for which something was asked: evaluate others")
    judges = [name for name in versions if name.startswith("judge of ")]
    for what in ("space groups", "potential", "relaxation", "hull", *judges):
        theirs = unconditional.metrics["versions"].get(what)
        if what in versions and theirs != versions[what]:
            raise UserError(f"{what} of the unconditional samples: {theirs or 'none'}; of these: {versions[what]}")
    return unconditional.table


def asked_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What was asked of each attempt, by attribute; nothing where the table does not say."""
    return [json.loads(text) if text else {} for text in table["asked"]] if "asked" in table else [{}] * len(table)


def met(table: pd.DataFrame, unconditional: pd.DataFrame | None = None) -> Iterator[tuple[Numbers, Intervals]]:
    """The numbers of each group, with 95 % intervals: Wilson's of rates; of base rates, bootstrap over the crystals."""
    asked = asked_of(table)
    forced = [set(json.loads(text)) if text else set() for text in table.get("forced", [""] * len(table))]
    groups = [tuple(sorted(wanted, key=_place)) for wanted in asked]  # in whatever order they are stated
    for attributes in dict.fromkeys(filter(None, groups)):
        rows = [i for i, group in enumerate(groups) if group == attributes]
        wishes = [asked[i] for i in rows]
        everywhere = set.intersection(*(forced[i] for i in rows))
        here = _each(wishes, table.iloc[rows])
        place = f"conditions.{'+'.join(map(_name, attributes))}"
        numbers: Numbers = {}
        intervals: Intervals = {}
        for (what, attribute), hits in here.items():
            seen_to = attribute in everywhere or (attribute is None and everywhere >= set(attributes))
            name = f"{place}.{what}.{'forced' if seen_to else 'met'}_rate"
            numbers[name], intervals[name] = float(hits.mean()), wilson(int(hits.sum()), len(rows))
        if unconditional is not None:
            for (what, _), share in _base(wishes, unconditional).items():
                name = f"{place}.{what}.base_rate"
                numbers[name], intervals[name] = float(share.mean()), bootstrap_mean(share)
        yield numbers, intervals


def unjudged(table: pd.DataFrame) -> dict[str, int]:
    """How many attempts were asked for something that this table cannot judge, by its name."""
    found: dict[str, int] = {}
    for wanted in asked_of(table):
        for attribute in wanted:
            if not _told(attribute, table):
                found[_name(attribute)] = found.get(_name(attribute), 0) + 1
    return found


def _place(attribute: str) -> tuple[int, int, str]:
    """In the name of a group: attributes as prompts know them, then a model's own by name, then the cell's size."""
    if attribute in ATTRIBUTES:
        return 0, ATTRIBUTES.index(attribute), ""
    return 2 if attribute == "num_atoms" else 1, 0, attribute


def _name(attribute: str) -> str:
    """As numbers call it; a property's own, without what parts names."""
    return NAMES.get(attribute) or attribute.translate(str.maketrans(".+", "__"))


def _told(attribute: str, table: pd.DataFrame) -> dict[str, Judge]:
    """What can be told of an attribute, with its judge: of columns that the table has."""
    own = {
        f"{_name(attribute)}{suffix}": (column(attribute, suffix), _property(column(attribute, suffix)))
        for suffix in ("", "_relaxed")
    }
    return {name: judge for name, (place, judge) in _JUDGES.get(attribute, own).items() if place in table}


def _each(
    wishes: list[dict[str, Any]], table: pd.DataFrame
) -> dict[tuple[str, str | None], Bool[np.ndarray, "attempts"]]:
    """Which attempts meet their own wish, by what is told and its attribute; at last all at once, where there are two.

    `table` has a row for each of `wishes`, which are of the same attributes.
    """
    found: dict[tuple[str, str | None], np.ndarray] = {}
    for attribute in wishes[0]:
        for name, judge in _told(attribute, table).items():
            hits = np.zeros(len(table), bool)
            for value, rows in _same([wanted[attribute] for wanted in wishes]).items():
                hits[rows] = judge(json.loads(value), table.iloc[rows])
            found[name, attribute] = hits
    sampled = [hits for (name, attribute), hits in found.items() if name == _name(attribute)]
    return found | ({("all", None): np.logical_and.reduce(sampled)} if len(sampled) > 1 else {})


def _base(wishes: list[dict[str, Any]], table: pd.DataFrame) -> dict[tuple[str, str | None], np.ndarray]:
    """Of each crystal of `table` the share of `wishes` that it meets."""
    shares: dict[tuple[str, str | None], np.ndarray] = {}
    for text, rows in _same(wishes).items():
        for key, hits in _each([json.loads(text)] * len(table), table).items():
            shares[key] = shares.get(key, 0) + hits * (len(rows) / len(wishes))
    return shares


def _same(values: list[Any]) -> Mapping[str, list[int]]:
    """The rows of each value, as JSON."""
    found: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        found.setdefault(json.dumps(value), []).append(row)
    return found
