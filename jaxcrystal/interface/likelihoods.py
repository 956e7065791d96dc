"""What a model says of the crystals of a source, row by row, kept as it comes."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from tqdm import tqdm

from jaxcrystal.errors import UserError
from jaxcrystal.reader.rows import Rows
from jaxcrystal.sampling.answers import Answers
from jaxcrystal.scoring.descriptions import Likelihoods, Scorer
from jaxcrystal.workers import Workers


def of_rows(
    scorer: Scorer,
    model: str,
    rows: Rows,
    store: str | PathLike[str] | None = None,
    workers: Workers | None = None,
) -> tuple[Likelihoods, ...]:
    """Of each row, whatever became of it; `model` is its fingerprint. Equal crystals are read once.

    `store` is a file that keeps what is said of each crystal as it comes; what is known there is not asked again.
    Raises UserError as `Scorer.read` and `Answers`, and for a source without a crystal.
    """
    if all(row.crystal is None for row in rows.rows):
        first = rows.rows[0]
        raise UserError(f"{rows.path} holds no crystal; its first row ({first.id}) is {first.outcome}: {first.reason}")
    keys = [None if row.crystal is None else scorer.key(model, row.crystal) for row in rows.rows]
    crystals = {key: row.crystal for key, row in zip(keys, rows.rows, strict=True) if key is not None}
    kept = None if store is None else Answers(Path(store))
    known = {} if kept is None else kept.known(crystals.keys(), Likelihoods.of_row)
    missing = [(key, crystal) for key, crystal in crystals.items() if key not in known]
    with tqdm(total=len(crystals), initial=len(known), desc=str(rows.path.name), unit="crystal") as bar:
        for key, found in scorer.read(missing, workers):
            known[key] = found
            if kept is not None:
                kept.append(key, found.row())
            bar.update()
    return tuple(
        Likelihoods.none(row.outcome, row.reason) if key is None else known[key]
        for key, row in zip(keys, rows.rows, strict=True)
    )
