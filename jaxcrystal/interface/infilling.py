"""From a model directory and crystals to a table of elements: `jaxcrystal infill`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcrystal import locks
from jaxcrystal.interface import files
from jaxcrystal.interface.functions import load
from jaxcrystal.interface.infilled import Infilled, table_of

if TYPE_CHECKING:
    from jaxcrystal.interface.sources import Source


@locks.holds(lambda model_dir, crystals, out, **_: out)
def infill(
    model_dir: str | PathLike[str],
    crystals: Source,
    out: Path,
    *,
    base: str | PathLike[str] | None = None,
    mask: str | None = None,
    site: int | None = None,
    allow: Sequence[str] | None = None,
    similar: float | None = None,
) -> Infilled:
    """Asks the model, on another `base` as `load` has it, as `Sampler.infill`; writes the answers, as `Infilled.write`.

    Answers are kept beside the table, in elements.jsonl, as they come; a run that was stopped goes on after them.
    """
    kept = files.kept_beside(table_of(out), crystals)
    with load(model_dir, base=base) as sampler:
        found = sampler.infill(crystals, mask=mask, site=site, allow=allow, similar=similar, store=kept)
    found.write(out)
    return found
