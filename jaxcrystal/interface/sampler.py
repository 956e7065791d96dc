"""The living sampler of scripts and notebooks: what `jaxcrystal.load` returns."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from jaxcrystal.interface.tables import Attempts
from jaxcrystal.sampling import sampler
from jaxcrystal.sampling.sampling import fingerprint


class Sampler(sampler.Sampler):
    """A model that was loaded once and draws crystals for call after call: `sample` all at once, `stream` one by one.

    It holds the devices' memory until `close`, or the end of a `with` block.
    """

    def sample(self, num: int, **request: Any) -> Attempts:
        """`num` attempts to draw a crystal, a row each, whatever became of it; arguments and errors as of `stream`.

        For example `sample(20, formula="LiFePO4", seed=1)`.
        """
        return Attempts(self.stream(num, **request), self.settings, self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, as ledgers have it."""
        return fingerprint(self.model, self.tokenizer)

    def __repr__(self) -> str:
        return f"<Sampler of {self.name}{', closed' if self.closed else ''}>"
