"""A row for each piece of the tokenizer, and rows that pad the vocabulary: [PAD] as crystal-text-llm adds it, zeros.

rows of embedding and head     | 0 … 31999      | 32000 [PAD]        | 32001 … 32127                       |
values, the source has 32000   | the checkpoint | mean of those rows | zero; the model gives them no logit |
values, it has more (32064)    | the checkpoint | the checkpoint     | zero; the model gives them no logit |
"""

from __future__ import annotations

import numpy as np

from jaxcrystal.errors import UserError
from jaxcrystal.texts.sentence_pieces import SentencePieceTokenizer
from jaxcrystal.texts.tokenizer import Tokenizer
from jaxcrystal.weights.tensor_files import Index, Tensors

#: Rows beyond its pieces that a model may have: a vocabulary is padded to a multiple of no more than this.
PADDING = 256
ROUNDED = 1024  #: likewise of byte-level BPE: Qwen2.5 has 399
ROWS_AT_ONCE = 4096  #: rows that are in memory while the mean is taken


def check_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Raises UserError unless a model with `rows` rows can have been made for the tokenizer."""
    path, pieces = tokenizer.path, tokenizer.vocab_size
    most = PADDING if isinstance(tokenizer, SentencePieceTokenizer) else ROUNDED
    if pieces > rows:
        raise UserError(f"{path} has {pieces} pieces, but the model has rows for {rows}; it is another model's")
    if rows > pieces + most:
        raise UserError(
            f"{path} has {pieces} pieces, but the model has {rows} rows, more than padding explains (at most {most}); "
            "put the tokenizer with which this model was trained there"
        )


class Vocabulary:
    """`tensors`, of which those called `names` have a row for each of `pieces`, then zeros up to `rows` rows.

    A source that has no row for the last piece (it must have all others) gets the mean of its own rows there, summed in
    float64, rounded to float32, then to the tensor's own dtype.
    """

    def __init__(self, tensors: Tensors, names: tuple[str, ...], pieces: int, rows: int) -> None:
        self._tensors, self._pieces = tensors, pieces
        self._old = {name: tensors.shapes[name] for name in names}
        self._means: dict[str, np.ndarray] = {}
        self.shapes = tensors.shapes | {name: (rows, *shape[1:]) for name, shape in self._old.items()}
        self.dtypes = tensors.dtypes

    def read(self, name: str, index: Index) -> np.ndarray:
        if name not in self._old:
            return self._tensors.read(name, index)
        old = min(self._old[name][0], self._pieces)
        start, stop, _ = index[0].indices(self.shapes[name][0])
        if stop <= old:
            return self._tensors.read(name, (slice(start, stop), *index[1:]))
        first = min(start, old - 1)  # at least one row: it has the dtype
        known = self._tensors.read(name, (slice(first, old), *index[1:]))[min(start, old) - first :]
        part = np.zeros((stop - start, *known.shape[1:]), known.dtype)
        part[: len(known)] = known
        if start <= old < min(stop, self._pieces):
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
