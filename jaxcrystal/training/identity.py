"""What makes a run the run it is, so that only the same run goes on from its checkpoints."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from jaxcrystal.config import EXECUTION, Recipe, from_dict, to_dict
from jaxcrystal.training.packing import Feed

#: Keys that may differ between a run and its continuation: what is logged and kept; where, and in which order, the same
#: sums are taken; and how long the run is (docs/training.md says which learning rates follow).
FREE = {"out", "log_every", "validate_every", "validation_rows", "checkpoint_every", "keep_checkpoints"}
FREE |= {"mesh", "loss_block", *EXECUTION}
FREE |= {"steps", "epochs"}


@dataclass(frozen=True)
class Identity:
    """The recipe, the crystals that were read, and what the seed gives: plain data, to be stored as JSON."""

    recipe: dict[str, Any]
    data: dict[str, str]  #: of the training and of the validation set: how many crystals, and a hash of them
    draws: str  #: JAX's generator, and a hash of what it and the writer draw first

    @classmethod
    def of(cls, recipe: Recipe, train: Feed, validation: Feed) -> Identity:
        """The identity of this run, with this installation; `train` is what steps are on."""
        key = train.key(0)
        first = jax.jit(train.writer.draw)(key, jax.tree.map(lambda x: x[:8], train.examples))
        data = {"train": _summary(train), "validation": _summary(validation)}
        return cls(to_dict(recipe), data, f"{jax.random.key_impl(key)} {_hash(first)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `differing` reads."""
        return asdict(self)

    def differing(self, theirs: dict[str, Any]) -> list[str]:
        """What differs between the run that `to_json` described and this one; empty if this one may go on."""
        found = differing(from_dict(Recipe, theirs["recipe"], "the recipe of a checkpoint"), self.recipe)
        for part, crystals in self.data.items():
            if theirs["data"][part] != crystals:
                found.append(f"data.{part} held {theirs['data'][part]}, it holds {crystals} now")
        if theirs["draws"] != self.draws:
            found.append(
                f"the seed gave the draws {theirs['draws']}, it gives {self.draws} now: another jax or jaxcrystal"
            )
        return found


def differing(theirs: Recipe, ours: dict[str, Any]) -> list[str]:
    """The keys that decide what a run computes and have another value in `theirs`, with both values."""
    return _differing(to_dict(theirs), ours)


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


def _summary(feed: Feed) -> str:
    return f"{len(feed.ids)} crystals {_hash(feed.examples)}"


def _hash(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]
