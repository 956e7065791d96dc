"""The living sampler of scripts and notebooks, which infills too: what `jaxcrystal.load` returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from jaxcrystal.errors import UserError
from jaxcrystal.interface.asked import asked, naming, wishes
from jaxcrystal.interface.editing import one_crystal
from jaxcrystal.interface.infilled import Infilled
from jaxcrystal.interface.predicted import Ranking
from jaxcrystal.interface.questions import Wish, ask
from jaxcrystal.interface.sources import rows
from jaxcrystal.interface.tables import Attempts, Predictions
from jaxcrystal.sampling import sampler
from jaxcrystal.sampling.answers import Answers, key_of
from jaxcrystal.sampling.attempt import LEFT_OUT
from jaxcrystal.sampling.conditions import NumAtoms
from jaxcrystal.sampling.editing import Parts, edit_of
from jaxcrystal.sampling.infilling import Infiller
from jaxcrystal.sampling.keeping import KEEP_BY, left_out
from jaxcrystal.sampling.keeping import check as check_keep
from jaxcrystal.sampling.sampler import say
from jaxcrystal.sampling.sampling import fingerprint

if TYPE_CHECKING:
    from jaxcrystal.interface.sources import Source


class Sampler(sampler.Sampler):
    """A model that was loaded once and draws crystals for call after call: `sample` all at once, `stream` one by one;
    `predict` ranked, for formulas; and which says what could stand in the place of an element, where it was trained to:
    `infill`.

    It holds the devices' memory until `close`, or the end of a `with` block.
    """

    def sample(self, num: int, *, keep: float | None = None, keep_by: str | None = None, **request: Any) -> Attempts:
        """`num` attempts to draw a crystal, a row each, whatever became of it; arguments and errors as of `stream`.

        With `keep`, a share, of each prompt's crystals the likeliest stay ok, by log p in "total", per "token" (the
        default of `keep_by`) or per "atom", and the others become `left_out`.

        For example `sample(20, formula="LiFePO4", seed=1)`.
        """
        check_keep(keep, keep_by)
        rows = list(self.stream(num, **request))
        if keep is not None:
            unkept = left_out(map(vars, rows), num, keep, keep_by or KEEP_BY)
            rows = [replace(row, status=LEFT_OUT) if i in unkept else row for i, row in enumerate(rows)]
        return Attempts(rows, self.settings, self.fingerprint)

    def predict(
        self,
        formulas: Any,
        attempts: int = 20,
        *,
        num_atoms: NumAtoms = None,
        given_atoms: bool = True,
        rank_by: Literal["log_probability", "energy"] = "log_probability",
        potential: str | PathLike[str] | None = None,
        fmax: float = 0.1,
        max_steps: int = 500,
        limit: int | None = None,
        workers: int | str = 0,
        **request: Any,
    ) -> Predictions:
        """`attempts` attempts at the crystal of each formula, which the grammar keeps to, in the order of their rank:
        the likeliest first, or, by a `potential`, what relaxes to the lowest energy; what failed, last.

        - `formulas`: one, a list of them, a mapping from ids to them, a table with a column `formula`, and perhaps
          `material_id` and `num_atoms`, or a CSV or parquet file of such; of these the first `limit`.
        - `num_atoms`: of every cell, as of `stream`, in place of what the table says; without `given_atoms` that is
          left aside, and cells are as large as in training.
        - `rank_by`: "log_probability", the model's own of the text; or "energy", eV/atom by `potential` of the crystal
          relaxed until forces are below `fmax`, eV/Å, or for `max_steps` steps; `workers` are those of
          `jaxcrystal.relax`.

        Other arguments and errors are those of `stream`, but for conditions; raises UserError too for what `asked` and
        `Ranking` refuse.

        For example `predict(["SrTiO3", "LiFePO4"]).first()`.
        """
        if not self.settings.grammar:
            raise UserError("formulas are kept by the grammar: load the model without grammar=False")
        ranking = Ranking(rank_by, potential, fmax, max_steps, workers)
        crystals = asked(formulas, num_atoms=given_atoms and num_atoms is None, limit=limit)
        firsts = list(wishes(crystals).values())
        with naming(firsts):
            conditions = [one.condition for one in firsts]
            rows = tuple(self.stream(attempts, conditions=conditions, num_atoms=num_atoms, **request))
        return Predictions(ranking.ranked(crystals, rows))

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
        say(notes)
        return self.sample(num, **request | wanted)

    def infill(
        self,
        crystals: Source,
        *,
        mask: str | None = None,
        site: int | None = None,
        allow: Sequence[str] | None = None,
        similar: float | None = None,
        store: str | PathLike[str] | None = None,
    ) -> Infilled:
        """Which element could stand where one is masked: the exact probability of each, crystal by crystal.

        - `mask`: the element, all of whose atoms are masked, as in training.
        - `site`: instead, the number of an atom, from 0 in the order in which `jaxcrystal.read` has a crystal's atoms.
          A model that writes crystals by their symmetry masks the atom's orbit.
        - `allow`: elements among which the answer is sought; None: all.
        - `similar`: only elements whose ionic radius is within so many Å of that of the one that was there.
        - `store`: a file that keeps each answer as it comes; what is known there is not asked again.

        Probabilities are the model's own, whatever the settings of the sampler. Rows that are no crystals, or have not
        the element, are left out, which is said. Raises UserError for a model that was not trained to infill, a source
        that cannot be read, what `Wish` and `ask` refuse, and a crystal that the context does not hold.
        """
        self._check_open()
        if self.trained.infill == 0:
            raise UserError(
                f"{self.name} was not trained to infill (augment.infill is 0 in its recipe); train one that was, with "
                "`--set augment.infill=0.34`"
            )
        wish = Wish(mask, site, allow, similar)
        questions, notes = ask(rows(crystals, "crystals", None), self.form.masked_with, wish)
        say(notes)
        infiller = self._infiller
        bar = tqdm(questions, desc="masking", unit="crystal", leave=False)
        prompts = [infiller.prompt(question.masked) for question in bar]
        tokens = {
            prompt: infiller.tokens(question.name, prompt) for question, prompt in zip(questions, prompts, strict=True)
        }
        keys = {prompt: key_of(self.fingerprint, prompt) for prompt in tokens}
        kept = None if store is None else Answers(Path(store))
        known = {} if kept is None else kept.known(set(keys.values()))
        missing = [prompt for prompt, key in keys.items() if key not in known]
        answers = infiller.answers(tokens[prompt] for prompt in missing)
        for prompt in tqdm(missing, desc="infilling", unit="crystal"):
            known[keys[prompt]] = answer = next(answers)
            if kept is not None:
                kept.append(keys[prompt], answer)
        return Infilled(tuple(questions), tuple(known[keys[prompt]] for prompt in prompts))

    @cached_property
    def _infiller(self) -> Infiller:
        return Infiller(self.model, self._tables, self.mesh)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, as ledgers have it."""
        return fingerprint(self.model, self.tokenizer)

    def __repr__(self) -> str:
        return f"<Sampler of {self.name}{', closed' if self.closed else ''}>"
