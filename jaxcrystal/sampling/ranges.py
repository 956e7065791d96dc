"""What each crystal's prompt states where a range was asked for: values that one training crystal had together.

Whoever asks for a band gap from 1 to 2 eV and a hull distance up to 0.05 eV per atom gets, for each crystal, the pair
of some training crystal that has both, so that prompts are such as the model has read. Which one is decided by the
seed, the wish and the crystal's index alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxcrystal.crystals.training_labels import Labels
from jaxcrystal.errors import UserError
from jaxcrystal.texts.conditions import Properties, Range, known, sentence


def as_json(wanted: Mapping[str, Any]) -> str:
    """Conditions, a range as its two ends, of which null is open."""
    return json.dumps(wanted, default=lambda value: value.ends)


@dataclass(frozen=True)
class Values:
    """The values of the training crystals that are within all ranges of a wish."""

    found: Mapping[str, Float64[np.ndarray, "crystals"]]  #: by attribute
    wish: int  #: hash of the wish
    properties: Properties = ()  #: of the model

    @classmethod
    def within(cls, wanted: Mapping[str, Any], labels: Labels, properties: Properties = ()) -> Values:
        """Of the ranges among the conditions of a wish. Raises UserError for one that no training crystal is in, which
        says what they have instead."""
        ranges = {name: value for name, value in wanted.items() if isinstance(value, Range)}
        inside = {name: (labels[name] >= value.low) & (labels[name] <= value.high) for name, value in ranges.items()}
        for name, here in inside.items():
            if not here.any():
                known = labels[name][np.isfinite(labels[name])]
                has = f"theirs go from {known.min():g} to {known.max():g}" if len(known) else "none is known"
                raise UserError(f"no training crystal has {_told(name, ranges[name])}; {has}")
        together = np.logical_and.reduce(list(inside.values()))
        if not together.any():
            each = ", ".join(f"{_told(name, ranges[name])} ({here.sum():,})" for name, here in inside.items())
            raise UserError(f"no training crystal has all of these together: {each}; ask for wider ranges")
        wish = int.from_bytes(hashlib.sha256(as_json(wanted).encode()).digest()[:8], "little")
        return cls({name: labels[name][together] for name in ranges}, wish, properties)

    def only(self, attribute: str, possible: Callable[[Any], bool]) -> Values:
        """Without crystals whose value of an attribute is not possible; perhaps none is left."""
        column = self.found[attribute]
        kept = np.isin(column, [value for value in np.unique(column) if possible(self._of(attribute, value))])
        return replace(self, found={name: values[kept] for name, values in self.found.items()})

    def __len__(self) -> int:
        return len(next(iter(self.found.values())))

    def draw(self, seed: int, index: int) -> dict[str, Any]:
        """The values for one crystal, by attribute."""
        row = np.random.default_rng([seed, self.wish, index]).integers(len(self))
        return {name: self._of(name, values[row]) for name, values in self.found.items()}

    def longest(self) -> dict[str, Any]:
        """Of each attribute the value that takes the most letters: no crystal's prompt is longer than with these."""
        each = {name: [self._of(name, value) for value in np.unique(values)] for name, values in self.found.items()}

        def letters(name: str, value: Any) -> int:
            return len(sentence(name, value, properties=self.properties))

        return {name: max(values, key=partial(letters, name)) for name, values in each.items()}

    def _of(self, attribute: str, value: float) -> Any:
        return known(self.properties)[attribute].check(float(value))


def _told(name: str, asked: Range) -> str:
    low, high = asked.ends
    if low is None:
        return name if high is None else f"{name} up to {high:g}"
    return f"{name} of at least {low:g}" if high is None else f"{name} from {low:g} to {high:g}"
