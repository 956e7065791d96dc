"""Meta's checkpoints: `consolidated.00.pth`, `.01.pth`, ..., each one share of every matrix.

    wq wk wv w1 w3 output    | share 0 | over | share 1 |      rows of [out, in] are divided
    wo w2                    | share 0 | beside | share 1 |    columns are divided
    tok_embeddings           columns (LLaMA-2) or rows (LLaMA-3)
    norms                    every share has the whole

Which axis was divided is seen from the shapes: the one that is too short. Rotary positions turn pairs of channels of
a head; Meta lays the two of a pair side by side, Hugging Face (and we) half a head apart, so that rows of wq and wk
change places:

    Meta   a0 b0 a1 b1 a2 b2 …        here   a0 a1 a2 … b0 b1 b2 …
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jaxcrystal.errors import UserError
from jaxcrystal.weights.tensor_files import Index
from jaxcrystal.weights.torch_zip import TorchZip


class MetaShards:
    """The shares of a directory, joined. Raises UserError where one is missing or cannot be read."""

    def __init__(self, directory: Path) -> None:
        paths = sorted(directory.glob("consolidated.*.pth"))
        numbers = [re.fullmatch(r"consolidated\.(\d+)\.pth", path.name) for path in paths]
        found = {int(number[1]) for number in numbers if number}
        if not found:
            raise UserError(f"{directory} holds params.json and no consolidated.00.pth; download the checkpoint again")
        if gap := set(range(max(found))) - found:
            raise UserError(f"{directory}: consolidated.{min(gap):02d}.pth is missing")
        self._directory = directory
        self._shards = [TorchZip(path) for path in paths]
        self._axes: dict[str, int | None] = {}
        self._order: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, ...]] = dict(self._shards[0].shapes)  #: of the shares until `join`
        self.dtypes = self._shards[0].dtypes
        for shard in self._shards[1:]:
            for name in sorted(shard.shapes.keys() ^ self.shapes.keys()):
                raise UserError(f"{shard.path}: {name} is in some of the files only; download the checkpoint again")

    def rows(self, name: str) -> int:
        """Rows of a matrix that is divided by rows."""
        return sum(shard.shapes[name][0] for shard in self._shards if name in shard.shapes)

    def join(self, expected: dict[str, tuple[int, ...]], rotary_heads: dict[str, int]) -> None:
        """Joins every tensor to the shape that is expected of it; those of `rotary_heads` have so many rotary heads.

        Raises UserError if the number of shares is not the one that the shapes tell. A tensor whose shares do not add
        up keeps the shape that they add up to, for `checkpoint_map` to report.
        """
        for name, wanted in expected.items():
            shapes = [shard.shapes[name] for shard in self._shards if name in shard.shapes]
            if not shapes or any(len(shape) != len(wanted) for shape in shapes):
                continue
            short = [axis for axis, size in enumerate(wanted) if any(shape[axis] != size for shape in shapes)]
            self._axes[name] = short[0] if short else None
            if short:
                axis = short[0]
                needed, rest = divmod(wanted[axis], max(shapes[0][axis], 1))
                if not rest and needed != len(shapes) and len(short) == 1:
                    raise UserError(
                        f"{self._directory} holds {len(shapes)} consolidated.*.pth, but {needed} make the model: each "
                        f"has {shapes[0][axis]} of {wanted[axis]} {'columns' if axis else 'rows'} of {name}"
                    )
                joined = list(shapes[0])
                joined[axis] = sum(shape[axis] for shape in shapes)
                self.shapes[name] = tuple(joined)
        for name, heads in rotary_heads.items():
            if self.shapes.get(name) == expected[name]:
                self._order[name] = paired_rows(expected[name][0], heads)

    def read(self, name: str, index: Index) -> np.ndarray:
        """This part of a joined tensor, rotary rows in our order."""
        if name not in self._order:
            return self._joined(name, index)
        rows = self._order[name][index[0]]
        first = int(rows.min(initial=self.shapes[name][0]))
        block = self._joined(name, (slice(first, int(rows.max(initial=first - 1)) + 1), *index[1:]))
        return block[rows - first]

    def _joined(self, name: str, index: Index) -> np.ndarray:
        axis = self._axes[name]
        if axis is None:
            return self._shards[0].read(name, index)
        start, stop, _ = index[axis].indices(self.shapes[name][axis])
        parts, begin = [], 0
        for shard in self._shards:
            size = shard.shapes[name][axis]
            inside = slice(max(start - begin, 0), min(stop - begin, size))
            if inside.start < inside.stop:
                parts.append(shard.read(name, (*index[:axis], inside, *index[axis + 1 :])))
            begin += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def paired_rows(rows: int, heads: int) -> np.ndarray:
    """Where Meta (and llama.cpp) keeps each row of a matrix of so many rotated heads."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
