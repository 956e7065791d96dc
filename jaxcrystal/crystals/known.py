"""The formulas of a training set, kept beside the model: what `sample --new` does not draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from jaxcrystal.crystals.crystal import ELEMENTS, CrystalBatch
from jaxcrystal.crystals.formulas import reduced
from jaxcrystal.crystals.num_atoms import compositions
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, write

FILE = "formulas.txt"  #: of a model directory: a formula a line, as `Crystal.formula` has it


def formula(counts: Mapping[str, int]) -> str:
    """Of atoms of each element, as `Crystal.formula`."""
    return "".join(f"{symbol}{n if n > 1 else ''}" for symbol, n in sorted(reduced(counts).items()))


def formulas(crystals: CrystalBatch | SymmetricBatch) -> list[str]:
    """Each once, sorted."""
    found = set()
    for counts in compositions(crystals):
        for row in np.unique(counts, axis=0):
            found.add(formula({ELEMENTS[z]: int(row[z]) for z in np.flatnonzero(row)}))
    return sorted(found)


def store(found: Iterable[str], model_dir: AnyPath) -> None:
    """Writes `formulas` beside a model. Raises UserError if the place cannot be written."""
    try:
        write(model_dir / FILE, "".join(f"{formula}\n" for formula in found))
    except OSError as error:
        raise UserError(f"cannot write {model_dir / FILE}: {error.strerror or error}; set another `out`") from None


def load(model_dir: AnyPath) -> list[str]:
    """What `store` wrote. Raises UserError for a model that was converted, or trained before there was such a file."""
    path = model_dir / FILE
    try:
        return path.read_text().split()
    except FileNotFoundError:
        raise UserError(
            f"{model_dir} does not say which formulas it was trained on ({FILE}): train goes on where it stood, and "
            "writes them"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
