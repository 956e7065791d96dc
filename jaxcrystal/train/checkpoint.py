"""Checkpoints of a run: weights that `sample` can read, and beside them what training needs to go on.

    OUT/checkpoints/STEP/weights     {"params": ...} or {"lora": ...}: the same item that `model.saved` reads
    OUT/checkpoints/STEP/training    optimizer and step
    OUT/checkpoints/STEP/place       where in the data the next step begins, as JSON

Orbax writes a step beside its place and moves it there when it is complete: a kill leaves no half checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jaxcrystal.errors import UserError
from jaxcrystal.model.saved import CHECKPOINTS
from jaxcrystal.train.step import Trainer, TrainState


@dataclass(frozen=True)
class Place:
    """Where in the data a step begins."""

    epoch: int = 0
    batch: int = 0


class Checkpoints:
    """The checkpoints of one run's directory, written while training goes on."""

    def __init__(self, out: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._path = (out / CHECKPOINTS).resolve()
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def save(self, trainer: Trainer, state: TrainState, place: Place) -> None:
        """Starts writing this state; a step that is already there is left as it is."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave({trainer.collection: state.trained}),
                training=ocp.args.StandardSave({"optimizer": state.optimizer, "step": state.step}),
                place=ocp.args.JsonSave(asdict(place)),
            ),
        )

    def restore(self, trainer: Trainer, start: TrainState) -> tuple[TrainState, Place]:
        """The latest state, laid out as `start` is, or `start` itself if none is saved.

        Raises UserError if the checkpoint does not fit the model or optimizer of this run.
        """
        step = self._manager.latest_step()
        if step is None:
            return start, Place()

        def like(tree: object) -> object:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

        try:
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    weights=ocp.args.StandardRestore(like({trainer.collection: start.trained})),
                    training=ocp.args.StandardRestore(like({"optimizer": start.optimizer, "step": start.step})),
                    place=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot go on from {self._path / str(step)}: {reason}; remove it to go on from the one before"
            ) from error
        state = start.replace(
            step=saved.training["step"],
            trained=saved.weights[trainer.collection],
            optimizer=saved.training["optimizer"],
        )
        return state, Place(**saved.place)

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()
