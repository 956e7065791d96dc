"""Does text teach chemistry? Nats a held-out crystal of a model that has read text, and of one that has not.

    jaxcrystal prepare train.parquet val.parquet --out data/mp20
    jaxcrystal convert smollm2-135m --out models/smollm2_135m
    python benchmarks/pretraining.py --base models/smollm2_135m --data data/mp20 --runs runs/pretraining
    python benchmarks/pretraining.py ... --quick              minutes, a check that it runs; its figures mean nothing

Three ways to train the base's architecture on the same crystals in the same order: adapters on its weights, all of its
weights, all weights from random ones. Each is trained at three constant rates up to the first budget, or more, until
the best is between others; the rate with the fewest nats goes on to the other budgets. After each budget:

- `nats`: -log p of a crystal (text and end, given the unconditional prompt, not shifted), the mean over the first
  rows of the validation set with a bootstrap interval, in float32 whatever models are trained in; rates are chosen on
  the first quarter of these rows, figures are of all of them;
- `compositional`: share of attempts without grammar that are crystals whose charges could balance.

A rate that was tried in one dtype is not tried in another again. The base before any training is the row with 0
crystals. What is measured stands in the result at once, and a script that is stopped goes on from there, on this
machine or another; models lie in --runs, a folder for one --base and --data. One with more `--budgets` goes further.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np

import jaxcrystal
from jaxcrystal.config import (
    EXECUTION,
    TARGETS,
    Augment,
    DataConfig,
    LlamaConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    to_dict,
)
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import bootstrap_mean
from jaxcrystal.model.llama import Llama
from jaxcrystal.scoring.likelihood import log_probabilities
from jaxcrystal.texts.tokenizer import Tokenizer
from jaxcrystal.texts.writer import Rows, Writer
from jaxcrystal.training.loop import computed_as, train
from jaxcrystal.training.packing import Feed
from jaxcrystal.weights.saved import SavedModel, load_model, read_description

#: Neither shifted nor stating anything: the unconditional prompt, and the crystal as it is in the data.
AS_IT_IS = Augment(translate=False, infill=0.0, attribute_probability=0.0, loss_on="response")
ADAPTERS, ALL, RANDOM = "adapters", "all weights", "from random weights"
#: Settings that are newer than the first results, and here what was the only way then: results go on.
CAME_LATER = (("model", "dropout"), ("text", "form"), ("text", "properties"), ("augment", "descriptions"))
RATES = {ADAPTERS: (5e-4, 1e-3, 2e-3), ALL: (1e-4, 3e-4, 1e-3), RANDOM: (3e-4, 1e-3, 3e-3)}


@dataclass(frozen=True)
class Work:
    """What is to be done, and where."""

    base: Path
    data: Path
    runs: Path
    budgets: tuple[int, ...]
    rows: int  #: of the validation set, on which figures are taken
    samples: int
    tokens_per_row: int
    rows_per_batch: int
    search: bool  #: for a better rate beyond those tried
    dtype: str  #: that models are trained in

    @cached_property
    def validation(self) -> CrystalSet:
        return dataset.load(self.data / "val.parquet").first(self.rows)

    @property
    def chosen_on(self) -> int:
        return self.rows // 4

    @property
    def settings(self) -> dict[str, Any]:
        """Of every run, without the places of files."""
        settings = to_dict(self.recipe(ADAPTERS, RATES[ADAPTERS][0]))
        kept = {name: settings[name] for name in ("lora", "model", "text", "augment", "optimizer", "seed")}
        for part, name in (*CAME_LATER, *(("model", name) for name in ("dtype", *EXECUTION))):
            kept[part].pop(name)
        return kept | {"tokens_per_row": self.tokens_per_row, "rows_per_batch": self.rows_per_batch}

    def recipe(self, variant: str, rate: float) -> Recipe:
        # Each layer by itself: twenty seconds more to compile, and a quarter less a step than a scan of thirty.
        model = replace(read_description(self.base).model, dtype=self.dtype, scan_layers=False)
        return Recipe(
            out=str(self.runs / f"{variant.replace(' ', '_')}_{rate:g}_{self.dtype}"),
            base=None if variant == RANDOM else str(self.base),
            tokenizer=str(self.base),
            model=model if variant == RANDOM else computed_as(LlamaConfig(), model),
            lora=LoraConfig(16, 32.0, 0.0, TARGETS) if variant == ADAPTERS else None,
            augment=AS_IT_IS,
            data=DataConfig(
                train=str(self.data / "train.parquet"),
                validation=str(self.data / "val.parquet"),
                tokens_per_row=self.tokens_per_row,
                rows_per_batch=self.rows_per_batch,
                validation_rows=self.rows_per_batch,
            ),
            optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=10, final_fraction=1.0, beta2=0.98),
            mesh=MeshConfig(1, 1, 1),
            checkpoint_every=25,
            keep_checkpoints=1,
        )

    def steps(self, tokenizer: Tokenizer) -> dict[int, tuple[int, int]]:
        """For each budget, the first step after which so many crystals were seen, and how many these are."""
        recipe = self.recipe(ADAPTERS, 1.0)
        feed = _feed(recipe, dataset.load(recipe.data.train), tokenizer)
        found, seen, step, epoch = {}, 0, 0, 0
        while len(found) < len(self.budgets):
            for batch in feed.epoch(epoch):
                seen, step = seen + int((batch >= 0).sum()), step + 1
                found |= {budget: (step, seen) for budget in self.budgets if seen >= budget and budget not in found}
            epoch += 1
        return found


def _feed(recipe: Recipe, crystals: CrystalSet, tokenizer: Tokenizer) -> Feed:
    writer = Writer.of(tokenizer, recipe.text, recipe.augment)
    return Feed.of(
        crystals, tokenizer, writer, recipe.data.tokens_per_row, recipe.data.rows_per_batch, seed=recipe.seed
    )


def nats(model: SavedModel, recipe: Recipe, crystals: CrystalSet) -> np.ndarray:
    """-log p of each crystal's own text and its end, given the unconditional prompt; [crystals]."""
    feed = _feed(recipe, crystals, model.tokenizer)
    module = Llama(replace(model.config, dtype="float32", scan_layers=True), model.lora)

    @jax.jit
    def of_batch(variables: dict[str, Any], crystals: Any) -> tuple[Rows, jax.Array]:
        rows = feed.writer.write(crystals, feed.writer.draw(feed.key(0), crystals), feed.row_length)
        return rows, log_probabilities(module, variables, rows)

    result = np.zeros(len(crystals))
    for table in feed.epoch(0):
        rows, log_p = jax.device_get(of_batch(model.variables, feed.batch(table)))
        for row in range(len(table)):
            there = rows.segments[row] > 0
            np.subtract.at(result, table[row][rows.segments[row, there] - 1], log_p[row, there])
    return result


def measured(work: Work, recipe: Recipe, folder: Path, model_dir: Path, count: int) -> np.ndarray:
    """`nats` of the first `count` crystals of the validation set, taken once."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [np.load(path) for path in sorted(folder.glob("nats_*.npy")) if int(path.stem[5:]) >= count]
    if not found:
        found = [nats(load_model(model_dir), recipe, work.validation.first(count))]
        np.save(folder / f"nats_{count}.npy", found[0])
    return found[0][:count]


def composition(work: Work, folder: Path, model_dir: Path) -> dict[str, Any]:
    """How many of some attempts without grammar have a composition whose charges could balance; drawn once."""
    path = folder / f"composition_{work.samples}.json"
    if not path.exists():
        settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 400, "dtype": "float32"}
        with jaxcrystal.load(model_dir, grammar=False, **settings) as sampler:
            attempts = sampler.sample(work.samples, seed=1)
        found = jaxcrystal.evaluate(attempts).metrics
        told = {
            "attempts": found["counts"]["attempts"],
            "constructed": found["counts"]["constructed"],
            "compositional": found["validity"]["compositional"],
            "compositional_interval": found["confidence_95"]["validity.compositional"],
        }
        path.write_text(json.dumps(told))
    return json.loads(path.read_text())


def measure(work: Work, result: dict[str, Any], write: Callable[[], object]) -> None:
    """Does what `result` lacks; calls `write` after each rate and each figure."""
    tokenizer = read_description(work.base).tokenizer(work.base)
    steps = work.steps(tokenizer)
    first = work.budgets[0]

    def after(variant: str, rate: float, budget: int) -> tuple[Recipe, Path]:
        """What trains up to a budget, and where its figures then lie."""
        recipe = replace(work.recipe(variant, rate), epochs=None, steps=steps[budget][0])
        return recipe, Path(recipe.out) / f"after_{budget}"

    def point(variant: str, rate: float | None, crystals: int, folder: Path, recipe: Recipe, base: Path | None) -> None:
        """A figure that is not there; of the model in `base`, or of what the recipe trains."""
        wanted = {"variant": variant, "crystals": crystals, "trained_in": None if base else work.dtype}
        if any(wanted.items() <= known.items() for known in result["points"]):
            return
        done = (folder / f"nats_{work.rows}.npy", folder / f"composition_{work.samples}.json")
        if base is None and not all(path.exists() for path in done):
            _finish(recipe)
        model = base or Path(recipe.out)
        values = measured(work, recipe, folder, model, work.rows)
        low, high = bootstrap_mean(values)
        found = wanted | {
            "rate": rate,
            "nats": float(values.mean()),
            "interval": [low, high],
            "crystals_of_validation": len(values),
            **composition(work, folder, model),
        }
        result["points"].append(found)
        _report(f"{variant}, {crystals} crystals: {found['nats']:.1f} nats")
        write()

    untrained = work.recipe(ADAPTERS, RATES[ADAPTERS][0])
    point("base", None, 0, work.runs / "base", untrained, work.base)
    best = {}
    for variant, rates in RATES.items():
        tried = result["rates"].setdefault(variant, {})
        while rates := [rate for rate in rates if f"{rate:g}" not in tried] or (_beyond(tried) if work.search else []):
            recipe, folder = after(variant, rates[0], first)
            if not list(folder.glob("nats_*.npy")):
                _report(f"{variant}, rate {rates[0]:g}, up to {first} crystals")
                _finish(recipe)
            found = float(measured(work, recipe, folder, Path(recipe.out), work.chosen_on).mean())
            tried[f"{rates[0]:g}"] = {"nats": found, "trained_in": work.dtype}
            _report(f"{variant}, rate {rates[0]:g}: {found:.1f} nats after {first} crystals")
            write()
        best[variant] = _best(tried)
    for budget in work.budgets:
        for variant, rate in best.items():
            recipe, folder = after(variant, rate, budget)
            point(variant, rate, steps[budget][1], folder, recipe, None)


def _best(tried: dict[str, dict[str, Any]]) -> float:
    """The rate with the fewest nats."""
    return float(min(tried, key=lambda rate: tried[rate]["nats"]))


def _beyond(tried: dict[str, dict[str, Any]]) -> list[float]:
    """The rate to be tried next, as long as the best is the lowest or the highest of all; else none."""
    low, next_to_it, *_ = sorted(map(float, tried))
    step, best = next_to_it / low, _best(tried)
    beyond = {low: best / step, max(map(float, tried)): best * step}.get(best)
    return [] if beyond is None else [float(f"{beyond:.1g}")]


def _finish(recipe: Recipe) -> None:
    """Up to the recipe's last step. Raises SystemExit where a signal stopped it: what was done is saved."""
    if (report := train(recipe)).stopped:
        raise SystemExit(f"stopped after {report.steps} steps of {recipe.out}; the same command goes on")


def _report(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a model directory of `jaxcrystal convert`")
    parser.add_argument("--data", type=Path, required=True, help="a folder of `jaxcrystal prepare`")
    parser.add_argument("--runs", type=Path, required=True, help="where everything that was done is kept")
    parser.add_argument("--budgets", type=int, nargs="+", default=[500, 1000, 2000, 4000], help="crystals seen")
    parser.add_argument("--rows", type=int, default=1000, help="of the validation set (1000)")
    parser.add_argument("--samples", type=int, default=100, help="attempts without grammar (100)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of training (bfloat16)")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.budgets, chosen.rows, chosen.samples = [10, 20], 8, 2
    work = Work(
        base=chosen.base.resolve(),
        data=chosen.data.resolve(),
        runs=chosen.runs.resolve(),
        budgets=tuple(sorted(chosen.budgets)),
        rows=chosen.rows,
        samples=chosen.samples,
        tokens_per_row=1024,
        rows_per_batch=1 if chosen.quick else 2,
        search=not chosen.quick,
        dtype=chosen.dtype,
    )
    measured = machine.facts(uses_accelerator=True)
    asked = {"benchmark": "pretraining", "quick": chosen.quick, "data": chosen.data.name}
    asked |= {"base": to_dict(read_description(work.base))["source"], "first": work.budgets[0], "rows": work.rows}
    asked |= {"recipe": work.settings}
    result, path = asked | {"rates": {}, "points": []}, machine.place("pretraining", measured, chosen.out)
    for there in sorted(chosen.out.glob("pretraining_*.json")):  # of another machine too: nats are the same
        before = json.loads(there.read_text())
        if before.items() >= asked.items():
            result, path = before, there
    measure(work, result, lambda: machine.write_to(path, result | {"measured": measured}))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"pretraining.py: {error}")
