"""The folder that an evaluation leaves: everything that its report and a comparison are made of.

structures.parquet   one row an attempt (`table.py`)
metrics.json         sums over that table (`metrics.py`)
reference.parquet    one row a reference crystal; only with a reference
unconditional.parquet    crystals for which nothing was asked, one row each: what base rates are of; only with such
training.parquet     ids and CIFs of the training crystals that attempts match or are nearest to; only with a
                     training set (older versions did not write it)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.table import Provenance, read_table, write_table
from jaxcrystal.reader.reading import crystal_from_cif
from jaxcrystal.reader.rows import Row

#: What no metrics.json is without.
_PARTS = {"protocol": str, "counts": dict, "confidence_95": dict, "versions": dict}


@dataclass(frozen=True)
class Results:
    """What an evaluation found."""

    table: pd.DataFrame  #: a row an attempt
    metrics: Mapping[str, Any]  #: sums over it
    reference: pd.DataFrame | None = None  #: a row a reference crystal
    training: Mapping[str, Crystal] | None = None  #: by id, those that attempts match or are nearest to

    @property
    def samples(self) -> str:
        """Name of the file or folder whose crystals were evaluated."""
        return str(self.metrics["versions"].get("samples", "samples")).rpartition(" sha256:")[0] or "samples"


def nearest_training(table: pd.DataFrame) -> list[str | None]:
    """Ids of the training crystals that the attempts match, relaxed or as sampled, or whose fingerprint is nearest."""
    found: list[str | None] = [None] * len(table)
    for column in ("train_nearest", "known_as", "known_as_relaxed"):
        if column in table:
            found = [old if pd.isna(new) else str(new) for old, new in zip(found, table[column], strict=True)]
    return found


def write(
    out: Path,
    table: pd.DataFrame,
    metrics: Mapping[str, Any],
    provenance: Provenance,
    *,
    reference: pd.DataFrame | None = None,
    known: Sequence[Row] | None = None,
    unconditional: pd.DataFrame | None = None,
) -> None:
    """Writes the files to the folder `out`, and removes those of an earlier evaluation that this one does not have.

    - `reference`: the table of reference crystals.
    - `unconditional`: the table of crystals for which nothing was asked.
    - `known`: the training set, of which the crystals that attempts match or are nearest to are kept.
    """
    write_table(table, provenance, out / "structures.parquet")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("reference.parquet", "training.parquet", "unconditional.parquet"):
        (out / name).unlink(missing_ok=True)
    if reference is not None:
        write_table(reference, provenance, out / "reference.parquet")
    if unconditional is not None:
        kept = unconditional.drop(columns=[name for name in ("cif", "relaxed_cif") if name in unconditional])
        write_table(kept, provenance, out / "unconditional.parquet")
    if known is not None:
        wanted = set(nearest_training(table))
        rows = {s.id: s.crystal.to_cif() for s in known if s.id in wanted and s.crystal is not None}
        training = pd.DataFrame({"id": list(rows), "cif": list(rows.values())}, dtype="str")
        write_table(training, provenance, out / "training.parquet")


def read(out: Path) -> Results:
    """What `write` wrote to the folder `out`.

    Raises UserError, naming the file, if one is missing or is not what `write` writes.
    """
    metrics = read_metrics(out / "metrics.json")
    table = _table(out / "structures.parquet")
    reference = _table(out / "reference.parquet") if (out / "reference.parquet").exists() else None
    training = None
    if (out / "training.parquet").exists():
        rows = _table(out / "training.parquet")
        crystals = {str(name): crystal_from_cif(cif) for name, cif in zip(rows["id"], rows["cif"], strict=True)}
        training = {name: crystal for name, crystal in crystals.items() if crystal is not None}
    return Results(table, metrics, reference, training)


def _table(path: Path) -> pd.DataFrame:
    try:
        return read_table(path)[0]
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path}: {reason}; expected a folder that `jaxcrystal evaluate` wrote") from None
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no table of `jaxcrystal evaluate`; run it again") from None


def read_metrics(path: Path) -> Mapping[str, Any]:
    """What a metrics.json holds. Raises UserError if the file is none."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; expected metrics.json, or the folder that `evaluate` wrote"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); expected the metrics.json of `jaxcrystal evaluate`") from None
    for part, kind in _PARTS.items():
        if not isinstance(metrics, dict) or not isinstance(metrics.get(part), kind):
            raise UserError(f"{path} is not the metrics.json of `jaxcrystal evaluate`: its {part!r} is not as expected")
    for name, interval in metrics["confidence_95"].items():
        if not (
            isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, (int, float)) for x in interval)
        ):
            raise UserError(f"{path}: the interval of {name} is {interval!r}; expected two numbers")
    return metrics
