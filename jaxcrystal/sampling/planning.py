"""From wishes to what the engine is given: prompts, what the grammar keeps behind each, and which crystal has which.

wish 0   "SrTiO3"             ── prompt 0 ── crystals 0 1 2 3 …
wish 1   "a band gap 1:2"     ── prompt 1 ── crystal 0, 3           a range has a value in each prompt,
                              ── prompt 2 ── crystal 1              and a prompt the crystals that drew it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxcrystal.config import LlamaConfig
from jaxcrystal.errors import UserError
from jaxcrystal.sampling.conditions import Target, Trained, of_each
from jaxcrystal.sampling.engine import Task, check_context
from jaxcrystal.sampling.ranges import Values, as_json
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Form, Grammar, Limits
from jaxcrystal.texts.prompts import generation_prompt

LONGEST_TEXT = 512  #: tokens that are allowed by default; 20 atoms with two decimals take about 400
GROUP = "spacegroup.number"


@dataclass(frozen=True)
class Plan:
    """What is drawn for a request: all of it is checked."""

    wanted: Sequence[Target]  #: the wishes, of `num` crystals each
    targets: Sequence[Target]  #: of each prompt, in which a range has become a value
    prompts: list[str]
    tokens: list[list[int]]  #: of each prompt, with the beginning of sequence
    limits: list[Limits] | None  #: that the grammar keeps behind each prompt; None without grammar
    tasks: list[Task]  #: of every crystal, wish after wish
    max_new_tokens: int

    @property
    def num(self) -> int:
        """Crystals of each wish."""
        return len(self.tasks) // len(self.wanted)


@dataclass(frozen=True)
class Stated:
    """The prompts of one wish."""

    targets: Sequence[Target]  #: of each prompt
    which: Sequence[int]  #: of these each crystal has


@dataclass(frozen=True)
class Planner:
    """Plans what one model draws."""

    form: Form
    trained: Trained
    encode: Callable[[str], list[int]]  #: a prompt, with the beginning of sequence
    grammar: Callable[[int], Grammar | None]  #: for texts of so many tokens
    config: LlamaConfig
    max_new_tokens: int | None  #: None: what the context has room for, up to `LONGEST_TEXT`
    guided: bool

    def plan(self, wanted: Sequence[Target], num: int, seed: int) -> Plan:
        """Raises UserError for a prompt that the context cannot hold, for guidance behind a prompt that states nothing,
        for constraints that no text of so many tokens meets, for a range that no training crystal is in."""
        values = of_each(wanted, self._values)
        limit = self._room(wanted, values)
        grammar = self.grammar(limit)
        if grammar is not None:
            # Of the groups in a range some may have no crystal of the formula, or the size, that is asked for.
            values = of_each(list(zip(wanted, values, strict=True)), lambda pair: self._possible(*pair, grammar))
        each = [self._stated(target, found, num, seed) for target, found in zip(wanted, values, strict=True)]
        targets: list[Target] = []
        tasks: list[Task] = []
        for stated in each:
            tasks += [Task(len(targets) + prompt, index) for index, prompt in enumerate(stated.which)]
            targets += stated.targets
        prompts = [self._prompt(target) for target in targets]
        tokens = [self.encode(prompt) for prompt in prompts]
        limits = self._limits([stated.targets for stated in each], grammar)
        return Plan(wanted, targets, prompts, tokens, limits, tasks, limit)

    def _room(self, wanted: Sequence[Target], values: Sequence[Values | None]) -> int:
        """Tokens of a text behind the longest prompt there may be, of those that are drawn or others: more crystals
        change nothing of the first."""

        def longest(pair: tuple[Target, Values | None]) -> str:
            target, found = pair
            return self._prompt(target if found is None else target.stating(found.longest()))

        prompts = of_each(list(zip(wanted, values, strict=True)), longest)
        if self.guided and (silent := generation_prompt(self.form, {})) in prompts:
            raise UserError(
                f"guidance weighs what the prompt states, and prompt {prompts.index(silent) + 1} states nothing that "
                "this model was trained on"
            )
        tokens = max(len(self.encode(prompt)) for prompt in prompts)
        limit = self.max_new_tokens
        if limit is None:
            limit = max(1, min(LONGEST_TEXT, self.config.max_position_embeddings - tokens))
        check_context(self.config, tokens, limit)
        return limit

    def _prompt(self, target: Target) -> str:
        return generation_prompt(self.form, target.conditions)

    def _values(self, target: Target) -> Values | None:
        return (
            Values.within(target.conditions, self.trained.labels, self.form.text.properties) if target.ranges else None
        )

    def _stated(self, target: Target, values: Values | None, num: int, seed: int) -> Stated:
        if values is None:
            return Stated([target], [0] * num)
        drawn = [values.draw(seed, index) for index in range(num)]
        distinct = {as_json(stated): stated for stated in drawn}
        number = {name: prompt for prompt, name in enumerate(distinct)}
        targets = [target.stating(stated, self.form) for stated in distinct.values()]
        return Stated(targets, [number[as_json(stated)] for stated in drawn])

    def _possible(self, target: Target, values: Values | None, grammar: Grammar) -> Values | None:
        """Those of a wish of whose space groups the grammar has crystals. Raises UserError if none is left."""
        if values is None or GROUP not in values.found:
            return values
        refused = {}

        def possible(number: int) -> bool:
            try:
                grammar.limits(target.stating({GROUP: number}, self.form).constraints)
            except UserError as error:
                refused[number] = error
            return number not in refused

        kept = values.only(GROUP, possible)
        if not len(kept):
            raise UserError(f"no space group of the range will do: {next(iter(refused.values()))}")
        return kept

    def _limits(self, rows: Sequence[Sequence[Target]], grammar: Grammar | None) -> list[Limits] | None:
        if grammar is None:
            return None
        known: dict[Constraints, Limits] = {}

        def limits(target: Target) -> Limits:
            if target.constraints not in known:
                known[target.constraints] = grammar.limits(target.constraints)
            return known[target.constraints]

        return [each for row in of_each(rows, lambda row: [limits(target) for target in row]) for each in row]
