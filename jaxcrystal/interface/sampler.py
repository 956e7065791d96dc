"""The living sampler of scripts and notebooks, which infills too: what `jaxcrystal.load` returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from jaxcrystal.crystals.formulas import read_formula
from jaxcrystal.errors import UserError
from jaxcrystal.interface.asked import asked, naming, wishes
from jaxcrystal.interface.editing import one_crystal
from jaxcrystal.interface.infilled import Infilled
from jaxcrystal.interface.likelihoods import of_rows
from jaxcrystal.interface.predicted import Ranking
from jaxcrystal.interface.questions import Wish, ask
from jaxcrystal.interface.scored import UNSEEN, Scored, Transformed
from jaxcrystal.interface.sources import rows
from jaxcrystal.interface.tables import Attempts, Predictions
from jaxcrystal.reader.rows import Row, Rows
from jaxcrystal.sampling import sampler
from jaxcrystal.sampling.answers import Answers, key_of
from jaxcrystal.sampling.attempt import LEFT_OUT
from jaxcrystal.sampling.conditions import NumAtoms
from jaxcrystal.sampling.editing import Parts, edit_of
from jaxcrystal.sampling.infilling import Answer, Infiller
from jaxcrystal.sampling.keeping import KEEP_BY, left_out
from jaxcrystal.sampling.keeping import check as check_keep
from jaxcrystal.sampling.sampler import say
from jaxcrystal.sampling.sampling import fingerprint
from jaxcrystal.scoring.descriptions import OK, Likelihoods, Scorer, Ways, prompt_of
from jaxcrystal.scoring.likelihood import AT_ONCE, Likelihood
from jaxcrystal.workers import Workers, chosen

if TYPE_CHECKING:
    from jaxcrystal.interface.sources import Source


class Sampler(sampler.Sampler):
    """A model that was loaded once and draws crystals for call after call: `sample` all at once, `stream` one by one;
    `predict` ranked, for formulas; which says how probable it finds given ones: `score`, `ipt`; and what could stand in
    the place of an element, where it was trained to: `infill`.

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
        return Attempts(rows, self.settings, self.fingerprint, self.yardstick)

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

        Probabilities are the model's own, whatever the settings of the sampler but `dtype`. Rows that are no crystals,
        or have not the element, are left out, which is said. Raises UserError for a model that was not trained to
        infill, a source that cannot be read, what `Wish` and `ask` refuse, and a crystal that the context does not
        hold.
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
        keys = {prompt: key_of(self._answering, prompt) for prompt in tokens}
        kept = None if store is None else Answers(Path(store))
        known = {} if kept is None else kept.known(set(keys.values()), Answer.of_row)
        missing = [prompt for prompt, key in keys.items() if key not in known]
        answers = infiller.answers(tokens[prompt] for prompt in missing)
        for prompt in tqdm(missing, desc="infilling", unit="crystal"):
            known[keys[prompt]] = answer = next(answers)
            if kept is not None:
                kept.append(keys[prompt], answer.row())
        return Infilled(tuple(questions), tuple(known[keys[prompt]] for prompt in prompts))

    def score(
        self,
        crystals: Source,
        *,
        draws: int = 20,
        seed: int = 0,
        beside: Source | None = None,
        conditions: Mapping[str, Any] = MappingProxyType({}),
        store: str | PathLike[str] | None = None,
        at_once: int = AT_ONCE,
        workers: int | str = 0,
    ) -> Scored:
        """log p of each crystal, in nats, behind the prompt that states nothing, or behind that of `conditions`.

        What a crystal's probability is depends on what training drew its texts from (`Ways.of_training`):

        - one text, as with a canonical description, or P1 without translations: exactly that of this text and its end;
        - one of several descriptions by symmetry: exactly that of all of them together, log Σ p over the distinct
          texts; along free axes each has the one origin that is listed;
        - P1 with translations, or orders of atoms: the logarithm of the mean probability of a text, log E p over
          uniform ones, as `draws` of them estimate it (`estimates.log_mean_exp`), and its interval. It is no sum: how
          many texts a crystal has depends on its decimals and atoms.

        P1 texts have the cell as it is given: give the one that training had.

        - `draws`: 0 takes the crystal's own text alone, in any form.
        - `seed`: it and the crystal decide what is drawn.
        - `beside`: other crystals, such as the validation set; adds the quantile of each crystal's nats a token among
          theirs, and flags: `remembered`, a formula of the training set and likelier than 99 in 100 of them; `unlike`,
          less likely than 99 in 100.
        - `store`: a file that keeps what is said as it comes; what is known there is not asked again.
        - `at_once`: rows of 1,024 tokens that a copy of the model reads together.

        A row that is no crystal, or none that can be read, has an outcome that says why; so has one with an element
        that no training crystal had, whose numbers are there, but not ranked. Probabilities are the model's own,
        whatever the settings of the sampler. Raises UserError for a source that cannot be read or holds no crystal,
        for numbers out of range, and conditions that the model was not trained on, or that are ranges.
        """
        self._check_open()
        ways = Ways.of_training(self.trained.model_dir, self.form, draws, seed)
        scorer = self._scorer(ways, conditions, at_once)
        with chosen(workers) as pool:
            there = rows(crystals, "crystals", pool)
            others = None if beside is None else rows(beside, "beside", pool)
            found = self._told(scorer, there, store, pool)
            near = None if others is None else self._told(scorer, others, store, pool)
        scored = Scored(there.rows, found, ways.listed, self.trained.formulas)
        if near is None:
            return scored
        table = Scored(others.rows, near, ways.listed, None).table
        per_token = -table["log_probability_per_token"][table["outcome"] == OK].to_numpy()
        if not len(per_token):
            raise UserError(f"{others.path}: none of its {len(others)} rows is ok, and nothing can lie beside them")
        return replace(scored, beside=np.sort(per_token))

    def ipt(
        self,
        crystals: Source,
        *,
        over: str | None = None,
        draws: int = 20,
        seed: int = 0,
        store: str | PathLike[str] | None = None,
        at_once: int = AT_ONCE,
        workers: int | str = 0,
    ) -> Transformed:
        """How much the perplexity of each crystal's text depends on the way it is written, of those that mean the same:
        IPT = E_g[PPL(t_g s)] - min_g PPL(t_g s) (arXiv 2402.04379, section 4), PPL being exp of the mean negative
        log-likelihood of its tokens, the end among them, the prompt not.

        - `over`: in P1 `translations` (the default), `orders` of atoms, or `cells`, which span the same lattice by
          matrices of -1, 0 and 1; by symmetry `descriptions`.
        - `draws`: so many of them, uniform; two at least. Descriptions are all that there are, without draws, but where
          an origin is free along an axis. IPT grows with draws, for the minimum falls: compare equal ones.
        - others are those of `score`.

        A row that is no crystal, or none that can be read, has an outcome that says why. Raises UserError as `score`.
        """
        self._check_open()
        if draws < 2:
            raise UserError(f"draws is {draws}; IPT compares at least 2 texts of a crystal")
        over = self.form.transformations[0] if over is None else over
        scorer = self._scorer(Ways(self.form, (over,), draws=draws, seed=seed), {}, at_once)
        with chosen(workers) as pool:
            there = rows(crystals, "crystals", pool)
            return Transformed(there.rows, self._told(scorer, there, store, pool), over)

    def _scorer(self, ways: Ways, conditions: Mapping[str, Any], at_once: int) -> Scorer:
        _ = self._tables  # refuses a tokenizer that cannot write the form
        if at_once not in self._readers:
            self._readers[at_once] = Likelihood(self.model, self.mesh, at_once)
        return Scorer(self._readers[at_once], prompt_of(conditions, self.trained), ways)

    def _told(
        self, scorer: Scorer, there: Rows, store: str | PathLike[str] | None, pool: Workers | None
    ) -> tuple[Likelihoods, ...]:
        """Of each row; an element that training never had is the outcome."""
        found = of_rows(scorer, self._answering, there, store, pool)
        if self.trained.formulas is None:
            return found
        seen = {symbol for formula in self.trained.formulas for symbol in read_formula(formula)}

        def of_row(row: Row, said: Likelihoods) -> Likelihoods:
            unseen = [] if row.crystal is None else sorted({*row.crystal.symbols} - seen)
            if said.outcome != OK or not unseen:
                return said
            return replace(said, outcome=UNSEEN, reason=f"no training crystal has {', '.join(unseen)}")

        return tuple(map(of_row, there.rows, found))

    @cached_property
    def _readers(self) -> dict[int, Likelihood]:
        """By rows that a copy reads together."""
        return {}

    @cached_property
    def _infiller(self) -> Infiller:
        return Infiller(self.model, self._tables, self.mesh)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, as ledgers have it."""
        return fingerprint(self.stored, self.tokenizer)

    @cached_property
    def _answering(self) -> str:
        """What decides an answer beside the question: the model, and the dtype, where it is not the model's own."""
        return f"{self.fingerprint} {self.other_dtype}" if self.other_dtype else self.fingerprint

    def __repr__(self) -> str:
        return f"<Sampler of {self.name}{', closed' if self.closed else ''}>"
