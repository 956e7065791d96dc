"""From a crystal and the parts of it that are to stay to what a sampler is asked for: the rest is written anew.

    SrTiO3, sites 1-4         ── Ti b, O c of 221, which the text must repeat, and the group, which the prompt states
            elements          ── Sr, Ti and O, all of them and no others
            composition       ── the formula, and as many atoms
            cell              ── the lattice's numbers; by symmetry the groups that can have it
            group             ── 221

What is stated and constrained goes the way of every other wish (`conditions`); what is repeated is `Constraints.kept`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.sampling.conditions import ANY, NumAtoms, Trained
from jaxcrystal.sampling.sampler import say
from jaxcrystal.sampling.sampling import SampleReport, sample
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Form, form_of
from jaxcrystal.weights.saved import model_directory

ALL = "keep some of its sites, its elements, its composition, its cell or its group"


@dataclass(frozen=True)
class Parts:
    """Of a crystal, what stays."""

    sites: tuple[int, ...] = ()  #: numbers of atoms, from 0
    elements: bool = False
    composition: bool = False  #: the formula, and how many atoms the cell has
    cell: bool = False
    group: bool = False

    @classmethod
    def of(cls, sites: Iterable[int] = (), **others: bool) -> Parts:
        """Sites in their order, each once. Raises UserError if nothing is kept."""
        parts = cls(tuple(sorted(set(sites))), **others)
        if parts == cls():
            raise UserError(f"nothing of the crystal is kept: {ALL}")
        return parts


def edit(
    model_dir: str | AnyPath, crystal: Crystal, num: int, out: str | Path, parts: Parts, **request: Any
) -> SampleReport:
    """Makes `num` attempts to write a crystal anew but for these parts, and writes a row for each to `out`: `sample`,
    whose `request` has no conditions. Raises UserError as it and `edit_of`."""
    form = form_of(Trained.read(model_directory(model_dir)).text)
    wanted, notes = edit_of(crystal, parts, form, **request)
    say(notes)
    return sample(model_dir, num, out, **request | wanted)


def edit_of(
    crystal: Crystal,
    parts: Parts,
    form: Form,
    *,
    num_atoms: NumAtoms = None,
    constraints: Constraints = Constraints(),  # noqa: B008
    symprec: float = 0.1,
    **_: Any,
) -> tuple[dict[str, Any], list[str]]:
    """What a sampler is asked for, so that texts of a form keep these parts of a crystal, and what is to be said of it.

    `num_atoms`, by default those of the crystal where sites or the cell are kept, and `constraints` are of the whole
    new crystal; `symprec`, in Å, is how far the old one may be from symmetric, where it is written so.

    Raises UserError for a site that is not there, for parts that leave nothing to be written, that a text of the form
    does not have, or that the constraints forbid.
    """
    for site in parts.sites:
        if not 0 <= site < len(crystal):
            raise UserError(
                f"there is no site {site}: {crystal.formula} has {len(crystal)}, from 0 to {len(crystal) - 1}"
            )
    if parts.composition and num_atoms is not None:
        raise UserError("with the composition the number of atoms is kept: leave one of the two out")
    found = form.keeping(crystal, parts.sites, parts.cell, parts.group, symprec)
    notes = list(found.notes)
    if num_atoms is None and constraints.num_atoms == ANY and (parts.sites or parts.cell or parts.composition):
        num_atoms = (found.num_atoms, found.num_atoms)
        if not parts.composition:
            notes.append(
                f"the new cell has {found.num_atoms} atoms, as the given one; num_atoms says otherwise, and `any` "
                "leaves it to the model"
            )
    if parts.cell and found.all_sites and num_atoms in (found.num_atoms, (found.num_atoms, found.num_atoms)):
        raise UserError(
            f"all sites of {crystal.formula} and its cell are kept: nothing is left to be written; keep fewer, or ask "
            "for more atoms (num_atoms)"
        )
    conditions: dict[str, Any] = {}
    if parts.composition:
        conditions["pretty_formula"] = crystal.formula
    if parts.elements:
        conditions["elements"] = sorted(set(crystal.symbols))
    groups, left = constraints.space_groups, found.space_groups
    if left is not None:
        groups = tuple(number for number in left if groups is None or number in groups)
        if len(left) == 1:
            (conditions["spacegroup.number"],) = left
    kept = found.kept if found.kept.sites or found.kept.cell else None
    constraints = replace(constraints, kept=kept, space_groups=groups)
    return {"conditions": conditions, "constraints": constraints, "num_atoms": num_atoms}, notes
