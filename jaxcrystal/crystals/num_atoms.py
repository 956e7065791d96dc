"""How many atoms the cells of a training set have, by the atoms of a formula unit: kept beside the model.

A grammar alone lets a model write atom after atom, for it is asked token by token: of H2O it makes 24 atoms where
training had at most 18. `sample` takes these limits for a stated formula, unless it is given others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int

from jaxcrystal.crystals.crystal import ELEMENTS, CrystalBatch
from jaxcrystal.crystals.symmetric_batch import SymmetricBatch
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath, write

FILE = "num_atoms.json"  #: of a model directory: {atoms of a formula unit: [least, most] atoms of a cell}
BLOCK = 4096  #: crystals whose elements are counted at once


def compositions(crystals: CrystalBatch | SymmetricBatch) -> Iterator[Int[np.ndarray, "block elements"]]:
    """Atoms of each element, by atomic number, in the cells of a block of crystals after the other."""
    for start in range(0, len(crystals), BLOCK):
        block = crystals[start : start + BLOCK]
        symmetric = isinstance(block, SymmetricBatch)
        species = np.asarray(block.elements if symmetric else block.species)
        counts = np.zeros((len(species), len(ELEMENTS)), np.int64)
        np.add.at(counts, (np.arange(len(species))[:, None], species), np.asarray(block.counts) if symmetric else 1)
        counts[:, 0] = 0  # no atom
        yield counts


def ranges(crystals: CrystalBatch | SymmetricBatch) -> dict[int, tuple[int, int]]:
    """The least and the most atoms of the cells whose formula unit has so many: SrTiO3's has 5."""
    found: dict[int, tuple[int, int]] = {}
    for counts in compositions(crystals):
        atoms = counts.sum(1)
        for unit, number in zip(atoms // np.gcd.reduce(counts, axis=1), atoms, strict=True):
            least, most = found.get(int(unit), (int(number), int(number)))
            found[int(unit)] = min(least, int(number)), max(most, int(number))
    return dict(sorted(found.items()))


def store(crystals: CrystalBatch | SymmetricBatch, model_dir: AnyPath) -> None:
    """Writes `ranges` beside a model. Raises UserError if the place cannot be written."""
    try:
        write(model_dir / FILE, json.dumps(ranges(crystals)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {model_dir / FILE}: {error.strerror or error}; set another `out`") from None


def load(model_dir: AnyPath) -> Mapping[int, tuple[int, int]]:
    """What `store` wrote; nothing for a model that was converted, or trained before there was such a file."""
    path = model_dir / FILE
    try:
        return {int(unit): (int(least), int(most)) for unit, (least, most) in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read; remove it, or train again to write it") from None
