"""Mutations of known crystals, made in three ways and judged alike: what `jaxcrystal mutate` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from jaxcrystal.crystals.substitution import alike
from jaxcrystal.errors import UserError
from jaxcrystal.interface import files
from jaxcrystal.interface.sources import rows
from jaxcrystal.interface.tables import Crystals, Substitutions
from jaxcrystal.locks import held
from jaxcrystal.report.compare import Comparison, as_text, compare
from jaxcrystal.sampling.mutation import KINDS, mutated, mutations
from jaxcrystal.sampling.sampler import say

if TYPE_CHECKING:
    from jaxcrystal.interface.evaluation import Evaluation
    from jaxcrystal.interface.sampler import Sampler
    from jaxcrystal.interface.sources import Source


@dataclass(frozen=True)
class Mutations:
    """The mutations of each kind, and what they are worth."""

    made: Mapping[str, Substitutions]  #: by `mutation.KINDS`; row by row they change the same element
    evaluations: Mapping[str, Evaluation]
    comparison: Comparison

    def __str__(self) -> str:
        return as_text(self.comparison)


def make(sampler: Sampler, crystals: Source, num: int, *, seed: int, tolerance: float) -> dict[str, Substitutions]:
    """`num` mutations of each crystal, of every kind: `mutation`. Raises UserError as `Sampler.infill`, for numbers out
    of range and for a source without crystals."""
    if num < 1:
        raise UserError(f"num is {num}; it must be at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be at least 0")
    pool = alike(tolerance)
    there = rows(crystals, "crystals", None)
    kept = [row for row in there.rows if row.crystal is not None]
    if not kept:
        raise UserError(f"{there.path} holds no crystal: its first row is {there.rows[0].outcome}")
    if missing := len(there) - len(kept):
        say([f"{missing} of {len(there)} rows of {there.path} are no crystal, and not mutated"])
    planned = mutations([row.crystal for row in kept], num, pool, seed)
    asked = sorted({(mutation.element, mutation.template) for mutation in planned})
    answers: dict[tuple[str, int], Float64[np.ndarray, "118"]] = {}
    for element in dict.fromkeys(element for element, _ in asked):
        numbers = [number for other, number in asked if other == element]
        some = Crystals(replace(there, rows=tuple(kept[number] for number in numbers)))
        found = sampler.infill(some, mask=element).answers
        answers |= {(element, i): answer.log_probabilities for i, answer in zip(numbers, found, strict=True)}

    def of(kind: str) -> Substitutions:
        return Substitutions(
            mutated(
                mutation,
                kept[mutation.template].id,
                kept[mutation.template].crystal,
                kind,
                pool,
                answers[mutation.element, mutation.template],
                seed,
            )
            for mutation in planned
        )

    return {kind: of(kind) for kind in KINDS}


def mutate(
    crystals: Source,
    model_dir: str | PathLike[str],
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    num: int = 1,
    seed: int = 0,
    tolerance: float = 0.1,
    potential: str | PathLike[str] = "chgnet",
    hull: Any = "mp",
    references: str | PathLike[str] | None = None,
    train: Source | None = None,
    fmax: float = 0.1,
    max_steps: int = 500,
    workers: int | str = 0,
) -> Mutations:
    """Changes one element of each crystal in three ways, and judges them alike: the paper's experiment.

    - `crystals`: any source; `num` mutations of each.
    - `model_dir`: a model that was trained to infill, whose probabilities choose the element of the kind `language`.
    - `base`: for adapters, another base than the one they were trained on, as `load` has it.
    - `out`: a folder: a table of each kind, its evaluation beside it, and their comparison. The same call goes on.
    - `tolerance`: in Å, of the radii of the kind `radius`.
    - all others are those of `evaluate`.

    Raises UserError as `Sampler.infill` and `evaluate`.
    """
    from jaxcrystal.interface.functions import evaluate, load

    folder = Path(out)
    with held(folder):
        with load(model_dir, base=base) as sampler:
            made = make(sampler, crystals, num, seed=seed, tolerance=tolerance)
        evaluations = {}
        for kind, attempts in made.items():
            table = folder / f"{kind}.parquet"
            files.write_table(attempts.to_pandas(), table)
            evaluations[kind] = evaluate(
                table,
                folder / kind,
                train=train,
                potential=potential,
                hull=hull,
                references=references,
                fmax=fmax,
                max_steps=max_steps,
                workers=workers,
            )
        found = compare([folder / kind for kind in KINDS], folder / "comparison")
    return Mutations(made, evaluations, found)
