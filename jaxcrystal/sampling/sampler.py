"""A model that was loaded once and draws crystals for request after request."""

from __future__ import annotations

import json
import math
import sys
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import jax
from jax.sharding import Mesh

from jaxcrystal import compilation_cache, yardstick
from jaxcrystal.config import MeshConfig
from jaxcrystal.crystals import known_formulas
from jaxcrystal.crystals.crystal import formula_of
from jaxcrystal.crystals.formulas import read_formula
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.paths import AnyPath
from jaxcrystal.sampling.attempt import KNOWN_FORMULA, NAN_LOGITS, TRUNCATED, Attempt
from jaxcrystal.sampling.conditions import NumAtoms, Target, Trained, of_each, targets
from jaxcrystal.sampling.engine import Draw, Ending, Engine, Task
from jaxcrystal.sampling.formula_table import FormulaTable
from jaxcrystal.sampling.judging import Judgement, Judges
from jaxcrystal.sampling.memory import fitting, memory_left
from jaxcrystal.sampling.methods import Guidance, Method, MinP, Temperature, TopK, TopP
from jaxcrystal.sampling.planning import Plan, Planner
from jaxcrystal.sampling.ranges import as_json
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Grammar, form_of
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.token_tables import TokenTables
from jaxcrystal.weights.saved import load_model, model_directory

UNFINISHED = {  #: status of a text without its end
    Ending.TRUNCATED: TRUNCATED,
    Ending.NAN_LOGITS: NAN_LOGITS,
    Ending.KNOWN_FORMULA: KNOWN_FORMULA,
}


@dataclass(frozen=True)
class SamplerSettings:
    """What the compiled programs of a sampler depend on. Raises UserError for a value out of range.

    Guidance, temperature, top-k, top-p and min-p act in this order, and are by default the paper's.
    """

    grammar: bool = True  #: every text is a crystal; False: the model writes what it likes
    guidance: float | None = None  #: weight of what a prompt states (`Guidance`)
    temperature: float = 0.9
    composition_temperature: float | None = None  #: of the composition, where a text begins with it; None: as the rest
    new: bool = False  #: a composition whose formula is one of the training set's is drawn again
    top_k: int | None = None
    top_p: float = 0.9
    min_p: float | None = None
    slots: int | None = None  #: crystals that a copy of the model draws at once; None: as many as its memory holds
    dtype: str | None = None  #: of activations and matrix products; None: the model's
    cache_dtype: str | None = None  #: of keys and values; None: the model's
    max_new_tokens: int | None = None  #: None: what the context leaves after the longest prompt, at most 512

    def __post_init__(self) -> None:
        for name in ("slots", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; it must be float32 or bfloat16")
        if self.cache_dtype not in (None, "float32", "bfloat16", "int8"):
            raise UserError(f"cache_dtype is {self.cache_dtype!r}; it must be float32, bfloat16 or int8")
        if (name := self.of_composition) and not self.grammar:
            raise UserError(f"{name} needs the grammar, which knows where the composition ends")
        _ = self.methods, self.composition_methods, self.guide

    @property
    def of_composition(self) -> str | None:
        """A setting for texts that begin with their composition, if there is one."""
        return "composition_temperature" if self.composition_temperature is not None else "new" if self.new else None

    @cached_property
    def guide(self) -> Guidance | None:
        return None if self.guidance is None else Guidance(self.guidance)

    @cached_property
    def methods(self) -> list[Method]:
        """In the order of their application."""
        return self._at(self.temperature)

    @cached_property
    def composition_methods(self) -> list[Method] | None:
        """Those of the composition; None: the same."""
        return None if self.composition_temperature is None else self._at(self.composition_temperature)

    def _at(self, temperature: float) -> list[Method]:
        methods: list[Method] = [Temperature(temperature)]
        methods += [] if self.top_k is None else [TopK(self.top_k)]
        methods += [TopP(self.top_p)]
        methods += [] if self.min_p is None else [MinP(self.min_p)]
        return methods


class Sampler:
    """The model of a directory, on one device or the devices of `mesh`, which draws until it is closed.

    Adapters lie on the base that they were trained on, or on `base`, which was made of the same float weights.

    Programs are compiled with the first request that needs them: one that reads prompts and one that draws, whatever is
    stated and constrained, and for how many prompts. Another pair is taken, where the settings leave slots open, by a
    number of crystals with another power of two. Abandoning `stream` (Ctrl-C) leaves the sampler as it was.

    Raises UserError as `load_model`.
    """

    def __init__(
        self,
        model_dir: str | AnyPath,
        settings: SamplerSettings = SamplerSettings(),
        mesh: Mesh | None = None,
        base: str | AnyPath | None = None,
    ) -> None:
        compilation_cache.enable()
        self.settings = settings
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()) if mesh is None else mesh
        self.name = str(model_dir)
        model_dir = model_directory(model_dir)
        self.trained = Trained.read(model_dir)
        self.yardstick = yardstick.read(model_dir)
        if (name := settings.of_composition) and not form_of(self.trained.text).composition_first:
            raise UserError(
                f"{name} is for texts that begin with their composition, as those of the symmetry form do; {model_dir} "
                f"writes the {self.trained.text.form} form"
            )
        self.known = known_formulas.load(model_dir) if settings.new else []  #: formulas that are not drawn
        self.stored = load_model(model_dir, self.mesh, base)
        config = self.stored.config
        self.model = replace(self.stored, config=replace(config, dtype=settings.dtype or config.dtype))
        self.tokenizer = self.model.tokenizer
        self.form = form_of(self.model.text)
        self.closed = False
        self._engines: dict[Any, Engine] = {}
        self._judges = Judges(self.form)
        self._drawing: weakref.WeakSet[Generator[Draw, None, None]] = weakref.WeakSet()
        self._said: set[str] = set()  # kinds of notes: a thousand requests need no thousand lines

    @property
    def other_dtype(self) -> str | None:
        """That is computed in, where it is not the model's own."""
        dtype = self.model.config.dtype
        return None if dtype == self.stored.config.dtype else dtype

    def stream(
        self,
        num: int,
        *,
        conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        num_atoms: NumAtoms = None,
        constraints: Constraints = Constraints(),  # noqa: B008
        seed: int = 0,
        symprec: float = 0.1,
        exact_symmetry: bool = False,
        **stated: Any,
    ) -> Iterator[Attempt]:
        """`num` attempts to draw a crystal, in their order, each as soon as it is done.

        What the prompt states comes as keywords (`formula="LiFePO4"`, `elements`, `spacegroup`, `formation_energy` and
        `e_above_hull` in eV per atom, `band_gap` in eV), or as `conditions`, a mapping; a list of them makes as many
        prompts, of `num` attempts each. The grammar keeps to `constraints`, and to a stated formula or elements.
        Numbers may be ranges, `band_gap=(1, 2)` or `e_above_hull=(None, 0.05)`: each crystal's prompt states what some
        training crystal had (`ranges`).
        `num_atoms` of the cell, a number or the least and the most, is by default what training had for a formula of
        that size; "any" leaves it to the model.
        `symprec`, in Å, is how far a crystal may be from the symmetry that is found of it.

        Raises UserError at once for what `targets`, `plan` and `draws` refuse.
        """
        if conditions is not None and stated:
            raise UserError("conditions come as keywords or as `conditions`, not as both")
        check_request(num, symprec, seed)
        self.check_exact_symmetry(exact_symmetry)
        wanted, notes = targets(
            stated if conditions is None else conditions,
            constraints,
            num_atoms,
            grammar=self.settings.grammar,
            trained=self.trained,
        )
        plan = self.plan(wanted, num, seed)
        draws = self.draws(plan, seed, plan.tasks)
        say(line for kind, line in notes.items() if kind not in self._said)
        self._said |= notes.keys()
        return self._while_open(self.attempts(draws, plan, range(len(plan.tasks)), seed, symprec, exact_symmetry))

    def check_exact_symmetry(self, asked: bool) -> None:
        """Raises UserError where it is asked for of texts that state no space group."""
        if asked and not self.form.states_group:
            raise UserError(
                f"exact_symmetry compares a crystal with the space group that its text states; {self.name} writes the "
                f"{self.trained.text.form} form, which states none"
            )

    def plan(self, wanted: Sequence[Target], num: int, seed: int) -> Plan:
        """Prompts of `num` crystals of each wish, and room for the texts behind them. Raises UserError as `Planner`,
        and where new crystals of a known formula are asked for."""
        self._check_open()
        of_each(wanted, self._check_new)
        planner = Planner(
            self.form,
            self.trained,
            self._encoded,
            self._grammar,
            self.model.config,
            self.settings.max_new_tokens,
            self.settings.guidance is not None,
        )
        return planner.plan(wanted, num, seed)

    def draws(self, plan: Plan, seed: int, tasks: Sequence[Task], slots: int | None = None) -> Iterator[Draw]:
        """The draw of each task, in their order, by `slots` a copy of the model (default: as `slots` has it).

        Raises UserError at once for slots that do not fit, or as `Engine`.
        """
        self._check_open()
        draws = self._engine(plan, len(tasks), slots).draw_all(plan.tokens, seed, tasks, plan.limits)
        self._drawing.add(draws)
        return draws

    def slots(self, plan: Plan, tasks: int) -> int:
        """Crystals that a copy of the model draws at once, where so many are to be drawn."""
        return self._engine(plan, tasks).slots // self._copies

    def attempts(
        self,
        draws: Iterator[Draw],
        plan: Plan,
        rows: Iterable[int],
        seed: int,
        symprec: float,
        exact_symmetry: bool = False,
    ) -> Iterator[Attempt]:
        """The attempt of each draw, judged in other processes; `rows` says which of the plan's tasks they are.

        What is kept of a crystal is kept by all wishes of a plan.
        """
        constraints = plan.wanted[0].constraints
        form = self.form if constraints is None else replace(self.form, kept=constraints.kept)

        def texts() -> Iterator[tuple[tuple[Draw, str], str | None]]:
            for draw in draws:
                ended = draw.ending is Ending.FINISHED
                text = self.tokenizer.decode(draw.tokens[:-1] if ended else draw.tokens)
                yield (draw, text), text if ended else None

        for row, ((draw, text), found) in zip(rows, self._judges.judged(texts(), symprec, form), strict=False):
            wish = plan.wanted[row // plan.num]
            if found is None:
                found = Judgement(UNFINISHED[draw.ending])
            elif exact_symmetry:
                found = found.exact()
            yield Attempt(
                index=row,
                draw=draw.index,
                seed=seed,
                prompt=plan.prompts[draw.prompt],
                conditions=json.dumps(plan.targets[draw.prompt].conditions),
                text=text,
                log_probability=_finite(draw.log_probability),
                grammar_log_probability=_finite(draw.grammar_log_probability) if self.settings.grammar else None,
                tokens=len(draw.tokens),
                redraws=draw.redraws if self.settings.new else None,
                asked=as_json(wish.asked),
                forced=json.dumps(wish.forced),
                **vars(found),
                form=form,
            )

    def close(self) -> None:
        """Gives the memory on the devices back, and ends the judging processes; a second call does nothing."""
        if not self.closed:
            self.closed = True
            self._judges.close()
            for draws in self._drawing:
                draws.close()
            self._engines.clear()
            for array in jax.tree.leaves(self.model.variables):
                array.delete()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_new(self, target: Target) -> None:
        """Raises UserError where what is asked for is not new."""
        if not self.known:
            return
        formula, permitted = target.constraints.formula, target.constraints.permitted
        if len(permitted) == 1:  # of one element there is one formula
            (formula,) = permitted
        if formula is not None and formula_of(read_formula(formula)) in self.known:
            raise UserError(f"{formula} is a formula of the training set, and new ones were asked for; leave one out")

    def _check_open(self) -> None:
        if self.closed:
            raise UserError(f"the sampler of {self.name} is closed; load the model again")

    def _while_open(self, rows: Iterator[Attempt]) -> Iterator[Attempt]:
        """Once it is closed, its arrays and processes are gone: what they raise is not what went wrong."""
        try:
            for row in rows:
                self._check_open()
                yield row
            self._check_open()
        except Exception:
            self._check_open()
            raise

    def _encoded(self, prompt: str) -> list[int]:
        return [*self.tokenizer.begin, *self.tokenizer.encode(prompt)]

    def _grammar(self, max_new_tokens: int) -> Grammar | None:
        if not self.settings.grammar:
            return None
        return self.form.grammar(self._tables, max_new_tokens)

    @cached_property
    def _tables(self) -> TokenTables:
        return self.form.tables(self.tokenizer)

    @property
    def _copies(self) -> int:
        """Of the model, each of which draws rows of its own."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _engine(self, plan: Plan, tasks: int, slots: int | None = None) -> Engine:
        """One of few: of `slots`, or those that the settings say, or of a power of two."""
        copies, slots = self._copies, slots or self.settings.slots
        rows = max(1, -(-tasks // copies))
        longest = max(map(len, plan.tokens))

        def make(slots: int) -> Engine:
            key = (slots, plan.max_new_tokens)
            if key not in self._engines:
                self._engines[key] = engine(slots)
            return self._engines[key]

        def engine(slots: int) -> Engine:
            return Engine(
                self.model,
                end_id=self.tokenizer.eos_id,
                methods=self.settings.methods,
                composition_methods=self.settings.composition_methods,
                known=FormulaTable.of(self.known) if self.settings.new else None,
                grammar=self._grammar(plan.max_new_tokens),
                guidance=self.settings.guide,
                unconditional=self._encoded(generation_prompt(self.form, {})),
                slots=slots * copies,
                max_new_tokens=plan.max_new_tokens,
                cache_dtype=self.settings.cache_dtype,
                mesh=self.mesh,
            )

        return fitting(
            make,
            slots,
            slots or 1 << (rows - 1).bit_length(),
            lambda engine: engine.memory(longest),
            memory_left(self.mesh),
        )


def check_request(num: int, symprec: float, seed: int) -> None:
    """Raises UserError for numbers that make no sense."""
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed {seed} does not lie between 0 and 2³² - 1")
    if num < 1:
        raise UserError(f"num is {num}; it must be at least 1")
    if not 0 < symprec < math.inf:
        raise UserError(f"symprec is {symprec}; it must be above 0 Å (0.1 is usual for crystals that are not relaxed)")


def say(notes: Iterable[str]) -> None:
    """A line each, beside the output."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
