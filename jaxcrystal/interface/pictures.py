"""Crystals drawn side by side, as one SVG: for a notebook, a page, a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    from pymatgen.core import Structure

WIDTH, HEIGHT, DRAWING = 150, 190, 140  #: of a card, and of the drawing in it
COLUMNS = 6

_STYLE = (
    ".edge {stroke: #8b909b; stroke-width: 1.1} .bond {stroke-width: 4} "
    "text {font-family: sans-serif; font-size: 13px; text-anchor: middle; fill: #30343c} "
    ".line {font-size: 11px; fill: #6b7079}"
)


@dataclass(frozen=True)
class Pictures:
    """Drawings of crystals, `COLUMNS` a row."""

    svg: str

    @classmethod
    def of(cls, drawn: Sequence[tuple[Structure, str]]) -> Pictures:
        """Of structures, each with a line below its formula."""
        from jaxcrystal.report.drawing import conventional

        columns = max(1, min(COLUMNS, len(drawn)))
        cards = []
        for i, (structure, line) in enumerate(drawn):
            x, y = i % columns * WIDTH, i // columns * HEIGHT
            cards.append(
                f'<g transform="translate({x} {y})">'
                + picture(conventional(structure)[0]).replace(
                    "<svg ", f'<svg x="5" y="2" width="{DRAWING}" height="{DRAWING}" ', 1
                )
                + f'<text x="{WIDTH // 2}" y="160">{_formula(structure)}</text>'
                f'<text class="line" x="{WIDTH // 2}" y="177">{escape(line)}</text></g>'
            )
        width, height = columns * WIDTH, max(1, -(-len(drawn) // columns)) * HEIGHT
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        paper = f'<rect width="{width}" height="{height}" fill="white"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>{paper}'
        return cls(f"{head}{''.join(cards)}</svg>")

    def _repr_svg_(self) -> str:
        return self.svg

    def write(self, path: str | PathLike[str]) -> Path:
        """Writes the SVG. Raises UserError where the disk refuses it."""
        try:
            Path(path).write_text(self.svg + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        return Path(path)


def picture(structure: Structure | None) -> str:
    """SVG of one crystal; nothing for none, or where the cell is too large to be seen or no cell at all."""
    from jaxcrystal.report.drawing import DRAWN_ATOMS, draw

    if structure is None or len(structure) > DRAWN_ATOMS or not np.isfinite(structure.lattice.matrix).all():
        return ""

    # Outputs of a notebook share a page: a name of its own keeps each picture's colours its own.
    return draw(structure, prefix="c" + sha256(repr(structure).encode()).hexdigest()[:12])


def _formula(structure: Structure) -> str:
    small = r'<tspan font-size="9" dy="3">\1</tspan><tspan dy="-3">&#8203;</tspan>'
    return re.sub(r"(\d+)", small, spelled(Crystal.from_structure(structure).formula))
