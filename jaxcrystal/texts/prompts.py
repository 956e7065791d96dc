"""What the model is asked: the paper's two tasks as text (arXiv 2402.04379, section 4).

Generation:  Below is a description of a bulk material. [The … is ….]* Generate a description …:⏎ <crystal>
Infilling:   Below is a partial description … "[MASK]":⏎ <crystal, one element masked> ⏎Generate an …:⏎ <element>

Each piece below begins where the one before it ended, with the space that parts them: the device writes the same
pieces one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals import text
from jaxcrystal.crystals.conditions import sentence, subjects
from jaxcrystal.crystals.crystal import ELEMENTS, Crystal

INTRODUCTION = "Below is a description of a bulk material."
REQUEST = (
    " Generate a description of the lengths and angles of the lattice vectors and then the element type and"
    " coordinates for each atom within the lattice:\n"
)
INFILL_INTRODUCTION = (
    "Below is a partial description of a bulk material where one element has been replaced with the string"
    f' "{text.MASK}":\n'
)
INFILL_REQUEST = f"\nGenerate an element that could replace {text.MASK} in the bulk material:\n"


def generation_prompt(attributes: Mapping[str, Any], paper_compat: bool = False) -> str:
    """The prompt after which the model writes a crystal; `attributes` are stated in the order given."""
    return INTRODUCTION + "".join(sentence(k, v, paper_compat) for k, v in attributes.items()) + REQUEST


def generation(crystal: Crystal, attributes: Mapping[str, Any], fmt: TextFormat) -> str:
    """A whole training text of the generation task."""
    return generation_prompt(attributes, fmt.paper_compat) + text.write(crystal, fmt)


def infilling(crystal: Crystal, masked: int, fmt: TextFormat) -> str:
    """A whole training text of the infilling task; `masked` is the atomic number to be guessed."""
    return INFILL_INTRODUCTION + text.write(crystal, fmt, masked) + INFILL_REQUEST + ELEMENTS[masked]


def words() -> list[str]:
    """Every word that the prompts' own wording uses, each once, with the space before it."""
    wording = [INTRODUCTION, REQUEST, INFILL_INTRODUCTION, INFILL_REQUEST, *subjects()]
    return sorted({f" {word}" for piece in wording for word in re.findall(r"[A-Za-z]+", piece.replace(text.MASK, ""))})
