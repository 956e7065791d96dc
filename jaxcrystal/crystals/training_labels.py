"""The numbers that are known of a training set's crystals, kept beside the model: what a range is drawn from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from jaxcrystal.crystals.dataset import LABELS
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, reaching, write

FILE = "labels.parquet"  #: of a model directory: a row a crystal, NaN where a number is not known
DECIMALS, OWN_DECIMALS = 4, 6  #: that a prompt has of them, and at most of one's own
NUMBERS = tuple(field.name for field in LABELS if pa.types.is_floating(field.type) or pa.types.is_integer(field.type))

Labels = Mapping[str, Float64[np.ndarray, "crystals"]]


def store(stated: Sequence[Mapping[str, Any]], model_dir: AnyPath) -> None:
    """Writes the numbers that prompts may state of each crystal beside a model, those of one's own properties too.

    Raises UserError if the place cannot be written.
    """
    own = {name for known in stated for name, value in known.items() if isinstance(value, float)} - {*NUMBERS}
    columns = {}
    for name in (*NUMBERS, *sorted(own)):
        values = np.array([known.get(name, np.nan) for known in stated], np.float64)
        columns[name] = np.round(values, OWN_DECIMALS if name in own else DECIMALS) + 0.0  # no -0
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    try:
        write(model_dir / FILE, file.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {model_dir / FILE}: {error.strerror or error}; set another `out`") from None


def load(model_dir: AnyPath) -> Labels:
    """What `store` wrote. Raises UserError where there is no such file, or it holds something else."""
    path = model_dir / FILE
    try:
        with reaching(path):
            table = pq.read_table(io.BytesIO(path.read_bytes()))
        return {name: table[name].to_numpy().astype(np.float64) for name in (*NUMBERS, *table.column_names)}
    except FileNotFoundError:
        raise UserError(
            f"{model_dir} does not say what its training crystals were labelled: it has no {FILE}, which `train` "
            "writes, and from which values within a range are drawn; ask for one value"
        ) from None
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); train again to write it") from None


def digest(labels: Labels) -> str:
    """A hash of them."""
    return hashlib.sha256(b"".join(labels[name].tobytes() for name in sorted(labels))).hexdigest()[:16]
