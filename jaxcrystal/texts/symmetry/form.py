"""The second form: a crystal by its space group, and nothing that follows from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.crystals.symmetric import SymmetricCrystal
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.crystals.wyckoff import GROUPS, free_axes
from jaxcrystal.errors import UserError
from jaxcrystal.texts.conditions import Range, known
from jaxcrystal.texts.kept import Keeping, Kept
from jaxcrystal.texts.pieces import Pieces, TokenList
from jaxcrystal.texts.symmetry.body import Drawn, bounds, draw, pieces
from jaxcrystal.texts.symmetry.grammar import DECIMALS, Grammar
from jaxcrystal.texts.symmetry.kept import keeping, restored
from jaxcrystal.texts.symmetry.tables import SymmetryTables
from jaxcrystal.texts.symmetry.text import REQUEST, parse, space_group, write
from jaxcrystal.texts.tokenizer import Tokenizer


@dataclass(frozen=True)
class Symmetry:
    """`forms.Form`, which says what each of these is for.

    Raises UserError for settings of a text that this form cannot have.
    """

    text: TextFormat
    kept: Kept | None = None
    request: ClassVar[str] = REQUEST
    composition_first: ClassVar[bool] = True
    states_group: ClassVar[bool] = True
    transformations: ClassVar[tuple[str, ...]] = ("descriptions",)

    def __post_init__(self) -> None:
        if self.text.coord_decimals not in DECIMALS:
            raise UserError(
                f"text.coord_decimals is {self.text.coord_decimals}; the symmetry form takes {DECIMALS[0]} to "
                f"{DECIMALS[-1]}"
            )
        if self.text.paper_compat:
            raise UserError("text.paper_compat writes what the paper's code writes; it has no symmetry form")

    def write(self, crystal: Crystal, mask_element: int | None = None) -> str:
        return write(_descriptions(crystal)[0], self.text, mask_element)

    def described(self, crystal: Crystal) -> list[str]:
        return list(dict.fromkeys(write(one, self.text) for one in _descriptions(crystal)))

    def transformed(
        self, crystal: Crystal, over: Collection[str], count: int, random: np.random.Generator
    ) -> list[str]:
        every = _descriptions(crystal)
        along = list(free_axes(every[0].space_group))
        if not along:
            return list(dict.fromkeys(write(one, self.text) for one in every))

        def drawn() -> str:
            one, shift = every[random.integers(len(every))], np.zeros(3)
            shift[along] = random.random(len(along))
            orbits = [replace(x, frac_coords=tuple(((x.frac_coords + shift) % 1).tolist())) for x in one.orbits]
            return write(replace(one, orbits=tuple(orbits)), self.text)

        return [drawn() for _ in range(count)]

    def parse(self, text: str) -> Crystal:
        found = parse(text)
        return (found if self.kept is None else restored(found, self.kept)).to_crystal()

    def keeping(self, crystal: Crystal, sites: Sequence[int], cell: bool, group: bool, symprec: float) -> Keeping:
        return keeping(crystal, sites, cell, group, symprec)

    def masked_with(self, crystal: Crystal, atom: int) -> Bool[np.ndarray, "atoms"]:
        from jaxcrystal.crystals.symmetry import orbit_of

        found = orbit_of(crystal, atom)
        if found is None:
            raise _no_group(crystal)
        return found

    def space_group(self, text: str) -> int | None:
        return space_group(text)

    def implied(self, attribute: str, value: Any) -> dict[str, Any]:
        if attribute == "spacegroup.number":
            low, high = (value.low, value.high) if isinstance(value, Range) else (value, value)
            return {"space_groups": tuple(number for number in GROUPS if low <= number <= high)}
        implied = known(self.text.properties)[attribute].implied
        return {} if implied is None else implied(value)

    def arrays(self, crystals: CrystalSet) -> SymmetricBatch:
        return crystals.symmetric()

    def hides(self, crystals: SymmetricBatch) -> bool:
        return bool(crystals.hides.all())

    def stated(self, crystals: CrystalSet, arrays: SymmetricBatch) -> list[dict[str, Any]]:
        labels = [
            crystals.attributes(i) | {"spacegroup.number": int(number)} for i, number in enumerate(arrays.space_group)
        ]
        return [{name: known[name] for name in self.text.attributes if name in known} for known in labels]

    def tables(self, tokenizer: Tokenizer) -> SymmetryTables:
        return SymmetryTables.build(tokenizer, self.text.properties)

    def check(self, augment: Augment) -> None:
        for name in ("translate", "permute"):
            if getattr(augment, name):
                raise UserError(
                    f"augment.{name} is true, which is for the p1 form: a symmetry text has its origin and order from "
                    f"the crystal. Set augment.{name} to false; augment.descriptions draws others"
                )

    def words(self, crystal: SymmetricBatch, augment: Augment) -> int:
        return 5

    def draw(self, words: UInt32[Array, "words"], crystal: SymmetricBatch, augment: Augment) -> Drawn:
        return draw(words, crystal, augment)

    def body(
        self,
        tables: SymmetryTables,
        tokens: TokenList,
        crystals: SymmetricBatch,
        drawn: Drawn,
        infill: Bool[Array, "*n"],
    ) -> Pieces:
        return pieces(tables, self.text, tokens, crystals, drawn, infill)

    def bounds(
        self, tables: SymmetryTables, crystals: SymmetricBatch
    ) -> tuple[Int[np.ndarray, "2 crystals"], Int[np.ndarray, "2 crystals"]]:
        return bounds(tables, self.text, crystals)

    def grammar(self, tables: SymmetryTables, limit: int) -> Grammar:
        return Grammar.build(tables, self.text, limit)


def _descriptions(crystal: Crystal) -> tuple[SymmetricCrystal, ...]:
    from jaxcrystal.crystals.symmetry import symmetrize

    found = symmetrize(crystal)
    if found is None:
        raise _no_group(crystal)
    return found.descriptions


def _no_group(crystal: Crystal) -> UserError:
    return UserError(f"{crystal.formula} has no space group at any tolerance: its atoms lie on each other")
