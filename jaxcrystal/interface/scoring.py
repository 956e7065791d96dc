"""From a model directory and crystals to how probable it finds them: `jaxcrystal score` and `jaxcrystal ipt`."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jaxcrystal import locks
from jaxcrystal.interface import files
from jaxcrystal.interface.functions import load

if TYPE_CHECKING:
    from jaxcrystal.interface.scored import Scored, Transformed
    from jaxcrystal.interface.sources import Source


@locks.holds(lambda model_dir, crystals, out, **_: out)
def score(
    model_dir: str | PathLike[str],
    crystals: Source,
    out: Path,
    *,
    base: str | PathLike[str] | None = None,
    draws: int = 20,
    seed: int = 0,
    beside: Source | None = None,
    conditions: Mapping[str, Any] = MappingProxyType({}),
    at_once: int = 8,
    workers: int | str = 0,
) -> Scored:
    """Asks the model, on another `base` as `load` has it, as `Sampler.score`, and writes the table to `out`: x.parquet
    or x.csv.

    What is said is kept beside it, in x.jsonl, as it comes; a run that was stopped goes on after it.
    """
    store = files.kept_beside(files.checked_table(out), crystals, beside)
    with load(model_dir, base=base) as sampler:
        found = sampler.score(
            crystals,
            draws=draws,
            seed=seed,
            beside=beside,
            conditions=conditions,
            store=store,
            at_once=at_once,
            workers=workers,
        )
    found.write(out)
    return found


@locks.holds(lambda model_dir, crystals, out, **_: out)
def ipt(
    model_dir: str | PathLike[str],
    crystals: Source,
    out: Path,
    *,
    base: str | PathLike[str] | None = None,
    over: str | None = None,
    draws: int = 20,
    seed: int = 0,
    at_once: int = 8,
    workers: int | str = 0,
) -> Transformed:
    """Asks the model, on another `base` as `load` has it, as `Sampler.ipt`, and writes the table to `out`, x.parquet or
    x.csv, and the picture to x.svg.

    What is said is kept beside it, in x.jsonl, as it comes; a run that was stopped goes on after it.
    """
    store = files.kept_beside(files.checked_table(out), crystals)
    with load(model_dir, base=base) as sampler:
        found = sampler.ipt(crystals, over=over, draws=draws, seed=seed, store=store, at_once=at_once, workers=workers)
    found.write(out)
    return found
