"""What the model is asked: the paper's two tasks as text (arXiv 2402.04379, section 4).

Generation:  Below is a description of a bulk material. [The … is ….]* Generate …:⏎ <crystal>
Infilling:   Below is a partial description … "[MASK]":⏎ <crystal, one element masked> ⏎Generate an …:⏎ <element>

How a crystal is written, and the request for it, is the form's own (`forms`); all else is common to all. Each piece
below begins where the one before it ended, with the space that parts them: the device writes the same pieces one after
the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.texts.conditions import sentence, subjects

MASK = "[MASK]"
INTRODUCTION = "Below is a description of a bulk material."
INFILL_INTRODUCTION = (
    f'Below is a partial description of a bulk material where one element has been replaced with the string "{MASK}":\n'
)
INFILL_REQUEST = f"\nGenerate an element that could replace {MASK} in the bulk material:\n"


class Written(Protocol):
    """How crystals are written: what prompts need of a form."""

    request: str  #: the last sentence of a generation prompt, with the space before it and the line feed behind
    text: TextFormat

    def write(self, crystal: Crystal, mask_element: int | None = None) -> str:
        """The text of a crystal; atoms of the atomic number `mask_element` are written [MASK]."""
        ...


def generation_prompt(form: Written, attributes: Mapping[str, Any]) -> str:
    """The prompt after which the model writes a crystal; `attributes` are stated in the order given."""
    stated = (sentence(name, value, form.text.paper_compat, form.text.properties) for name, value in attributes.items())
    return INTRODUCTION + "".join(stated) + form.request


def generation(form: Written, crystal: Crystal, attributes: Mapping[str, Any]) -> str:
    """A whole training text of the generation task."""
    return generation_prompt(form, attributes) + form.write(crystal)


def infilling_prompt(form: Written, crystal: Crystal, masked: int) -> str:
    """The prompt after which the model writes an element, which stands where `masked`, an atomic number, does."""
    return INFILL_INTRODUCTION + form.write(crystal, masked) + INFILL_REQUEST


def infilling(form: Written, crystal: Crystal, masked: int) -> str:
    """A whole training text of the infilling task; `masked` is the atomic number to be guessed."""
    return infilling_prompt(form, crystal, masked) + ELEMENTS[masked]


def words(request: str) -> list[str]:
    """Every word of the prompts' wording, with a form's `request`, each once, with the space before it."""
    wording = [INTRODUCTION, request, INFILL_INTRODUCTION, INFILL_REQUEST, *subjects()]
    return sorted({f" {word}" for piece in wording for word in re.findall(r"[A-Za-z]+", piece.replace(MASK, ""))})
