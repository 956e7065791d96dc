"""One attempt to draw a crystal: what the model wrote, and what it turned out to be."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.texts.forms import Form, form_of
from jaxcrystal.texts.parsing import ParseError, ParseErrorKind

if TYPE_CHECKING:
    from pymatgen.core import Structure

OK = "ok"
TRUNCATED = "truncated"  #: no end of sequence before the limit
NAN_LOGITS = "nan_logits"  #: the model's logits were no numbers
KNOWN_FORMULA = "known_formula"  #: drawn again as often as may be, the composition was always a known one
HIGHER_SYMMETRY = "higher_symmetry"  #: more symmetric than the text says, where exact symmetry was asked for
LEFT_OUT = "left_out"  #: ok, and not among the likeliest that were to be kept; all columns are as of ok
CELL_ERROR = "cell_error"  #: well written, but no such cell exists
PARSE_ERROR = "parse_error"  #: followed by `:` and a `ParseErrorKind`


@dataclass(frozen=True)
class Attempt:
    """A row of the ledger."""

    index: int  #: of the row
    draw: int  #: the crystal is a function of the model, the prompt, the methods, `seed` and `draw`
    seed: int
    prompt: str
    conditions: str  #: the attributes that the prompt states, as JSON
    text: str  #: what the model wrote after the prompt
    status: (
        str  #: `ok`, `left_out`, `truncated`, `cell_error`, `nan_logits`, `known_formula`, `higher_symmetry`,
        #: `parse_error:<kind>`
    )
    log_probability: float | None  #: of all `tokens`, by the model alone: temperature 1, no method; None without a text
    grammar_log_probability: float | None  #: Σ log of what the model alone gave to the allowed tokens; None without
    tokens: int  #: how many were drawn, the end of sequence counted
    formula: str | None  #: OPTIMADE's chemical_formula_reduced: elements in alphabetical order; None without a crystal
    cif: str | None  #: in P1; None unless ok
    space_group: int | None  #: 1 to 230, within the run's `symprec`; None without a crystal, or where none is found
    symmetrized_cif: str | None  #: the conventional cell, made exactly symmetric; None as the space group
    symmetry_failure: str | None = None  #: `timeout` or `crashed`: why there is none, if the search did not end
    resampled: int | None = None  #: how often the run's `resample` chose it; None without
    written_group: int | None = None  #: space group that the text states; None where it states none
    higher_symmetry: bool | None = None  #: whether the crystal is more symmetric than that; None without either
    redraws: int | None = (
        None  #: how often its composition was one of the training set's, where new ones were asked for
    )
    asked: str | None = None  #: what was asked for, by attribute, and `num_atoms`, as JSON; a range as its two ends
    forced: str | None = None  #: of these, what the grammar saw to, as a JSON list
    form: InitVar[Form | None] = None  #: that reads the text; no column: without it, the one that states such a group

    def __post_init__(self, form: Form | None) -> None:
        if form is None:
            form = form_of(TextFormat(form="p1" if self.written_group is None else "symmetry"))
        object.__setattr__(self, "form", form)

    @property
    def id(self) -> str:
        """As the reader of a ledger names the row."""
        return str(self.index)

    @property
    def outcome(self) -> str:
        """The status, under the name that all tables have for it."""
        return self.status

    @cached_property
    def crystal(self) -> Crystal | None:
        """None unless ok."""
        return self.form.parse(self.text) if self.status == OK else None

    @property
    def structure(self) -> Structure | None:
        """pymatgen's; None unless ok."""
        return None if self.crystal is None else self.crystal.to_structure()


def judge(text: str, form: Form) -> tuple[str, Crystal | None]:
    """The status of a text that ended, and its crystal if there is one."""
    try:
        return OK, form.parse(text)
    except ParseError as error:
        return CELL_ERROR if error.kind is ParseErrorKind.CELL else f"{PARSE_ERROR}:{error.kind}", None
