"""How probable a model found the samples: the columns `log_probability`, in nats, and `log_probability_per_token`.

They are those of a table that `jaxcrystal score` wrote, or of the sampler's own ledger.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from jaxcrystal.errors import UserError
from jaxcrystal.reader.inputs import name_as_text
from jaxcrystal.reader.rows import Rows

TOTAL, PER_TOKEN = "log_probability", "log_probability_per_token"


def of_samples(samples: Rows, scores: str | Path | pd.DataFrame | None) -> pd.DataFrame | None:
    """Both columns, row by row of the samples; None where nothing is known.

    Raises UserError for a file that cannot be read or is no table of scores, and for samples that it does not have.
    """
    if scores is None:
        rows = [_stated(row.labels.get(TOTAL), row.labels.get("tokens")) for row in samples.rows]
        found = pd.DataFrame(rows, columns=[TOTAL, PER_TOKEN])
        return None if found[TOTAL].isna().all() else found
    name = "the table of scores" if isinstance(scores, pd.DataFrame) else name_as_text(Path(scores))
    table = scores if isinstance(scores, pd.DataFrame) else _read(Path(scores), name)
    if lacking := [column for column in ("id", "row", TOTAL, PER_TOKEN) if column not in table]:
        raise UserError(f"{name} has no column {', '.join(lacking)}; expected what `jaxcrystal score` wrote")
    places = {
        (str(one), str(row)): place for place, (one, row) in enumerate(zip(table["id"], table["row"], strict=True))
    }
    order = []
    for sample in samples.rows:
        place = places.get((sample.id, str(sample.row)))
        if place is None:
            raise UserError(
                f"{name} has no row {sample.row} ({sample.id}) of {name_as_text(samples.path)}; score the same samples"
            )
        order.append(place)
    numbers = {column: pd.to_numeric(table[column], errors="coerce").astype("float64") for column in (TOTAL, PER_TOKEN)}
    return pd.DataFrame(numbers).iloc[order].reset_index(drop=True)


def _stated(total: Any, tokens: Any) -> tuple[float, float]:
    """As a ledger has it, whose cells may be text."""
    try:
        return float(total), float(total) / float(tokens)
    except (TypeError, ValueError, ZeroDivisionError):
        return math.nan, math.nan


def _read(path: Path, name: str) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
        with path.open("rb") as file:
            return pd.read_parquet(file)
    except OSError as error:
        raise UserError(f"cannot read the scores {name}: {error.strerror or error}") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"cannot read the scores {name}: {error}; expected what `jaxcrystal score` wrote") from None
