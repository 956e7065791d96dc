"""From a crystal to the texts that are read of it, and what a model said of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Float64, Int

from jaxcrystal.config import Augment, Recipe, load
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.sampling.conditions import Trained, targets
from jaxcrystal.scoring.likelihood import Likelihood, Text
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import Form, form_of
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.tokenizer import Tokenizer
from jaxcrystal.worker_process import Lost
from jaxcrystal.workers import Workers, run

T = TypeVar("T")

OK = "ok"
UNWRITTEN = "unwritten"  #: the form has no text for such a crystal
TOO_LONG = "too_long"  #: for the model's context
CHUNK = 256  #: crystals that are described before the first of them are read


@dataclass(frozen=True)
class Ways:
    """Which texts of a crystal are read."""

    form: Form
    over: tuple[str, ...] = ()  #: of the form's transformations; none: the crystal's own text alone
    listed: bool = False  #: all that `Form.described` lists, and none that are drawn
    draws: int = 0  #: of those that cannot be listed
    seed: int = 0  #: it and the crystal itself decide what is drawn

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise UserError(f"draws is {self.draws}; it must be at least 0")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")
        if unknown := [name for name in self.over if name not in self.form.transformations]:
            raise UserError(
                f"texts of the {self.form.text.form} form have no {unknown[0]}; they have "
                f"{', '.join(self.form.transformations)}"
            )

    @classmethod
    def of_training(cls, model_dir: AnyPath, form: Form, draws: int, seed: int) -> Self:
        """What the texts of training were drawn from, as the recipe beside a model says, or else recipes by default;
        without `draws`, a crystal's own text."""
        path = model_dir / "recipe.yaml"
        augment = load(Recipe, path).augment if path.exists() else Augment()
        drawn = {
            "translations": augment.translate,
            "orders": augment.permute,
            "descriptions": augment.descriptions,
        }
        over = tuple(name for name in form.transformations if drawn.get(name)) if draws else ()
        return cls(form, over, "descriptions" in over, draws, seed)

    def texts(self, crystal: Crystal) -> list[str]:
        """Raises UserError for a crystal that the form cannot write."""
        if self.listed or not self.over:
            found = self.form.described(crystal)
            return found if self.over else found[:1]
        random = np.random.default_rng([self.seed, *bytes.fromhex(digest(crystal))])
        return self.form.transformed(crystal, self.over, self.draws, random)

    def key(self) -> list[Any]:
        """What decides the texts of a crystal."""
        drawn = self.over and not self.listed
        return [repr(self.form.text), self.over, self.listed, *([self.draws, self.seed] if drawn else [])]


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """What a model says of one crystal, or why it says nothing."""

    outcome: str  #: `ok`, `unwritten`, `too_long`, or how its process ended
    reason: str
    log_probabilities: Float64[np.ndarray, "texts"]  #: nats, of each text and the end, behind the prompt
    tokens: Int[np.ndarray, "texts"]  #: of each text, the end included

    @classmethod
    def none(cls, outcome: str, reason: str) -> Self:
        return cls(outcome, reason, np.zeros(0), np.zeros(0, np.int64))

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        """What `row` gave."""
        log_p, tokens = np.array(row["log_probabilities"], np.float64), np.array(row["tokens"], np.int64)
        return cls(str(row["outcome"]), str(row["reason"]), log_p, tokens)

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        return vars(self) | {"log_probabilities": self.log_probabilities.tolist(), "tokens": self.tokens.tolist()}


@dataclass(frozen=True)
class Scorer:
    """Reads the texts of crystals behind one prompt."""

    likelihood: Likelihood
    prompt: str
    ways: Ways

    @property
    def tokenizer(self) -> Tokenizer:
        return self.likelihood.model.tokenizer

    def key(self, model: str, crystal: Crystal) -> str:
        """Of what a model, by its fingerprint, says of a crystal."""
        said = [model, self.prompt, self.ways.key(), digest(crystal)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def read(
        self, crystals: Iterable[tuple[T, Crystal]], workers: Workers | None = None
    ) -> Iterator[tuple[T, Likelihoods]]:
        """Each item with what the model says of its crystal, in their order.

        Raises UserError where the model's numbers are none.
        """
        prompt = [*self.tokenizer.begin, *self.tokenizer.encode(self.prompt)]

        def groups() -> Iterator[tuple[tuple[T, Likelihoods], list[Text]]]:
            for item, found in _described(crystals, self.ways, workers):
                said, texts = self._texts(found, prompt)
                yield (item, said), texts

        for (item, said), log_p in self.likelihood.read(groups()):
            yield item, said if said.outcome != OK else Likelihoods(OK, "", log_p, said.tokens)

    def _texts(self, found: list[str] | Likelihoods, prompt: list[int]) -> tuple[Likelihoods, list[Text]]:
        """What is to be read; with no text where that cannot be."""
        if isinstance(found, Likelihoods):
            return found, []
        begin, context = self.tokenizer.begin, self.likelihood.model.config.max_position_embeddings
        whole = [[*begin, *self.tokenizer.encode(self.prompt + text), self.tokenizer.eos_id] for text in found]
        if (longest := max(map(len, whole))) > context:
            reason = (
                f"its text takes {longest - len(prompt)} tokens behind a prompt of {len(prompt)}; the model's context "
                f"holds {context}"
            )
            return Likelihoods.none(TOO_LONG, reason), []
        texts = [Text(tokens, len(tokens) - len(prompt)) for tokens in whole]
        return Likelihoods(OK, "", np.zeros(0), np.array([text.answer for text in texts])), texts


def prompt_of(conditions: Mapping[str, Any], trained: Trained) -> str:
    """What is in front of a text that meets conditions. Raises UserError as `targets`, and for a range."""
    (wanted,), _ = targets(conditions, Constraints(), grammar=False, trained=trained)
    if wanted.ranges:
        raise UserError(f"a prompt states one value of {next(iter(wanted.ranges))}, not a range")
    return generation_prompt(form_of(trained.text), wanted.conditions)


def digest(crystal: Crystal) -> str:
    """A hash of it, the order of its atoms included."""
    values = (crystal.lengths, crystal.angles, crystal.species, crystal.frac_coords)
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()


def _described(
    crystals: Iterable[tuple[T, Crystal]], ways: Ways, workers: Workers | None
) -> Iterator[tuple[T, list[str] | Likelihoods]]:
    """Each item with its texts, or why it has none."""
    if workers is None:
        for item, crystal in crystals:
            yield item, _texts(ways, crystal)
        return
    waiting = iter(crystals)
    while some := list(islice(waiting, CHUNK)):
        found: dict[int, Any] = dict(run(partial(_job, ways), [crystal for _, crystal in some], workers))
        for i, (item, _) in enumerate(some):
            lost = found[i] if isinstance(found[i], Lost) else None
            yield item, found[i] if lost is None else Likelihoods.none(lost.value, lost.reason)


def _job(ways: Ways, crystals: Iterable[Crystal]) -> Iterator[tuple[int, list[str] | Likelihoods]]:
    return ((i, _texts(ways, crystal)) for i, crystal in enumerate(crystals))


def _texts(ways: Ways, crystal: Crystal) -> list[str] | Likelihoods:
    try:
        return ways.texts(crystal)
    except UserError as error:
        return Likelihoods.none(UNWRITTEN, str(error))
