"""What a composition is like: Magpie's 132 features (Ward et al., npj Comput. Mater. 2, 16028, 2016).

Of 22 properties of its elements (`magpie_elements.csv`) the minimum, maximum, range, mean, average deviation and mode,
the last three weighted by the elements' shares. Distances between compositions are between features that were
standardised with CDVAE's means and deviations (`magpie_scale.csv`), an unknown one being average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
import pandas as pd
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ELEMENTS


def features(atomic_numbers: Sequence[int] | np.ndarray) -> Float[np.ndarray, "132"]:
    """Features of the composition of these atoms, six for each property; NaN where an element's property is unknown."""
    elements, counts = np.unique(np.asarray(atomic_numbers), return_counts=True)
    values, share = _elements()[elements], counts / counts.sum()
    low, high, mean = values.min(0), values.max(0), share @ values
    mode = values[counts == counts.max()].min(0)  # of equally frequent elements the smallest value
    return np.stack([low, high, high - low, mean, share @ np.abs(values - mean), mode], axis=1).ravel()


def standardised(features: Float[np.ndarray, "*n 132"]) -> Float[np.ndarray, "*n 132"]:
    """(x - mean) / deviation with CDVAE's figures; NaN becomes 0."""
    mean, deviation = _scale()
    return np.nan_to_num((features - mean) / deviation)


def names() -> list[str]:
    """What each feature is, for example `mean Electronegativity`."""
    return list(_table("magpie_scale.csv").index)


@cache
def _elements() -> Float[np.ndarray, "elements 22"]:
    """Properties by atomic number; row 0 is no element."""
    table = _table("magpie_elements.csv")
    assert list(table.index) == list(ELEMENTS[1:]), "magpie_elements.csv must list all elements in their order"
    return np.vstack([np.full(table.shape[1], np.nan), table.to_numpy(np.float64)])


@cache
def _scale() -> Float[np.ndarray, "2 132"]:
    return _table("magpie_scale.csv").to_numpy(np.float64).T


def _table(name: str) -> pd.DataFrame:
    with resources.files(__package__).joinpath(name).open(encoding="utf-8") as file:
        return pd.read_csv(file, comment="#", index_col=0, keep_default_na=False, na_values=[""])
