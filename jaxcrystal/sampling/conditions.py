"""What each prompt of a run states, and what the grammar keeps to behind it; from Python, options or a CSV.

In a CSV a row is a prompt, and an empty cell is not stated:

pretty_formula,band_gap
LiFePO4,3.5
NaCl,
,1:2

Within a range, each crystal's own prompt states a value (`ranges`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from jaxcrystal.config import Augment, Recipe, TextFormat, load
from jaxcrystal.crystals import known_formulas, training_labels
from jaxcrystal.crystals import num_atoms as sizes
from jaxcrystal.crystals.crystal import formula_of
from jaxcrystal.crystals.formulas import read_formula
from jaxcrystal.crystals.training_labels import Labels
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.texts.conditions import Condition, Properties, Range, checked, known
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Form, form_of
from jaxcrystal.weights import saved

T = TypeVar("T")

NumAtoms: TypeAlias = int | tuple[int, int] | Literal["any"] | None  #: of a cell; None: as in training
ANY = Constraints().num_atoms


@dataclass(frozen=True)
class Target:
    """What one prompt's crystals are to be."""

    conditions: Mapping[str, Any]  #: by attribute, stated in the prompt; spelled as training texts spell them
    constraints: Constraints | None  #: kept by the grammar; None without one
    #: By attribute, and `num_atoms`: what was asked for, whether the prompt states it or not.
    asked: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    forced: tuple[str, ...] = field(default=(), compare=False, repr=False)  #: of these, what the grammar sees to

    @property
    def ranges(self) -> dict[str, Range]:
        """Of the conditions, those that each crystal's prompt states a value of."""
        return {name: value for name, value in self.conditions.items() if isinstance(value, Range)}

    def stating(self, values: Mapping[str, Any], form: Form | None = None) -> Target:
        """With values in the place of its ranges; with a `form` the grammar keeps to them, as far as it can.

        Raises UserError for a value that the constraints forbid.
        """
        kept = self.constraints
        if kept is not None and form is not None:
            for attribute, value in values.items():
                kept = _narrowed(kept, **form.implied(attribute, value))
        return replace(self, conditions={**self.conditions, **values}, constraints=kept)


def read(path: str | Path, properties: Properties = ()) -> list[dict[str, Any]]:
    """The conditions of each row, in the order of the columns.

    Raises UserError that names file, row and value, if the file cannot be read, a column is none of
    `config.ATTRIBUTES` and of the model's `properties`, a row is longer or shorter than the header, or a value is none
    of its column.
    """
    there = known(properties)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            header, *rows = csv.reader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except ValueError:
        raise UserError(f"{path} is empty; expected a header of {', '.join(there)}, or some of these") from None
    unknown = [name for name in header if name not in there]
    if unknown or len(set(header)) < len(header):
        what = f"the column {unknown[0]!r}" if unknown else "a column twice"
        raise UserError(f"{path} has {what}; columns are {', '.join(there)}, each at most once")
    if not rows:
        raise UserError(f"{path} has a header and no row")
    return [_cells(f"{path}, row {number}", header, row, there) for number, row in enumerate(rows, start=1)]


def _cells(where: str, header: list[str], row: list[str], there: Mapping[str, Condition]) -> dict[str, Any]:
    if len(row) != len(header):
        raise UserError(f"{where}: {len(row)} cells, the header has {len(header)}")
    try:
        return {name: there[name].read(cell) for name, cell in zip(header, map(str.strip, row), strict=True) if cell}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Trained:
    """What is known of a model's training texts."""

    attributes: Collection[str] | None = None  #: that they stated; None: not known, as of a converted model
    num_atoms: Mapping[int, tuple[int, int]] = field(default_factory=dict)  #: as `crystals.num_atoms.ranges`
    text: TextFormat = field(default_factory=TextFormat)  #: how they are written
    model_dir: AnyPath | None = field(default=None, compare=False)
    infill: float | None = None  #: share of them that asked for an element; None: not known

    @cached_property
    def formulas(self) -> frozenset[str] | None:
        """Of the training set; None where that is not known. Raises UserError for a file that cannot be read."""
        known = self.model_dir is not None and (self.model_dir / known_formulas.FILE).exists()
        return frozenset(known_formulas.load(self.model_dir)) if known else None

    @cached_property
    def labels(self) -> Labels:
        """Of the training set. Raises UserError where they are not known, or the file cannot be read."""
        if self.model_dir is None:
            raise UserError("it is not known what the training crystals were labelled; ask for one value, not a range")
        return training_labels.load(self.model_dir)

    @classmethod
    def read(cls, model_dir: AnyPath) -> Trained:
        """Of a model directory. Raises UserError for files that cannot be read."""
        path = model_dir / "recipe.yaml"
        recipe = load(Recipe, path) if path.exists() else None
        attributes = None if recipe is None else _stated(recipe.augment, recipe.text)
        described = (model_dir / saved.MODEL_FILE).exists()
        text = saved.read_description(model_dir).text if described else TextFormat()
        infill = None if recipe is None else recipe.augment.infill
        return cls(attributes, sizes.load(model_dir), text, model_dir, infill)


def _stated(augment: Augment, text: TextFormat) -> frozenset[str]:
    if augment.infill == 1 or (augment.attribute_probability == 0 and not text.paper_compat):
        return frozenset()
    own = {each.name for each in text.properties}
    return (own | {*augment.attributes}) - ({"elements"} if text.paper_compat else set())  # the original never does


def targets(
    conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    constraints: Constraints,
    num_atoms: NumAtoms = None,
    *,
    grammar: bool,
    trained: Trained,
) -> tuple[list[Target], dict[str, str]]:
    """The target of each row of conditions, and what is to be said of them: lines by their kind.

    An attribute that the training texts never stated would be noise to the model: it is not stated if the grammar keeps
    to it, and refused if not. A range stays one, to be drawn from for each crystal (`Target.ranges`). `num_atoms` of
    the cell, a number or the least and the most, is by default what training had for a formula of that size; `any`
    leaves it to the model; a row may have a `num_atoms` of its own instead.

    Raises UserError, with the number of the row where there are several, for conditions that do not exist, that the
    model was not trained on, or that contradict each other or the constraints; for a row that is there twice; for
    constraints without a grammar to keep them.
    """
    rows = [conditions] if isinstance(conditions, Mapping) else list(conditions)
    if not rows:
        raise UserError("there is no row of conditions, not even an empty one")
    form = form_of(trained.text)
    unstated: dict[str, None] = {}
    limited: list[str] = []
    strange: list[str] = []

    def target(row: Mapping[str, Any]) -> Target:
        wanted = checked({name: value for name, value in row.items() if name != "num_atoms"}, trained.text.properties)
        size = row.get("num_atoms", num_atoms)
        bounds = kept = _sized(constraints, size)
        if not grammar and kept != Constraints():
            raise UserError("without the grammar there is nothing to keep the constraints; leave one of the two out")
        as_trained, sized = size is None and kept.num_atoms == ANY, kept.num_atoms != ANY
        forced = ["num_atoms"] if sized else []
        for attribute, value in wanted.items():
            implied = form.implied(attribute, value) if grammar else {}
            if trained.attributes is not None and attribute not in trained.attributes:
                if not implied:
                    names = ", ".join(name for name in trained.text.attributes if name in trained.attributes) or "none"
                    raise UserError(f"the model was not trained on {attribute}; attributes that it knows: {names}")
                unstated[attribute] = None
            kept = _narrowed(kept, **implied)
            forced += [attribute] if implied else []
        unit = sum(kept.unit.values())
        if as_trained and grammar and unit in trained.num_atoms:
            low, high = trained.num_atoms[unit]
            kept = replace(kept, num_atoms=(low, high))
            limited.append(f"{kept.formula}: {low} to {high}")
        formula = kept.formula or wanted.get("pretty_formula")
        if formula and trained.formulas and formula_of(read_formula(formula)) not in trained.formulas:
            strange.append(formula)
        stated = {name: value for name, value in wanted.items() if name not in unstated}
        asked = wanted | ({"num_atoms": Range(*_atoms(bounds))} if sized else {})
        return Target(stated, kept if grammar else None, asked, tuple(forced))

    found = of_each(rows, target)
    seen: dict[str, int] = {}
    for number, each in enumerate(found, start=1):
        if (other := seen.setdefault(repr(each), number)) != number:
            raise UserError(
                f"conditions, row {number}: the same as row {other}; raise num for more crystals of one prompt"
            )
    return found, _notes(
        list(unstated), limited, strange, max((most for _, most in trained.num_atoms.values()), default=0)
    )


def _sized(constraints: Constraints, num_atoms: NumAtoms) -> Constraints:
    """With bounds of the number of atoms among them, where there are any."""
    if num_atoms in (None, "any"):
        return constraints
    if constraints.num_atoms != ANY:
        raise UserError("num_atoms is stated twice, by itself and among the constraints")
    return replace(constraints, num_atoms=(num_atoms, num_atoms) if isinstance(num_atoms, int) else num_atoms)


def _atoms(constraints: Constraints) -> tuple[float, float]:
    low, high = constraints.num_atoms
    return low, math.inf if high is None else high


def _notes(unstated: Sequence[str], limited: Sequence[str], strange: Sequence[str], largest: int) -> dict[str, str]:
    notes = {}
    if strange:
        known = next((formula for formula in strange if known_formulas.is_compound(formula)), None)
        cells = f", whose cells have at most {largest} atoms" if largest else ""
        more = f" A compound of {known} is known, perhaps of larger cells." if known else ""
        notes["strange"] = f"{_first(strange)}: not in the training set{cells}; what is drawn is extrapolation.{more}"
    if unstated:
        notes["unstated"] = (
            f"the model was not trained on {' and '.join(unstated)}: the prompt does not state it, the grammar alone "
            "keeps to it"
        )
    if limited:
        notes["num_atoms"] = (
            f"atoms of a cell are as many as training had for formulas of that size ({_first(limited)}); num_atoms "
            "says otherwise, and `any` leaves it to the model"
        )
    return notes


def _first(found: Sequence[str]) -> str:
    return f"{found[0]} and {len(found) - 1} more" if len(found) > 1 else found[0]


def _narrowed(
    constraints: Constraints,
    formula: str | None = None,
    required: tuple[str, ...] = (),
    allowed: tuple[str, ...] = (),
    space_groups: tuple[int, ...] | None = None,
) -> Constraints:
    """What both the constraints and a condition permit."""
    if allowed and constraints.allowed is not None:
        allowed = tuple(symbol for symbol in allowed if symbol in constraints.allowed)
    groups = constraints.space_groups
    if groups is None or space_groups is None:
        groups = space_groups if groups is None else groups
    else:
        groups = tuple(number for number in groups if number in space_groups)
    return replace(
        constraints,
        formula=constraints.formula if formula is None else formula,
        required=tuple(dict.fromkeys((*constraints.required, *required))),
        allowed=allowed or constraints.allowed,
        space_groups=groups,
    )


def of_each(rows: Sequence[Any], make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of each; where there are several, an error says which row it is of."""
    made = []
    for number, row in enumerate(rows, start=1):
        try:
            made.append(make(row))
        except UserError as error:
            raise UserError(f"conditions, row {number}: {error}") if len(rows) > 1 else error from None
    return made
