"""A model that its own verified crystals improve: what `jaxcrystal improve` runs.

    sample ─▶ relax, place ─▶ keep ─▶ train on all, with what is kept ─▶ judge ─▶ the next round

    OUT/recipe.yaml               the improvement, as it was run
    OUT/data/                     the training set, where it was one of the box
    OUT/round_0/judged/           the evaluation of the model before any round
    OUT/round_1/samples.parquet   the attempts from which the round takes
    OUT/round_1/selection/        their evaluation, by the potential that selects
    OUT/round_1/verdicts.csv, kept/, train.parquet    what it keeps (`pool`)
    OUT/round_1/model/            what it trains: a directory as `sample` reads it, with `synthetic.parquet`,
                                  and `yardstick.json`, by which its ledgers find that
    OUT/round_1/judged/           the evaluation of that model's attempts, by the potential that judges
    OUT/rounds.csv, rounds.md, rounds.svg, comparison/    what came of it (`story`)

Each step is a verb of the house, which goes on where it was stopped; a step that is done is not done again. So a second
start of the same recipe goes on, and one with more rounds adds them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import pandas as pd
import yaml

from jaxcrystal import box, yardstick
from jaxcrystal.config import MeshConfig, Recipe, from_dict, load, to_dict
from jaxcrystal.crystals.dataset import written_whole
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import results
from jaxcrystal.improvement import story
from jaxcrystal.improvement.pool import join, keep, pair
from jaxcrystal.improvement.recipe import Improvement
from jaxcrystal.interface.functions import evaluate, train
from jaxcrystal.locks import held
from jaxcrystal.mesh import make_mesh
from jaxcrystal.reader.preparing import prepare
from jaxcrystal.relaxation.relaxations import potential_card
from jaxcrystal.sampling.sampler import say
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.weights.saved import model_directory, read_description
from jaxcrystal.workers import local
from jaxcrystal.yardstick import Yardstick

#: Keys that a second start may have otherwise.
FREE = ("out", "rounds")


def improve(recipe: Improvement, workers: int | str = 0) -> pd.DataFrame:
    """Runs `recipe`, or what is left of it; returns the story, a row a quantity and round.

    `workers`: where crystals are relaxed, as of `jaxcrystal.evaluate`. Raises UserError as the verbs do, and for a
    judge that selects, a model without the recipe that trained it, a folder of another improvement, and a round that
    keeps nothing.
    """
    out = Path(recipe.out)
    with held(out):
        _check_judge(recipe)
        _check_same(out, recipe)
        own = _recipe_of(recipe)
        _check_teaching(recipe, own)
        train_set, validation = _data(recipe, out)
        with written_whole(out / "recipe.yaml") as unfinished:
            unfinished.write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
        rounds = [Round(recipe, 0, own, (train_set,), validation, workers)]
        rounds[0].judge()
        while len(rounds) <= recipe.rounds:
            say(_cost(recipe, rounds))
            rounds.append(rounds[-1].next())
            rounds[-1].run(rounds[-2])
            story.write(recipe, rounds)
        return story.write(recipe, rounds)


@dataclass(frozen=True)
class Round:
    """One round; of number 0, the model as it came."""

    recipe: Improvement
    number: int
    own: Recipe  #: that trained the model as it came
    parts: tuple[Path, ...]  #: all that its model is trained on: the original set, and what each round kept
    validation: Path
    workers: int | str

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out) / f"round_{self.number}"

    @property
    def model(self) -> str:
        """The directory of the model that it ends with."""
        return str(self.folder / "model") if self.number else self.recipe.model

    @property
    def train_set(self) -> Path:
        """All that its model is trained on, in one file."""
        return self.folder / "train.parquet" if self.number else self.parts[0]

    def next(self) -> Round:
        """The round that begins with its model."""
        after = replace(self, number=self.number + 1)
        return replace(after, parts=(*self.parts, after.folder / "kept/kept.parquet"))

    def run(self, before: Round) -> None:
        """All steps that are not done."""
        with self._timed("sample"):
            samples = self._sample(before.model, self.recipe.sampling.num, "samples", self.recipe.seed + self.number)
        with self._timed("select"):
            rule = self.recipe.selection
            self._evaluate(samples, "selection", rule.potential, rule.hull, before.train_set)
            if not self.train_set.exists():
                table = results.read(self.folder / "selection").table
                keep(table, rule, before.parts[1:], self.folder, self.number)
                if lost := join(self.parts, self.train_set):
                    say([f"round {self.number}: {lost} crystals of which no symmetry was found are left out"])
        with self._timed("train"):
            self._train(before)
        self.judge()

    def judge(self) -> None:
        """Evaluates attempts of its model, which the same seed draws in all rounds."""
        how = self.recipe.judging
        with self._timed("judge"):
            samples = self._sample(self.model, how.num, "judged", self.recipe.seed)
            self._evaluate(samples, "judged", how.potential, how.hull, self.train_set)

    def _sample(self, model: str, num: int, name: str, seed: int) -> Path:
        how, out = self.recipe.sampling, self.folder / f"{name}.parquet"
        if out.exists():  # until all are drawn there is a journal
            return out
        sample(
            model,
            num,
            out,
            seed=seed,
            mesh=make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.local_devices()),
            temperature=how.temperature + (how.warmer * (self.number - 1) if name == "samples" else 0.0),
            composition_temperature=how.composition_temperature,
            top_p=how.top_p,
            new=how.new,
        )
        return out

    def _evaluate(self, samples: Path, name: str, potential: str | None, hull: str, known: Path) -> None:
        if (self.folder / name / "report.html").exists():  # which is written last
            return
        hull_of = () if potential is None else hull
        evaluate(samples, self.folder / name, train=known, potential=potential, hull=hull_of, workers=self.workers)

    def _train(self, before: Round) -> None:
        """On all data, or on pairs: adapters anew, on the base that they had; all weights from where they were."""
        synthetic = self.folder / "model/synthetic.parquet"
        if synthetic.exists():  # which is written last
            return
        changes = {
            "out": str(self.folder / "model"),
            "base": self.own.base if self.own.lora is not None else before.model,
            "data.train": str(self.train_set),
            "data.validation": str(self.validation),
            "seed": self.own.seed + self.number,
        }
        if self.recipe.teaching == "preferences":
            table = results.read(self.folder / "selection").table
            pairs = pair(table, self.folder, self.recipe.seed + self.number)
            changes |= {"data.train": str(pairs.with_name("attempts.parquet")), "preferences.pairs": str(pairs)}
        ours = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        report = train(self.own, ["steps=null", *self.recipe.training, *ours])
        if report.stopped is not None:
            raise KeyboardInterrupt
        yardstick.write(synthetic.parent, self._yardstick())
        join(self.parts[1:], synthetic)

    def _yardstick(self) -> Yardstick:
        """With what crystals of its model are compared: all that this has seen, and the potential that judges."""
        original, how = self.recipe.train, self.recipe.judging
        return Yardstick(
            model=f"round {self.number} of {self.recipe.out}",
            train=(original if box.crystals(original) else str(self.parts[0].resolve()), "synthetic.parquet"),
            hull=None if how.potential is None else _found(how.hull),
            potential=None if how.potential is None else _found(how.potential),
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Notes the seconds that a step takes, over all starts, for who asks what a round costs."""
        started, path = time.monotonic(), self.folder / "seconds.json"
        try:
            yield
        finally:
            known = json.loads(path.read_text()) if path.exists() else {}
            known[step] = round(known.get(step, 0.0) + time.monotonic() - started, 1)
            with written_whole(path) as unfinished:
                unfinished.write_text(json.dumps(known) + "\n")


def _found(name: str) -> str:
    """A path that is there as it is from anywhere; else the name."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _check_judge(recipe: Improvement) -> None:
    """Raises UserError where the potential that selects judges too, and nobody said so."""
    selects, judges = recipe.selection.potential, recipe.judging.potential
    if judges is None or recipe.judging.judge_selects:
        return
    with local(1) as pool:  # whose memory is free again afterwards
        selecting, judging = (potential_card(potential, pool).sha256 for potential in (selects, judges))
    if selecting == judging:
        raise UserError(
            f"{judges} would judge the crystals that it selects, which flatters: name another potential in "
            "judging.potential, or say judging.judge_selects=true"
        )


def _check_teaching(recipe: Improvement, own: Recipe) -> None:
    """Raises UserError for pairs that would teach a base what its adapters have learnt."""
    if recipe.teaching == "preferences" and own.lora is not None:
        raise UserError(
            f"teaching is preferences, which go on from a model's own weights, and {recipe.model} has adapters, which "
            "each round trains anew: merge them (`jaxcrystal export --format hf`) and improve what that writes"
        )


def _check_same(out: Path, recipe: Improvement) -> None:
    """Raises UserError if the folder holds another improvement."""
    path = out / "recipe.yaml"
    if not path.exists():
        return
    theirs, ours = to_dict(from_dict(Improvement, yaml.safe_load(path.read_text()), str(path))), to_dict(recipe)
    for key in ours:
        if key not in FREE and theirs[key] != ours[key]:
            raise UserError(
                f"{out} holds an improvement whose {key} is {theirs[key]}, not {ours[key]}; set another `out`, or "
                f"remove {out}"
            )


def _recipe_of(recipe: Improvement) -> Recipe:
    """That trained the model as it came."""
    directory = model_directory(recipe.model)
    read_description(directory)
    if not (directory / "recipe.yaml").exists():
        raise UserError(f"{recipe.model} has no recipe.yaml, which would say how to train it further; train it first")
    return load(Recipe, directory / "recipe.yaml")


def _data(recipe: Improvement, out: Path) -> tuple[Path, Path]:
    """Training and validation set as files that `prepare` wrote; those of the box are prepared once."""
    places = [recipe.train, recipe.validation]
    boxed = [place for place in places if box.crystals(place)]
    files = [out / f"data/{box.PARTS[place]}.parquet" if place in boxed else Path(place) for place in places]
    if boxed and not (out / "data/report.json").exists():  # which is written last
        prepare(boxed, out / "data", max_atoms=None, workers=1)
    return files[0], files[1]


def _cost(recipe: Improvement, rounds: Sequence[Round]) -> Iterator[str]:
    """What the next round has to do, and how long that takes by the last one, or by judging the model as it came."""
    number, how = len(rounds), recipe.sampling
    judged = f", {recipe.judging.num:,} more to be judged" if recipe.judging.potential else ""
    seconds = json.loads((rounds[-1].folder / "seconds.json").read_text())
    took = ""
    if number > 1:
        took = f"; the last one took {sum(seconds.values()) / 60:.0f} minutes"
    elif recipe.judging.potential:
        minutes = seconds["judge"] / 60 * (1 + how.num / recipe.judging.num)
        took = f"; but for the training some {minutes:.0f} minutes, as judging the model took {seconds['judge']:.0f} s"
    yield f"round {number} of {recipe.rounds}: {how.num:,} attempts to draw and relax{judged}, then training{took}"
