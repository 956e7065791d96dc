"""Checkpoints of a run: weights that `sample` can read, and beside them what training needs to go on.

    OUT/checkpoints/STEP/weights     {"params": ...} or {"lora": ...}: the same item that `model.saved` reads
    OUT/checkpoints/STEP/training    optimizer and step
    OUT/checkpoints/STEP/place       as JSON: where in the data the next step begins, fingerprints of what was saved and
                                     of the frozen weights below it

Orbax writes a step beside its place and moves it there when it is complete: a kill leaves no half checkpoint. What was
damaged later does not have its fingerprint any more, and the checkpoint before it is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from orbax.checkpoint import checkpoint_managers as managers

from jaxcrystal.errors import UserError
from jaxcrystal.mesh import is_first_host, wait_for_hosts
from jaxcrystal.model.fingerprint import fingerprint
from jaxcrystal.model.saved import CHECKPOINTS
from jaxcrystal.train.step import Trainer, TrainState


@dataclass(frozen=True)
class Place:
    """Where in the data a step begins."""

    epoch: int = 0
    batch: int = 0


class Damaged(Exception):
    """A checkpoint that cannot be read, or is not what was saved."""


class Checkpoints:
    """The checkpoints of one run's directory, written while training goes on.

    Of all, the last `keep` stay, and the one of the lowest validation loss.
    """

    def __init__(self, out: Path, keep: int) -> None:
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics["validation_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
            enable_async_checkpointing=True,
        )
        self._path = (out / CHECKPOINTS).resolve()
        self._frozen = ""  # fingerprint of the frozen weights, which is the same for all steps
        with self._writing():
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def save(self, trainer: Trainer, state: TrainState, place: Place, validation_loss: float | None = None) -> None:
        """Starts writing this state; a step that is already there is left as it is.

        `validation_loss` is the loss at this very step, if it was taken. Raises UserError if the disk does not take it.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        saved = _arrays(trainer, state)
        identity = {"saved": fingerprint(saved), "frozen": self._frozen or fingerprint(state.frozen)}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardSave(saved["weights"]),
                    training=ocp.args.StandardSave({"optimizer": state.optimizer, "step": state.step}),
                    place=ocp.args.JsonSave(asdict(place) | identity),
                ),
                metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            )

    def restore(self, trainer: Trainer, start: TrainState) -> tuple[TrainState, Place, list[str]]:
        """The latest whole state, laid out as `start` is (whatever mesh it was saved from); where it goes on; and what
        is to be said of damaged checkpoints, which are moved aside. `start` itself if none is saved.

        Raises UserError if the checkpoint does not fit the model, the optimizer or the frozen weights of this run.
        """
        self._frozen = fingerprint(start.frozen)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, place, identity = self._read(step, trainer, start)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            if identity["frozen"] != self._frozen:
                raise UserError(
                    f"{self._path / str(step)} belongs to a base of other weights (fingerprint {identity['frozen']}, "
                    f"now {self._frozen}); put the former base back, or set another `out`"
                )
            return state, place, [self._set_aside(step, reason) for step, reason in damaged.items()]
        if damaged:
            told = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise UserError(
                f"no checkpoint in {self._path} is whole ({told}); remove {self._path.parent} to start over"
            )
        return start, Place(), []

    def _read(self, step: int, trainer: Trainer, start: TrainState) -> tuple[TrainState, Place, dict[str, str]]:
        weights = {trainer.collection: start.trained}
        training = {"optimizer": start.optimizer, "step": start.step}
        handler = ocp.StandardCheckpointHandler()
        try:
            found = {item: handler.metadata(self._path / str(step) / item).tree for item in ("weights", "training")}
        except Exception as error:
            raise Damaged(_reason(error)) from None
        finally:
            handler.close()
        self._check_fit(step, found, {"weights": weights, "training": training})

        def like(tree: object) -> object:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

        try:
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardRestore(like(weights)),
                    training=ocp.args.StandardRestore(like(training)),
                    place=ocp.args.JsonRestore(),
                ),
            )
            place = Place(saved.place["epoch"], saved.place["batch"])
            identity = {name: saved.place[name] for name in ("saved", "frozen")}
        except Exception as error:  # of a damaged file, Orbax, TensorStore and json raise what they like
            raise Damaged(_reason(error)) from None
        state = start.replace(
            step=saved.training["step"],
            trained=saved.weights[trainer.collection],
            optimizer=saved.training["optimizer"],
        )
        if fingerprint(_arrays(trainer, state)) != identity["saved"]:
            raise Damaged("its numbers are not those that were saved")
        return state, place, identity

    def _check_fit(self, step: int, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Raises UserError for arrays of another name or shape than this run has."""
        problems = []
        for item in wanted:
            there, here = (_shapes(tree[item]) for tree in (found, wanted))
            for name in sorted(there.keys() | here.keys()):
                if there.get(name) != here.get(name):
                    problems.append(f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here")
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"{self._path / str(step)} does not fit this run's model ({'; '.join(problems[:3])}{more}); set "
                "another `out`, or the model that it was made with"
            )

    def _set_aside(self, step: int, reason: str) -> str:
        """Moves a damaged step out of the way; returns what is to be said of it."""
        aside = self._path.parent / f"damaged-checkpoint-{step}"
        if is_first_host():
            shutil.rmtree(aside, ignore_errors=True)
            (self._path / str(step)).rename(aside)
        wait_for_hosts(f"set aside {step}")
        self._manager.reload()
        return f"checkpoint {step} is damaged ({reason}); it is now {aside}, and an earlier one is taken"

    def close(self) -> None:
        """Waits until all is written. Raises UserError if the disk does not take it."""
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot write checkpoints to {self._path}: {_reason(error)}; the checkpoints before are whole: "
                "make room and start again"
            ) from error


def _arrays(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """All that is saved, as a nested dictionary of arrays."""
    return {
        "weights": {trainer.collection: state.trained},
        "training": serialization.to_state_dict({"optimizer": state.optimizer, "step": state.step}),
    }


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shapes of the arrays in Orbax's metadata or in a state, by one kind of name for both."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_name(key) for key in path): list(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
