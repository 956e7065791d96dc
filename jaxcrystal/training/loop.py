"""Training from a recipe to a model directory: `jaxcrystal train CONFIG`.

    OUT/recipe.yaml        the recipe, as it was run
    OUT/num_atoms.json     of the training set, by size of formula (`crystals.num_atoms`)
    OUT/formulas.txt       of the training set (`crystals.known_formulas`)
    OUT/labels.parquet     the numbers that its prompts may state (`crystals.training_labels`)
    OUT/metrics.jsonl      a line every `log_every` steps, every validation, every start: one JSON object each
    OUT/model.json, tokenizer.model, checkpoints/    what `jaxcrystal sample --model OUT` reads

OUT is a folder, or `gs://BUCKET/FOLDER`; then metrics.jsonl grows in runs/BUCKET/FOLDER of this machine, beside which
the run's lock lies too, and is uploaded whole with each checkpoint.

A second start of the same recipe goes on where the last checkpoint was taken; so does one with other `steps`, which is
how a finished run is made longer (docs/training.md).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import yaml
from jaxtyping import Int, PRNGKeyArray
from tqdm import tqdm

from jaxcrystal import hosts, locks, paths
from jaxcrystal.config import EXECUTION, LlamaConfig, Recipe, from_dict, to_dict
from jaxcrystal.crystals import dataset, known_formulas, num_atoms, training_labels
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import batch_sharding, check_activations, make_mesh
from jaxcrystal.model.kernels import count_weights
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.paths import AnyPath
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer
from jaxcrystal.texts.writer import Writer
from jaxcrystal.training import pairs, speed
from jaxcrystal.training.checkpoint import Checkpoints, Place
from jaxcrystal.training.identity import Identity, differing
from jaxcrystal.training.interrupt import Interrupt
from jaxcrystal.training.journal import Journal
from jaxcrystal.training.packing import Feed, check_infilling, check_properties
from jaxcrystal.training.preferences import PreferenceTrainer
from jaxcrystal.training.step import StepMetrics, Trainer, TrainState, make_optimizer
from jaxcrystal.weights import saved
from jaxcrystal.weights.fingerprint import fingerprint

#: Which crystals stand in each row of a batch, as `Feed.epoch` has it.
Table = Int[np.ndarray, "rows slots"]


@dataclass(frozen=True)
class TrainReport:
    """How a run ended."""

    out: AnyPath
    steps: int
    loss: float | None  #: of the last step, nats per token; None if an earlier start had done them all
    validation_loss: float | None  #: after the last step; None likewise
    stopped: signal.Signals | None = None  #: what stopped the run before its end; it is saved and can go on


@locks.holds(lambda recipe: paths.on_disk(recipe.out), hosts.held)
def train(recipe: Recipe) -> TrainReport:
    """Runs `recipe`, or what is left of it. Raises UserError for whatever in the recipe cannot be run."""
    if recipe.lora is not None and recipe.base is None:
        raise UserError("lora has adapters on a frozen model, and the recipe has none: set `base`, or leave `lora` out")
    out = paths.as_path(recipe.out)
    mesh = make_mesh(recipe.mesh)
    shape = recipe.model if recipe.base is None else saved.read_description(saved.model_directory(recipe.base)).model
    check_activations(mesh, shape, recipe.data.rows_per_batch, recipe.data.accumulate)
    tokenizer, config, variables, checksum = _start(recipe, mesh)
    writer = Writer.of(tokenizer, recipe.text, recipe.augment)
    with hosts.together():
        crystals = dataset.load(recipe.data.train)
        check_properties(crystals, recipe.text.properties)
        feed, validation = (
            Feed.of(one, tokenizer, writer, recipe.data.tokens_per_row, recipe.data.rows_per_batch, seed)
            for one, seed in ((crystals, recipe.seed), (dataset.load(recipe.data.validation), 0))
        )
        if recipe.preferences is None:
            check_infilling(feed, crystals)
            steps_on = feed
        else:  # pairs of generated crystals: nothing is infilled
            steps_on = pairs.feed(recipe, crystals, tokenizer, writer)
    if recipe.data.tokens_per_row > config.max_position_embeddings:
        raise UserError(
            f"data.tokens_per_row is {recipe.data.tokens_per_row}, the model's context is "
            f"{config.max_position_embeddings} (model.max_position_embeddings); take shorter rows or a longer context"
        )
    steps = math.ceil((recipe.epochs or 0) * len(steps_on.epoch(0))) if recipe.steps is None else recipe.steps
    if steps < 1:
        raise UserError("the recipe has no steps; set `steps` or `epochs`")
    parts = (
        Llama(config, recipe.lora),
        writer,
        make_optimizer(recipe.optimizer, steps),
        mesh,
        recipe.data.tokens_per_row,
        recipe.data.loss_block,
        recipe.data.accumulate,
    )
    if recipe.preferences is None:
        trainer = Trainer(*parts)
    else:
        trainer = PreferenceTrainer(*parts, pair_writer=steps_on.writer, preferences=recipe.preferences)
    with hosts.together():
        if hosts.is_first():
            _check_same(out, recipe)
            base = None if recipe.base is None else saved.model_directory(recipe.base)
            saved.describe(out, config, recipe.lora, recipe.text, tokenizer, base)
    with hosts.together():
        if not (out / saved.MODEL_FILE).exists():
            raise UserError(f"{out} is another folder on this host; `out` must be on a disk that all see, or gs://...")
    with Checkpoints(out, recipe.keep_checkpoints, Identity.of(recipe, steps_on, validation)) as checkpoints:
        state, place, remarks = checkpoints.restore(trainer, trainer.start(variables))
        if state.step > steps:
            raise UserError(f"{out} has done {state.step} steps, the recipe has {steps}; raise `steps` or `epochs`")
        with hosts.together():
            if hosts.is_first():
                _write_recipe(out, recipe)
                if checksum is not None:
                    saved.record_checksum(out, checksum)
                if recipe.preferences is None or base is None:
                    num_atoms.store(feed.examples.crystals, out)
                    known_formulas.store(known_formulas.found(feed.examples.crystals), out)
                    training_labels.store(feed.labels, out)
                else:  # pairs teach no new crystals: what is known is what the base knows
                    saved.copy_of_training(base, out, saved.OF_DATA)
        return _Run(recipe, trainer, steps_on, validation, checkpoints, steps).go(
            state, place, [*remarks, *feed.told()]
        )


def _start(recipe: Recipe, mesh: jax.sharding.Mesh) -> tuple[Tokenizer, LlamaConfig, dict[str, Any], str | None]:
    """Tokenizer, model shape and first variables: of the base, or random. For adapters, the float weights below them:
    as the base names them, or its own if it is float; None if a quantized base does not say."""
    if recipe.base is None:
        tokenizer = load_tokenizer(recipe.tokenizer)
        config = replace(recipe.model, vocab_size=tokenizer.vocab_size)
        return tokenizer, config, initialize(Llama(config, recipe.lora), jax.random.key(recipe.seed), mesh), None
    base = saved.load_model(saved.model_directory(recipe.base), mesh)
    if base.lora is not None:
        raise UserError(f"base {recipe.base} is a run with adapters of its own; give the model that it was trained on")
    if recipe.model.weights not in ("float", base.config.weights):
        raise UserError(
            f"model.weights is {recipe.model.weights!r}, but base {recipe.base} holds {base.config.weights} weights; "
            f"make a base with `jaxcrystal convert --weights {recipe.model.weights}`"
        )
    config = computed_as(base.config, recipe.model)
    variables = base.variables
    checksum = None
    if recipe.lora is not None:
        checksum = base.float_checksum
        if checksum is None and config.weights == "float":
            checksum = fingerprint(base.params)
        variables |= initialize(Llama(config, recipe.lora), jax.random.key(recipe.seed), mesh, ["lora"])
    return base.tokenizer, config, variables, checksum


def computed_as(base: LlamaConfig, model: LlamaConfig) -> LlamaConfig:
    """The shape of a base, computed in the way that a recipe's `model` sets."""
    return replace(base, **{name: getattr(model, name) for name in ("dtype", "dropout", *EXECUTION)})


def _check_same(out: AnyPath, recipe: Recipe) -> None:
    """Raises UserError if the directory holds a run of another recipe."""
    path = out / "recipe.yaml"
    if not path.exists():
        return
    theirs = from_dict(Recipe, yaml.safe_load(path.read_text()), str(path))
    if found := differing(theirs, to_dict(recipe)):
        raise UserError(f"{out} holds a run of another recipe ({'; '.join(found)}); set another `out`, or remove {out}")


def _write_recipe(out: AnyPath, recipe: Recipe) -> None:
    """All at once: a run that is killed here leaves the recipe that was there, or none."""
    try:
        paths.write(out / "recipe.yaml", yaml.safe_dump(to_dict(recipe), sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; set another `out`") from None


class _Run:
    """The loop itself: steps, what is logged of them, what is saved."""

    def __init__(
        self, recipe: Recipe, trainer: Trainer, feed: Feed, validation: Feed, checkpoints: Checkpoints, steps: int
    ) -> None:
        self.recipe, self.trainer, self.feed, self.validation = recipe, trainer, feed, validation
        self.checkpoints, self.steps = checkpoints, steps
        self.rows = batch_sharding(trainer.mesh)

    @cached_property
    def _validated(self) -> Int[np.ndarray, "batches rows slots"]:
        """Which crystals each validation reads: the first rows of the set, packed once."""
        return self.validation.epoch(0)[: -(-self.recipe.data.validation_rows // self.validation.rows_per_batch)]

    def go(self, state: TrainState, start: Place, remarks: Sequence[str] = ()) -> TrainReport:
        """From `state`, whose next batch is at `start`, to the last step, or until a signal stops it."""
        step = done = int(state.step)
        out = paths.as_path(self.recipe.out)
        self.journal = Journal(out / "metrics.jsonl", done, silent=not hosts.is_first())
        for remark in remarks if hosts.is_first() else ():
            tqdm.write(remark)
            self.journal.write("damaged", done, remark=remark)
        train_step, eval_step = self._compile(state)
        loss, validation_loss, window, best = None, None, [], self.checkpoints.best_loss()
        since = time.perf_counter()
        bar = tqdm(
            total=self.steps, initial=done, unit="step", desc="train", dynamic_ncols=True, disable=not hosts.is_first()
        )
        with self.journal, bar, Interrupt() as interrupt:
            for step, key, crystals, place in self._batches(done, start):
                state, metrics = train_step(state, self.feed.placed(crystals, self.rows), key)
                if window:  # one step waits behind the one that runs, no more: a signal must not wait for them all
                    jax.block_until_ready(window[-1][1])
                window.append((crystals, metrics))
                stop = interrupt.after(step)
                save = step % self.recipe.checkpoint_every == 0 or step == self.steps
                # What is saved is validated first: the loss after the last update is unknown, and may be nan.
                validate = step % self.recipe.validate_every == 0 or save or stop
                if step % self.recipe.log_every == 0 or validate:
                    loss = self._log(step, place, window, since)
                    since, window = time.perf_counter(), []
                if stop:  # not so behind a signal: a machine that is taken away may leave no time for both
                    self._save(state, place)
                    self.checkpoints.wait()
                if validate:
                    validation_loss = self._validate(step, eval_step, state, crystals)
                    if not stop and (save or validation_loss < best):
                        self._save(state, place, validation_loss)
                    best = min(best, validation_loss)
                    since = time.perf_counter()
                shown = {"loss": loss, "validation": validation_loss}
                values = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
                bar.set_postfix(values, refresh=False)
                bar.update(step - bool(window) - bar.n)  # steps that are done
                if stop:
                    self.journal.write("stopped", step, signal=interrupt.signal.name)
                    break
        stopped = interrupt.signal if step < self.steps else None
        return TrainReport(out, step, loss, validation_loss, stopped)

    def _save(self, state: TrainState, place: Place, validation_loss: float | None = None) -> None:
        self.journal.upload()
        self.checkpoints.save(self.trainer, state, place, validation_loss)

    def _compile(self, state: TrainState) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Both steps; logs how long compiling the first took, and what speed will be measured against."""
        started = time.perf_counter()
        train_step = self.trainer.compile_train(state, self.feed.placed(self.feed.nothing().index, self.rows))
        seconds = time.perf_counter() - started
        eval_step = self.trainer.compile_eval(state, self.validation.placed(self.validation.nothing().index, self.rows))
        device = jax.local_devices()[0]
        peak, origin = speed.peak_flops(device, self.trainer.model.config.dtype)
        self.peak = peak * self.trainer.mesh.size
        variables = self.trainer.variables(state)
        self.multiplied = speed.Multiplied.of(self.trainer.model.config, variables, self.trainer.collection)
        self.journal.write(
            "start",
            int(state.step),
            steps=self.steps,
            crystals=len(self.feed.examples.index),
            compile_seconds=seconds,
            mesh=dict(self.trainer.mesh.shape),
            device=device.device_kind,
            weights={name: count_weights(tree) for name, tree in variables.items()},
            trained=self.trainer.collection,
            attention=self.trainer.attention(self.feed.rows_per_batch),
            mfu_formula=speed.FORMULA,
            peak_flops=self.peak,
            peak_from=origin,
        )
        return train_step, eval_step

    def _batches(self, step: int, place: Place) -> Iterator[tuple[int, PRNGKeyArray, Table, Place]]:
        """Number of the step, key, crystals of the batch, where the next one is; from `place` until all are done."""
        epoch, batch = place.epoch, place.batch
        while step < self.steps:
            key, table = self.feed.key(epoch), self.feed.epoch(epoch)
            while batch < len(table) and step < self.steps:
                step, batch = step + 1, batch + 1
                after = Place(epoch, batch) if batch < len(table) else Place(epoch + 1, 0)
                yield step, key, table[batch - 1], after
            epoch, batch = epoch + 1, 0

    def _log(self, step: int, place: Place, window: list[tuple[Table, StepMetrics]], since: float) -> float:
        """Logs the steps since the last log; returns the last loss.

        Raises UserError if a loss or gradient is nan or infinite, before such weights can be saved.
        """
        measured = jax.device_get([metrics for _, metrics in window])
        seconds = time.perf_counter() - since
        for number, ((crystals, _), metrics) in enumerate(zip(window, measured, strict=True), step - len(measured) + 1):
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
                values = {"loss": float(metrics.loss), "norm of the gradient": float(metrics.grad_norm)}
                self._give_up(f"at step {number}", number, values, crystals)
        loss = float(measured[-1].loss)
        written, crystals = sum(int(m.written) for m in measured), sum(int(m.crystals) for m in measured)
        flops = written * self.multiplied.flops_per_token(context=written / crystals)
        self.journal.write(
            "train",
            step,
            epoch=place.epoch,
            loss=loss,
            losses=[float(m.loss) for m in measured],
            grad_norm=float(measured[-1].grad_norm),
            **{name: float(np.mean([getattr(m, name) for m in measured])) for name in measured[-1].TOLD},
            step_seconds=seconds / len(measured),
            tokens_per_second=written / seconds,
            crystals_per_second=crystals / seconds,
            mfu=flops / seconds / self.peak,
            padding=1 - written / (len(measured) * self.feed.rows_per_batch * self.feed.row_length),
        )
        return loss

    def _give_up(self, when: str, step: int, values: dict[str, float], crystals: Table) -> None:
        """Ends a run whose loss or gradient is not finite, naming the crystals of the batch of `step`."""
        names = self.feed.names(crystals)
        self.journal.write("no_number", step, values={name: repr(x) for name, x in values.items()}, crystals=names)
        what = " and ".join(f"the {name} is {value}" for name, value in values.items())
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"{when} {what}, on the crystals {shown} (all of them in metrics.jsonl); the checkpoint before it is kept "
            f"in {self.recipe.out}. A lower optimizer.learning_rate may help"
        )

    def _validate(self, step: int, eval_step: Callable[..., StepMetrics], state: TrainState, last: Table) -> float:
        """Mean loss over the first rows of the validation set, always the same rows and draws.

        Raises UserError if it is not finite, naming `last`, the crystals of the step before.
        """
        key = self.validation.key(0)
        batches = [self.validation.placed(batch, self.rows) for batch in self._validated]
        measured = jax.device_get([eval_step(state, batch, key) for batch in batches])
        tokens = sum(int(m.tokens) for m in measured)
        loss = sum(float(m.loss) * int(m.tokens) for m in measured) / tokens
        if not math.isfinite(loss):
            self.checkpoints.remove(step)
            self._give_up(f"after step {step}", step, {"validation loss": loss}, last)
        self.journal.write(
            "validation", step, loss=loss, tokens=tokens, crystals=sum(int(m.crystals) for m in measured)
        )
        return loss
