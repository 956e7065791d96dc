"""Checkpoints of a run: weights that `sample` can read, and beside them what training needs to go on.

    OUT/checkpoints/STEP/weights     {"params": ...} or {"lora": ...}: the same item that `weights.saved` reads
    OUT/checkpoints/STEP/training    optimizer and step
    OUT/checkpoints/STEP/place       as JSON: where in the data the next step begins, the run's identity, fingerprints
                                     of what was saved and of the frozen weights below it
    OUT/checkpoints/STEP/metrics     as JSON: the validation loss at this step, if it was taken before

Orbax writes a step beside its place and moves it there when it is complete, or, in a store (`jaxcrystal.paths`), puts
`commit_success.txt` into it then: a kill leaves no half checkpoint. What was
damaged later does not have its fingerprint any more, and the checkpoint before it is taken.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from orbax.checkpoint import checkpoint_managers as managers

from jaxcrystal import hosts, paths
from jaxcrystal.errors import UserError
from jaxcrystal.training.identity import Identity
from jaxcrystal.training.step import Trainer, TrainState
from jaxcrystal.weights.fingerprint import fingerprint
from jaxcrystal.weights.saved import CHECKPOINTS


@dataclass(frozen=True)
class Place:
    """Where in the data a step begins."""

    epoch: int = 0
    batch: int = 0


class Damaged(Exception):
    """A checkpoint that cannot be read, or is not what was saved."""


class Checkpoints:
    """The checkpoints of one run's directory, written while training goes on; leaving it waits until all is written.

    Of all, the last `keep` stay, and the one of the lowest validation loss.
    """

    def __init__(self, out: paths.AnyPath, keep: int, identity: Identity) -> None:
        best = managers.BestN(get_metric_fn=_validation_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_validation_loss,  # without it Orbax writes no metrics down; what is kept is decided by the policy
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a kill or a full disk left of a checkpoint
        )
        self._identity = identity
        # What fails in the background is raised here as one line; these would print one for each array.
        for chatter in ("absl", "asyncio"):
            logging.getLogger(chatter).setLevel(logging.CRITICAL)
        self._path = paths.absolute(out / CHECKPOINTS)
        self._frozen = ""  # fingerprint of the frozen weights, which is the same for all steps
        with self._writing():
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def save(self, trainer: Trainer, state: TrainState, place: Place, validation_loss: float | None = None) -> None:
        """Starts writing this state; a step that is already there is left as it is.

        Without a validation loss it is one of the last ones, never the best.

        Raises UserError if the disk does not take it, or did not take the one before.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        saved = _arrays(trainer, state)
        proof = {"saved": fingerprint(saved), "frozen": self._frozen or fingerprint(state.frozen)}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardSave(saved["weights"]),
                    training=ocp.args.StandardSave({"optimizer": state.optimizer, "step": state.step}),
                    place=ocp.args.JsonSave(asdict(place) | proof | {"run": self._identity.to_json()}),
                ),
                metrics={} if validation_loss is None else {"validation_loss": validation_loss},
            )

    def wait(self) -> None:
        """Until all is written. Raises UserError if the disk did not take it."""
        with self._writing():
            self._manager.wait_until_finished()

    def remove(self, step: int) -> None:
        """Takes away the checkpoint of this step, if there is one."""
        if step in self._manager.all_steps():
            self._manager.delete(step)

    def best_loss(self) -> float:
        """The lowest validation loss of all that are there; infinite if there is none."""
        return min((_validation_loss(self._manager.metrics(step)) for step in self._manager.all_steps()), default=inf)

    def restore(self, trainer: Trainer, start: TrainState) -> tuple[TrainState, Place, list[str]]:
        """The latest whole state, laid out as `start` is (whatever mesh it was saved from); where it goes on; and what
        is to be said of damaged checkpoints, which are moved aside. `start` itself if none is saved.

        Raises UserError if the checkpoint is of another recipe, data, model, optimizer or frozen weights than this run.
        """
        self._frozen = fingerprint(start.frozen)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, place, proof = self._read(step, trainer, start)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            if proof["frozen"] != self._frozen:
                raise UserError(
                    f"{self._path / str(step)} belongs to a base of other weights than {self._identity.recipe['base']} "
                    f"has now (fingerprint {proof['frozen']}, now {self._frozen}); put the former base back, or set "
                    "another `out`"
                )
            return state, place, [self._set_aside(step, reason) for step, reason in damaged.items()]
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise UserError(
                f"no checkpoint in {self._path} is whole ({reasons}); remove {self._path.parent} to start over"
            )
        return start, Place(), []

    def _read(self, step: int, trainer: Trainer, start: TrainState) -> tuple[TrainState, Place, dict[str, str]]:
        weights = {trainer.collection: start.trained}
        training = {"optimizer": start.optimizer, "step": start.step}
        handler = ocp.StandardCheckpointHandler()
        try:
            with _damage():
                place = self._manager.restore(step, args=ocp.args.Composite(place=ocp.args.JsonRestore())).place
                proof = {name: place[name] for name in ("saved", "frozen")}
                run, place = place["run"], Place(place["epoch"], place["batch"])
                found = {item: handler.metadata(self._path / str(step) / item).tree for item in ("weights", "training")}
        finally:
            handler.close()
        if differing := self._identity.differing(run):
            raise UserError(
                f"{self._path / str(step)} is of another run ({'; '.join(differing)}); set another `out`, or put back "
                "what it was made with"
            )
        self._check_fit(step, found, {"weights": weights, "training": training})

        def like(tree: object) -> object:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

        with _damage():
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardRestore(like(weights)),
                    training=ocp.args.StandardRestore(like(training)),
                ),
            )
        state = start.replace(
            step=saved.training["step"],
            trained=saved.weights[trainer.collection],
            optimizer=saved.training["optimizer"],
        )
        if fingerprint(_arrays(trainer, state)) != proof["saved"]:
            raise Damaged("its numbers are not those that were saved")
        return state, place, proof

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
        if hosts.is_first():
            paths.move(self._path / str(step), aside)
        hosts.wait(f"set aside {step}")
        self._manager.reload()
        return f"checkpoint {step} is damaged ({reason}); it is now {aside}, and an earlier one is taken"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:  # otherwise this came after the error that is being raised
                raise
        finally:
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            full = os.strerror(errno.ENOSPC)  # which TensorStore puts at the end of a long ValueError
            raise UserError(
                f"cannot write checkpoints to {self._path}: {full if full in str(error) else _reason(error)}; the "
                "checkpoints before are whole: make room and start again"
            ) from error


@contextmanager
def _damage() -> Iterator[None]:
    """Whatever is raised within means a damaged file: of one, Orbax, TensorStore and json raise what they like."""
    try:
        yield
    except Exception as error:
        raise Damaged(_reason(error)) from None


def _validation_loss(metrics: dict[str, float] | None) -> float:
    """Of a checkpoint; infinite where its metrics are damaged."""
    return inf if metrics is None else metrics.get("validation_loss", inf)


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
