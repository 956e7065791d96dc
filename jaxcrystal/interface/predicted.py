"""An attempt as the prediction of a crystal, and the order in which a crystal's predictions stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from math import inf
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.interface.asked import Asked, wishes
from jaxcrystal.sampling.attempt import OK, Attempt

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from jaxcrystal.relaxation.batch import Relaxation

RANKINGS = ("log_probability", "energy")  #: by what predictions are ranked


@dataclass(frozen=True)
class Prediction:
    """A row: an attempt, whatever became of it."""

    id: str  #: of the crystal that is predicted
    rank: int  #: among the predictions of that crystal, from 1
    attempt: Attempt
    relaxed: Relaxation | None = None  #: None where nothing was relaxed, or there was nothing to relax

    @property
    def outcome(self) -> str:
        """Of the attempt."""
        return self.attempt.status

    @property
    def crystal(self) -> Crystal | None:
        """As it was drawn; None unless ok."""
        return self.attempt.crystal

    @property
    def structure(self) -> Structure | None:
        """pymatgen's, as it was drawn; None unless ok."""
        return self.attempt.structure

    @property
    def energy_per_atom(self) -> float | None:
        """eV/atom of the relaxed crystal."""
        found = self.relaxed
        return None if found is None or found.energy is None else found.energy / len(found.structure)

    def row(self) -> dict[str, Any]:
        """By column of a table: a ledger's, and what is of the prediction alone."""
        return {"material_id": self.id, "rank": self.rank, **asdict(self.attempt)}

    def relaxed_row(self) -> dict[str, Any]:
        """The columns that it has beside these where predictions were relaxed."""
        end = None if self.relaxed is None else self.relaxed.structure
        return {
            "relaxation": "no_crystal" if self.relaxed is None else str(self.relaxed.status),
            "energy_per_atom": self.energy_per_atom,
            "relaxed_cif": None if end is None else Crystal.from_structure(end).to_cif(),
        }


@dataclass(frozen=True)
class Ranking:
    """How the predictions of a crystal are ordered.

    The likeliest stands first, by log p of its text behind its prompt; or that which relaxes to the lowest energy, in
    eV/atom, and those that have none behind. A text that came before stands behind all others, and what failed behind
    these.

    Raises UserError for a ranking that is none, and for a potential that is missing or has no use.
    """

    by: str = "log_probability"
    potential: str | PathLike[str] | None = None  #: of energies
    fmax: float = 0.1  #: largest force left, eV/Å
    max_steps: int = 500
    workers: int | str = 0  #: as of `jaxcrystal.relax`

    def __post_init__(self) -> None:
        if self.by not in RANKINGS:
            raise UserError(f"rank_by is {self.by!r}; it is {' or '.join(RANKINGS)}")
        if self.by == "energy" and self.potential is None:
            raise UserError("rank_by energy needs a potential, such as chgnet: it is the energy of the relaxed crystal")
        if self.by != "energy" and self.potential is not None:
            raise UserError("a potential is for rank_by energy: leave it out, or rank by energy")

    def ranked(
        self, crystals: Sequence[Asked], attempts: Sequence[Attempt], store: Path | None = None
    ) -> Iterator[Prediction]:
        """The predictions of each crystal, one after the other, in the order of their rank.

        `attempts` are those of each of the `wishes` of `crystals`, in their order; whoever has a wish has all of its
        attempts. Relaxations are kept in the folder `store`. Raises UserError as `jaxcrystal.relax`.
        """
        all_wishes = wishes(crystals)
        num = len(attempts) // len(all_wishes)
        ends = {} if self.potential is None else self._relaxed(attempts, store)
        order: dict[Any, list[Prediction]] = {}
        for number, wish in enumerate(all_wishes):
            rows = attempts[number * num : (number + 1) * num]
            there = order[wish] = [
                Prediction("", 0, row, ends.get(row.text) if row.status == OK else None) for row in rows
            ]
            there.sort(key=lambda one: (one.outcome != OK, _worth(one)))
            first = {one.attempt.text: one.attempt.index for one in reversed(there)}
            there.sort(key=lambda one: (one.outcome != OK, first[one.attempt.text] != one.attempt.index))
        for crystal in crystals:
            for rank, one in enumerate(order[crystal.wish], start=1):
                yield replace(one, id=crystal.id, rank=rank)

    def _relaxed(self, attempts: Sequence[Attempt], store: Path | None) -> dict[str, Relaxation]:
        """Of each text that is a crystal."""
        from jaxcrystal.relaxation.batch import RelaxationSettings
        from jaxcrystal.relaxation.relaxations import potential_card, relax_all
        from jaxcrystal.workers import dask, local

        settings = RelaxationSettings(self.fmax, self.max_steps)
        pool = nullcontext() if self.workers == 0 else local(self.workers)
        if isinstance(self.workers, str):
            pool = dask(self.workers)
        structures = {row.text: row.structure for row in attempts if row.status == OK}
        with pool as workers:
            judge = potential_card(str(self.potential), workers)
            found = relax_all(list(structures.values()), judge, settings, workers=workers, cache_dir=store)
        return dict(zip(structures, found, strict=True))


def _worth(one: Prediction) -> tuple[float, float, int]:
    """Of two predictions the better one has the lesser."""
    energy, log_probability = one.energy_per_atom, one.attempt.log_probability
    return (
        inf if energy is None else energy,
        inf if log_probability is None else -log_probability,
        one.attempt.index,
    )
