"""What a text must repeat of a crystal that is there: some of its sites, its cell; the rest is written anew.

The text has the decimals that its format has. What it says is put back as it was when it is read (`Form.kept`), so that
nothing of what is kept is rounded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

CELL = "a", "b", "c", "α", "β", "γ"  #: as errors call them


@dataclass(frozen=True)
class Site:
    """An atom; in a text by symmetry the first listed representative of an orbit, in the conventional cell."""

    symbol: str  #: of the element
    frac_coords: tuple[float, float, float]
    letter: str | None = None  #: of the orbit's Wyckoff position


@dataclass(frozen=True)
class Kept:
    """What stands in a text as given: of each element these sites are the first ones."""

    sites: tuple[Site, ...] = ()  #: written first, in this order; by symmetry, first of those of their element
    cell: tuple[float, float, float, float, float, float] | None = None  #: a, b, c in Å, α, β, γ in degrees

    @property
    def counts(self) -> Counter[str]:
        """Sites of each element."""
        return Counter(site.symbol for site in self.sites)


@dataclass(frozen=True)
class Keeping:
    """How a text format keeps parts of a crystal: what `Constraints` have of it."""

    kept: Kept
    num_atoms: int  #: of the whole crystal's cell, as the format counts
    all_sites: bool  #: whether none is left
    space_groups: tuple[int, ...] | None = None  #: that are left
    notes: tuple[str, ...] = ()  #: where more is kept than was named
