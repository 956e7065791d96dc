"""The living sampler of scripts and notebooks: what `jaxcrystal.load` returns."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.interface.editing import one_crystal
from jaxcrystal.interface.tables import Attempts
from jaxcrystal.sampling import sampler
from jaxcrystal.sampling.editing import Parts, edit_of
from jaxcrystal.sampling.sampling import fingerprint


class Sampler(sampler.Sampler):
    """A model that was loaded once and draws crystals for call after call: `sample` all at once, `stream` one by one.

    It holds the devices' memory until `close`, or the end of a `with` block.
    """

    def sample(self, num: int, **request: Any) -> Attempts:
        """`num` attempts to draw a crystal, a row each, whatever became of it; arguments and errors as of `stream`.

        For example `sample(20, formula="LiFePO4", seed=1)`.
        """
        return Attempts(self.stream(num, **request), self.settings, self.fingerprint)

    def edit(
        self,
        crystal: Any,
        num: int,
        *,
        sites: Iterable[int] = (),
        elements: bool = False,
        composition: bool = False,
        cell: bool = False,
        group: bool = False,
        **request: Any,
    ) -> Attempts:
        """`num` attempts to write a crystal anew but for some of its `sites` (numbers of atoms, from 0), its elements,
        its composition with the number of atoms, its cell or its space group, which are its own in every result.

        `crystal` is a `Crystal`, a pymatgen Structure, ASE's Atoms, the text of a CIF, or a file that holds one. In
        the symmetry form sites are kept with their orbits, and so is their space group, which is looked for within
        `symprec` Å; what is kept of a crystal is then that of its exactly symmetric form. With sites or the cell the
        new one has by default as many atoms as the given one.

        Other arguments and errors are those of `stream`, but for conditions; raises UserError too for what `edit_of`
        refuses.

        For example `edit(structure, 20, sites=[1, 2], cell=True)`.
        """
        if not self.settings.grammar:
            raise UserError("what is kept is kept by the grammar: load the model without grammar=False")
        parts = Parts.of(sites, elements=elements, composition=composition, cell=cell, group=group)
        wanted, notes = edit_of(one_crystal(crystal), parts, self.form, **request)
        sampler.say(notes)
        return self.sample(num, **request | wanted)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, as ledgers have it."""
        return fingerprint(self.model, self.tokenizer)

    def __repr__(self) -> str:
        return f"<Sampler of {self.name}{', closed' if self.closed else ''}>"
