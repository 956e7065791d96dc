"""Training from a recipe to a model directory: `jaxcrystal train CONFIG`.

    OUT/recipe.yaml        the recipe, as it was run
    OUT/metrics.jsonl      a line every `log_every` steps, every validation, every start: one JSON object each
    OUT/model.json, tokenizer.model, checkpoints/    what `jaxcrystal sample --model OUT` reads

A second start of the same recipe goes on where the last checkpoint was taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import yaml
from jaxtyping import PRNGKeyArray
from tqdm import tqdm

from jaxcrystal.config import LlamaConfig, Recipe, from_dict, to_dict
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.tokenizer import SentencePieceTokenizer, load_tokenizer
from jaxcrystal.crystals.writer import Examples, TokenTables, Writer
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, make_mesh
from jaxcrystal.model import saved
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.train import speed
from jaxcrystal.train.checkpoint import Checkpoints, Place
from jaxcrystal.train.journal import Journal
from jaxcrystal.train.packing import Feed
from jaxcrystal.train.step import StepMetrics, Trainer, TrainState, make_optimizer

#: Keys that may differ between a run and its continuation: they change what is told and kept, not what is computed.
FREE = {"out", "log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints", "mesh"}


@dataclass(frozen=True)
class TrainReport:
    """How a run ended."""

    out: Path
    steps: int
    loss: float | None  #: of the last step, nats per token; None if an earlier start had done them all
    validation_loss: float | None  #: after the last step; None likewise


def train(recipe: Recipe) -> TrainReport:
    """Runs `recipe`, or what is left of it. Raises UserError for whatever in the recipe cannot be run."""
    out = Path(recipe.out)
    mesh = make_mesh(recipe.mesh)
    rows_divided, micro = mesh.shape["data"] * mesh.shape["fsdp"], recipe.data.accumulate
    if recipe.data.rows_per_batch % (rows_divided * micro):
        raise UserError(
            f"data.rows_per_batch is {recipe.data.rows_per_batch}; mesh axes data x fsdp divide it by {rows_divided} "
            f"and data.accumulate by {micro}, so it must be a multiple of {rows_divided * micro}"
        )
    tokenizer, config, variables = _start(recipe, mesh)
    writer = Writer(TokenTables.build(tokenizer), recipe.text, recipe.augment)
    feed, validation = (
        Feed.of(dataset.load(path), tokenizer, writer, recipe.data.tokens_per_row, recipe.data.rows_per_batch, seed)
        for path, seed in ((recipe.data.train, recipe.seed), (recipe.data.validation, 0))
    )
    if recipe.data.tokens_per_row > config.max_position_embeddings:
        raise UserError(
            f"data.tokens_per_row is {recipe.data.tokens_per_row}, the model's context is "
            f"{config.max_position_embeddings} (model.max_position_embeddings); take shorter rows or a longer context"
        )
    steps = math.ceil((recipe.epochs or 0) * len(feed.epoch(0))) if recipe.steps is None else recipe.steps
    if steps < 1:
        raise UserError("the recipe asks for no steps; set `steps` or `epochs`")
    trainer = Trainer(
        Llama(config, recipe.lora),
        writer,
        make_optimizer(recipe.optimizer, steps),
        mesh,
        recipe.data.tokens_per_row,
        recipe.data.loss_block,
        recipe.data.accumulate,
    )
    _check_same(out, recipe)
    try:
        saved.describe(out, config, recipe.lora, recipe.text, tokenizer.path, recipe.base)
        (out / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; set another `out`") from None
    checkpoints = Checkpoints(out, recipe.keep_checkpoints)
    try:
        state, place = checkpoints.restore(trainer, trainer.start(variables))
        return _Run(recipe, trainer, feed, validation, checkpoints, steps).go(state, place)
    finally:
        checkpoints.close()


def _start(recipe: Recipe, mesh: jax.sharding.Mesh) -> tuple[SentencePieceTokenizer, LlamaConfig, dict[str, Any]]:
    """Tokenizer, model shape and first variables: of the base, or random."""
    if recipe.base is None:
        tokenizer = load_tokenizer(recipe.tokenizer)
        config = replace(recipe.model, vocab_size=tokenizer.vocab_size)
        return tokenizer, config, initialize(Llama(config, recipe.lora), jax.random.key(recipe.seed), mesh)
    base = saved.load_model(recipe.base, mesh)
    if base.lora is not None:
        raise UserError(f"base {recipe.base} is a run with adapters of its own; give the model that it was trained on")
    ours = ("dtype", "scan_layers", "attention", "remat")  # how the base's shape is computed
    config = replace(base.config, **{name: getattr(recipe.model, name) for name in ours})
    variables = base.variables
    if recipe.lora is not None:
        variables |= initialize(Llama(config, recipe.lora), jax.random.key(recipe.seed), mesh, ["lora"])
    return load_tokenizer(base.tokenizer_path), config, variables


def _check_same(out: Path, recipe: Recipe) -> None:
    """Raises UserError if the directory holds a run of another recipe."""
    path = out / "recipe.yaml"
    if not path.exists():
        return
    theirs = from_dict(Recipe, yaml.safe_load(path.read_text()), str(path))
    if differing := _differing(to_dict(theirs), to_dict(recipe)):
        raise UserError(
            f"{out} holds a run of another recipe ({'; '.join(differing)}); set another `out`, or remove {out}"
        )


def _differing(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in ours.items():
        if key in FREE:
            continue
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += _differing(other, value, f"{prefix}{key}.")
        elif other != value:
            found.append(f"{prefix}{key} is {other} there, {value} here")
    return found


class _Run:
    """The loop itself: steps, what is told of them, what is saved."""

    def __init__(
        self, recipe: Recipe, trainer: Trainer, feed: Feed, validation: Feed, checkpoints: Checkpoints, steps: int
    ) -> None:
        self.recipe, self.trainer, self.feed, self.validation = recipe, trainer, feed, validation
        self.checkpoints, self.steps = checkpoints, steps

    def go(self, state: TrainState, start: Place) -> TrainReport:
        """From `state`, whose next batch is at `start`, to the last step."""
        step = done = int(state.step)
        self.journal = Journal(Path(self.recipe.out) / "metrics.jsonl", done)
        train_step, eval_step = self._compile(state)
        loss, validation_loss, window = None, None, []
        since = time.perf_counter()
        with tqdm(total=self.steps, initial=done, unit="step", desc="train", dynamic_ncols=True) as bar:
            for step, key, batch, place in self._batches(done, start):
                state, metrics = train_step(state, batch, key)
                window.append(metrics)
                last = step == self.steps
                if step % self.recipe.log_every == 0 or last:
                    loss = self._log(step, place, window, since)
                    since, window = time.perf_counter(), []
                if step % self.recipe.validate_every == 0 or last:
                    validation_loss = self._validate(step, eval_step, state)
                    since = time.perf_counter()
                if step % self.recipe.checkpoint_every == 0 or last:
                    self.checkpoints.save(self.trainer, state, place)
                shown = {"loss": loss, "validation": validation_loss}
                told = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
                bar.set_postfix(told, refresh=False)
                bar.update()
        return TrainReport(Path(self.recipe.out), step, loss, validation_loss)

    def _compile(self, state: TrainState) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Both steps; tells the journal how long the first took, and what speed will be measured against."""
        started = time.perf_counter()
        train_step = self.trainer.compile_train(state, self._place(self.feed.nothing()))
        seconds = time.perf_counter() - started
        eval_step = self.trainer.compile_eval(state, self._place(self.validation.nothing()))
        device = self.trainer.mesh.devices.flat[0]
        peak, origin = speed.peak_flops(device)
        self.peak = peak * self.trainer.mesh.size
        variables = self.trainer.variables(state)
        self.multiplied = speed.Multiplied.of(self.trainer.model.config, variables, self.trainer.collection)
        self.journal.tell(
            "start",
            int(state.step),
            steps=self.steps,
            crystals=len(self.feed.examples.index),
            compile_seconds=seconds,
            mesh=dict(self.trainer.mesh.shape),
            device=device.device_kind,
            weights={name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in variables.items()},
            trained=self.trainer.collection,
            attention=self.trainer.attention(self.feed.rows_per_batch),
            mfu_formula=speed.FORMULA,
            peak_flops=self.peak,
            peak_from=origin,
        )
        return train_step, eval_step

    def _batches(self, step: int, place: Place) -> Iterator[tuple[int, PRNGKeyArray, Examples, Place]]:
        """Number of the step, key, batch, and where the next batch is; from `place` until all steps are done."""
        epoch, batch = place.epoch, place.batch
        while step < self.steps:
            key, table = self.feed.key(epoch), self.feed.epoch(epoch)
            while batch < len(table) and step < self.steps:
                step, batch = step + 1, batch + 1
                after = Place(epoch, batch) if batch < len(table) else Place(epoch + 1, 0)
                yield step, key, self._place(self.feed.batch(table[batch - 1])), after
            epoch, batch = epoch + 1, 0

    def _place(self, examples: Examples) -> Examples:
        return jax.device_put(examples, batch_sharding(self.trainer.mesh))

    def _log(self, step: int, place: Place, window: list[StepMetrics], since: float) -> float:
        """Tells of the steps since the last log; returns the last loss. Raises UserError if that is no number."""
        told = jax.device_get(window)
        seconds = time.perf_counter() - since
        loss = float(told[-1].loss)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step} (epoch {place.epoch}, before batch {place.batch}); the checkpoint "
                f"before it is kept in {self.recipe.out}. A lower optimizer.learning_rate may help"
            )
        written, crystals = sum(int(m.written) for m in told), sum(int(m.crystals) for m in told)
        flops = written * self.multiplied.flops_per_token(context=written / crystals)
        self.journal.tell(
            "train",
            step,
            epoch=place.epoch,
            loss=loss,
            losses=[float(m.loss) for m in told],
            grad_norm=float(told[-1].grad_norm),
            step_seconds=seconds / len(told),
            tokens_per_second=written / seconds,
            crystals_per_second=crystals / seconds,
            mfu=flops / seconds / self.peak,
            padding=1 - written / (len(told) * self.feed.rows_per_batch * self.feed.row_length),
        )
        return loss

    def _validate(self, step: int, eval_step: Callable[..., StepMetrics], state: TrainState) -> float:
        """Mean loss over the first rows of the validation set, always the same rows and draws."""
        batches = -(-self.recipe.data.validation_rows // self.validation.rows_per_batch)
        key, table = self.validation.key(0), self.validation.epoch(0)[:batches]
        told = jax.device_get([eval_step(state, self._place(self.validation.batch(b)), key) for b in table])
        tokens = sum(int(m.tokens) for m in told)
        loss = sum(float(m.loss) * int(m.tokens) for m in told) / tokens
        self.journal.tell("validation", step, loss=loss, tokens=tokens, crystals=sum(int(m.crystals) for m in told))
        return loss
