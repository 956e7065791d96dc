"""matminer's structure fingerprint, one crystal and one atom after the other, as CDVAE's evaluation calls it.

matminer's `CrystalNNFingerprint` is a loop around two classes of pymatgen: one finds the neighbours, the other computes
order parameters. Where matminer is installed, it is taken. It cannot be installed beside what this project needs
(matminer 0.10.1 asks for pandas < 3, and for setuptools' pkg_resources, which is no more): where it is not, the same
classes are called in the same order, so that the figures are the same and the time is within a few per cent.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float
from pymatgen.analysis.local_env import CN_OPT_PARAMS, CrystalNN, LocalStructOrderParams
from pymatgen.core import Structure

from jaxcrystal.evaluation.likeness.fingerprints import COLUMNS

Featurizer = Callable[[Structure], Float[np.ndarray, "61"]]


def featurizer() -> tuple[str, Featurizer]:
    """What it is called, and the function."""
    try:
        from matminer.featurizers.site.fingerprint import CrystalNNFingerprint
    except ImportError:
        return "matminer's loop around pymatgen", by_pymatgen
    whole = CrystalNNFingerprint.from_preset("ops")
    return f"matminer {importlib.metadata.version('matminer')}", lambda structure: _mean(whole.featurize, structure)


def by_pymatgen(structure: Structure) -> Float[np.ndarray, "61"]:
    return _mean(_site, structure)


def _mean(site: Callable[[Structure, int], list[float]], structure: Structure) -> Float[np.ndarray, "61"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing oxidation states, once a neighbour
        return np.mean([site(structure, atom) for atom in range(len(structure))], axis=0)


def _site(structure: Structure, atom: int) -> list[float]:
    data = CrystalNN().get_nn_data(structure, atom)
    values = []
    for n, name in COLUMNS:
        likelihood = data.cn_weights.get(n, 0)
        look = 1.0
        if likelihood and name != "wt":
            sites = [structure[atom], *(neighbour["site"] for neighbour in data.cn_nninfo[n])]
            indices = list(range(1, len(sites)))
            look = _order_parameter(n, name).get_order_parameters(sites, 0, indices_neighs=indices)[0] or 0
        values.append(likelihood * look)
    return values


@cache
def _order_parameter(n: int, name: str) -> LocalStructOrderParams:
    kind, *parameters = CN_OPT_PARAMS.get(n, {}).get(name, [name])
    return LocalStructOrderParams([kind], parameters=parameters or None)
