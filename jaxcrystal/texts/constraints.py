"""What a crystal must be, beyond well written: what a grammar of any text format is asked to keep to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.crystals.formulas import read_formula
from jaxcrystal.errors import UserError
from jaxcrystal.texts.kept import Kept

SHORTEST, LONGEST = 0.7, 256.0  #: Å: no bond is shorter; the crystal's grid ends
FLATTEST = 1.0  #: degrees from 0 and from 180; what closes beyond, float64 could not tell from what does not


@dataclass(frozen=True)
class Constraints:
    """What a crystal must be, beyond well written.

    Raises UserError where constraints contradict each other, whatever the model.
    """

    formula: str | None = None  #: the atoms are a whole number of times these
    required: tuple[str, ...] = ()  #: elements, each at least once
    allowed: tuple[str, ...] | None = None  #: elements; None allows all
    forbidden: tuple[str, ...] = ()  #: elements
    num_atoms: tuple[int, int | None] = (1, None)  #: least and most; None: as many as fit
    lengths: tuple[float, float] = (SHORTEST, LONGEST)  #: least and most of a, b, c in Å
    angles: tuple[float, float] = (FLATTEST, 180 - FLATTEST)  #: least and most of α, β, γ in degrees
    space_groups: tuple[int, ...] | None = None  #: numbers, one of which the text states; None allows all
    kept: Kept | None = None  #: of a crystal that is there, which the text repeats; None: nothing

    def __post_init__(self) -> None:
        for symbol in (*self.required, *(self.allowed or ()), *self.forbidden):
            if symbol not in ATOMIC_NUMBER:
                raise UserError(f"{symbol!r} is no chemical element")
        if self.allowed is not None and not set(self.allowed) - set(self.forbidden):
            raise UserError("no element is left: every one that is allowed is forbidden as well")
        kept = self.kept.counts if self.kept else ()
        for what, symbols in (("required", self.required), (f"in {self.formula}", self.unit), ("kept", kept)):
            for symbol in symbols:
                if symbol in self.forbidden or symbol not in (self.allowed or (symbol,)):
                    raise UserError(f"{symbol} is {what}, but it is {self._fate(symbol)}")
        for symbol in self.required:
            if symbol not in (self.unit or self.required):
                raise UserError(f"{symbol} is required, but {self.formula} has none")
        for symbol in kept:
            if symbol not in (self.unit or kept):
                raise UserError(f"{symbol} is kept, but {self.formula} has none")
        for name, low, high, least, most in (
            ("lengths", *self.lengths, 0, LONGEST),
            ("angles", *self.angles, FLATTEST, 180 - FLATTEST),
        ):
            if not low <= high:
                raise UserError(f"{name} from {low} to {high} is an empty range")
            if not least <= low <= high <= most:
                raise UserError(f"{name} from {low} to {high} are not within {least} and {most}")
        if self.angles[0] >= 120:
            raise UserError(f"no cell has three angles of {self.angles[0]} or more: they add up to less than 360")
        self._check_num_atoms()
        self._check_space_groups()

    def _fate(self, symbol: str) -> str:
        return "forbidden" if symbol in self.forbidden else f"not among those allowed: {', '.join(self.allowed)}"

    def _check_num_atoms(self) -> None:
        low, high = self.num_atoms
        if low < 1:
            raise UserError(f"num_atoms is {low}; a crystal has at least 1")
        if high is None:
            return
        stated = f"{low}" if low == high else f"{low} to {high}"
        if low > high:
            raise UserError(f"num_atoms from {low} to {high} is an empty range")
        if high < len(set(self.required)):
            raise UserError(f"{len(set(self.required))} elements are required, but num_atoms is {stated}")
        size = sum(self.unit.values())
        if size and high // size < -(-low // size):
            raise UserError(f"num_atoms is {stated}, but {self.formula} has {size} atoms: no multiple of them fits")

    def _check_space_groups(self) -> None:
        if self.space_groups is None:
            return
        if not self.space_groups:
            raise UserError("no space group is left: space_groups is empty")
        for number in self.space_groups:
            if not 1 <= number <= 230:
                raise UserError(f"space group {number} does not exist; numbers run from 1 to 230")

    @property
    def unit(self) -> Counter[str]:
        """Atoms of the formula by element; empty without a formula."""
        return Counter() if self.formula is None else read_formula(self.formula)

    @property
    def permitted(self) -> set[str]:
        """Elements that may be written."""
        return set(self.unit or self.allowed or ELEMENTS[1:]) - set(self.forbidden)
