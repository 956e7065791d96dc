"""A vocabulary with more rows than the checkpoint's: [PAD] as crystal-text-llm adds it, and zeros so that it divides.

rows of embedding and head   | 0 … 31999      | 32000 [PAD]        | 32001 … 32127                      |
their values                 | the checkpoint | mean of those rows | zero; the model gives them no logit |
"""

from __future__ import annotations

import numpy as np

from jaxcrystal.weights.tensor_files import Index, Tensors

ROWS_AT_ONCE = 4096  #: rows that are in memory while the mean is taken


class LongerVocabulary:
    """`tensors`, of which those called `names` have `rows` rows: with `mean`, the first new one is the old ones' mean.

    The mean is summed in float64, rounded to float32, then to the tensor's own dtype.
    """

    def __init__(self, tensors: Tensors, names: tuple[str, ...], rows: int, mean: bool) -> None:
        self._tensors, self._mean = tensors, mean
        self._old = {name: tensors.shapes[name] for name in names}
        self._means: dict[str, np.ndarray] = {}
        self.shapes = tensors.shapes | {name: (rows, *shape[1:]) for name, shape in self._old.items()}
        self.dtypes = tensors.dtypes

    def read(self, name: str, index: Index) -> np.ndarray:
        if name not in self._old:
            return self._tensors.read(name, index)
        old = self._old[name][0]
        start, stop, _ = index[0].indices(self.shapes[name][0])
        if stop <= old:
            return self._tensors.read(name, index)
        first = min(start, old - 1)  # at least one row: it tells the dtype
        known = self._tensors.read(name, (slice(first, old), *index[1:]))[min(start, old) - first :]
        part = np.zeros((stop - start, *known.shape[1:]), known.dtype)
        part[: len(known)] = known
        if self._mean and start <= old:
            part[old - start] = self._mean_row(name)[index[1:]]
        return part

    def _mean_row(self, name: str) -> np.ndarray:
        if name not in self._means:
            rows, width = self._old[name]
            total = np.zeros(width)
            for start in range(0, rows, ROWS_AT_ONCE):
                chunk = self._tensors.read(name, (slice(start, min(start + ROWS_AT_ONCE, rows)), slice(0, width)))
                total += chunk.astype(np.float64).sum(0)
            self._means[name] = (total / rows).astype(np.float32)
        return self._means[name]
