"""The formulas of a training set, kept beside the model: what `sample --new` does not draw."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxcrystal import box
from jaxcrystal.crystals.crystal import ELEMENTS, CrystalBatch, formula_of
from jaxcrystal.crystals.formulas import read_formula, reduced
from jaxcrystal.crystals.num_atoms import compositions
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, reaching, write

FILE = "formulas.txt"  #: of a model directory: a formula a line, as `Crystal.formula` has it


def found(crystals: CrystalBatch | SymmetricBatch) -> list[str]:
    """The formulas of a set, each once, sorted."""
    formulas = set()
    for counts in compositions(crystals):
        for row in np.unique(counts, axis=0):
            formulas.add(formula_of({ELEMENTS[z]: int(row[z]) for z in np.flatnonzero(row)}))
    return sorted(formulas)


def is_compound(formula: str) -> bool:
    """Whether the package's hull has a compound of this formula, spelled as `Crystal.formula` has it."""
    wanted = reduced(read_formula(formula))
    table = _compounds()
    for symbol in wanted:
        table = table.filter(pc.match_substring(table, symbol))
    return any(reduced(read_formula(other)) == wanted for other in table.to_pylist())


@cache
def _compounds() -> pa.ChunkedArray:
    return pq.read_table(box.FOLDER / box.HULLS["mp"], columns=["formula"])["formula"]


def store(formulas: Iterable[str], model_dir: AnyPath) -> None:
    """Writes them beside a model. Raises UserError if the place cannot be written."""
    try:
        write(model_dir / FILE, "".join(f"{formula}\n" for formula in formulas))
    except OSError as error:
        raise UserError(f"cannot write {model_dir / FILE}: {error.strerror or error}; set another `out`") from None


def load(model_dir: AnyPath) -> list[str]:
    """What `store` wrote. Raises UserError where there is no such file, or it holds something else."""
    path = model_dir / FILE
    try:
        with reaching(path):
            formulas = path.read_text().split()
        for formula in formulas:
            read_formula(formula)
    except FileNotFoundError:
        raise UserError(
            f"{model_dir} does not say which formulas it was trained on: it has no {FILE}, which `train` writes"
        ) from None
    except (OSError, UserError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not formulas:
        raise UserError(f"{path} is empty: it should name the formulas of the training set")
    return formulas
