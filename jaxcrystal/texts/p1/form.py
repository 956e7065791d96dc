"""The paper's form: cell and atoms as numbers, with no symmetry but translations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxcrystal.config import Augment, TextFormat
from jaxcrystal.crystals.crystal import Crystal, CrystalBatch
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.texts.conditions import known
from jaxcrystal.texts.kept import Keeping, Kept, Site
from jaxcrystal.texts.p1.body import Drawn, bounds, draw, pieces
from jaxcrystal.texts.p1.grammar import Grammar
from jaxcrystal.texts.p1.tables import build
from jaxcrystal.texts.p1.text import REQUEST, parse, write
from jaxcrystal.texts.p1.transformations import TRANSFORMATIONS
from jaxcrystal.texts.pieces import Pieces, TokenList
from jaxcrystal.texts.token_tables import TokenTables
from jaxcrystal.texts.tokenizer import Tokenizer


@dataclass(frozen=True)
class P1:
    """`forms.Form`, which says what each of these is for."""

    text: TextFormat
    kept: Kept | None = None
    request: ClassVar[str] = REQUEST
    composition_first: ClassVar[bool] = False
    states_group: ClassVar[bool] = False
    transformations: ClassVar[tuple[str, ...]] = tuple(TRANSFORMATIONS)

    def write(self, crystal: Crystal, mask_element: int | None = None) -> str:
        return write(crystal, self.text, mask_element)

    def described(self, crystal: Crystal) -> list[str]:
        return [self.write(crystal)]

    def transformed(
        self, crystal: Crystal, over: Collection[str], count: int, random: np.random.Generator
    ) -> list[str]:
        def drawn() -> Crystal:
            found = crystal
            for name in over:
                found = TRANSFORMATIONS[name](found, random)
            return found

        return [self.write(drawn()) for _ in range(count)]

    def parse(self, text: str) -> Crystal:
        found = parse(text)
        if self.kept is None:
            return found
        sites = [site.frac_coords for site in self.kept.sites]
        cell = np.array(self.kept.cell or (*found.lengths, *found.angles))
        coords = np.concatenate([np.reshape(sites, (-1, 3)), found.frac_coords[len(sites) :]])
        return Crystal(cell[:3], cell[3:], found.species, coords)

    def keeping(self, crystal: Crystal, sites: Sequence[int], cell: bool, group: bool, symprec: float) -> Keeping:
        if group:
            raise UserError(
                "a P1 text does not state its space group, which cannot be kept; take a model of the symmetry form"
            )
        kept = tuple(Site(crystal.symbols[i], tuple(crystal.frac_coords[i].tolist())) for i in sites)
        whole = (*crystal.lengths.tolist(), *crystal.angles.tolist()) if cell else None
        return Keeping(Kept(kept, whole), len(crystal), len(kept) == len(crystal))

    def masked_with(self, crystal: Crystal, atom: int) -> Bool[np.ndarray, "atoms"]:
        return np.arange(len(crystal)) == atom

    def space_group(self, text: str) -> None:
        return None

    def check(self, augment: Augment) -> None:
        if augment.descriptions:
            raise UserError("augment.descriptions is true, which is for the symmetry form: a P1 text has none")

    def implied(self, attribute: str, value: Any) -> dict[str, Any]:
        implied = known(self.text.properties)[attribute].implied
        return {} if implied is None else implied(value)

    def arrays(self, crystals: CrystalSet) -> CrystalBatch:
        return crystals.batch

    def hides(self, crystals: CrystalBatch) -> bool:
        return True

    def stated(self, crystals: CrystalSet, arrays: CrystalBatch) -> list[dict[str, Any]]:
        labels = map(crystals.attributes, range(len(crystals)))
        return [{name: label[name] for name in self.text.attributes if name in label} for label in labels]

    def tables(self, tokenizer: Tokenizer) -> TokenTables:
        return build(tokenizer, self.text.properties)

    def words(self, crystal: CrystalBatch, augment: Augment) -> int:
        return 4 + crystal.species.shape[0] * augment.permute

    def draw(self, words: UInt32[Array, "words"], crystal: CrystalBatch, augment: Augment) -> Drawn:
        return draw(words, crystal, augment)

    def body(
        self,
        tables: TokenTables,
        tokens: TokenList,
        crystals: CrystalBatch,
        drawn: Drawn,
        infill: Bool[Array, "*n"],
    ) -> Pieces:
        return pieces(tables, self.text, tokens, crystals, drawn, infill)

    def bounds(
        self, tables: TokenTables, crystals: CrystalBatch
    ) -> tuple[Int[np.ndarray, "2 crystals"], Int[np.ndarray, "2 crystals"]]:
        return bounds(tables, self.text, crystals)

    def grammar(self, tables: TokenTables, limit: int) -> Grammar:
        return Grammar.build(tables, self.text, limit)
