"""Embedding and head that PEFT saves beside adapters, because the vocabulary was resized before training.

crystal-text-llm adds [PAD] to LLaMA-2 and resizes both; PEFT then saves them whole (`save_embedding_layers="auto"`)
although only the adapters were trained. They may be left out exactly if they are the base's:

    rows of the file     | 0 … pieces - 1                                        | from there on           |
    must be              | the base's, but for the rounding to either's dtype    | anything: the new piece |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxcrystal.errors import UserError
from jaxcrystal.weights.checkpoint_map import EMBEDDINGS, Checkpoint, source
from jaxcrystal.weights.config_map import MERGE
from jaxcrystal.weights.vocabulary import ROWS_AT_ONCE


def saved_embeddings(adapters: Checkpoint) -> dict[str, str]:
    """Tensors of a file of adapters that are no adapters -> the parameter of the base that each is a copy of."""
    embedding, head = EMBEDDINGS
    copies = {embedding: embedding, head: embedding if adapters.config.tie_word_embeddings else head}
    names = {source(path, 1, "peft").tensors[0]: parameter for path, parameter in copies.items()}
    return {name: parameter for name, parameter in names.items() if name in adapters.tensors.shapes}


def check_embeddings(directory: Path, adapters: Checkpoint, base: Mapping[str, jax.Array], pieces: int) -> None:
    """Raises UserError unless the first `pieces` rows of each of `saved_embeddings` are those of its parameter."""
    for name, parameter in saved_embeddings(adapters).items():
        shape = adapters.tensors.shapes[name]
        ours = base[parameter] if parameter.endswith("embedding") else base[parameter].T
        if len(shape) != 2 or shape[0] < pieces or shape[1] != ours.shape[1]:
            raise UserError(
                f"{directory}: {name} is {list(shape)}, the base's has {pieces} rows of {ours.shape[1]}; these are "
                "adapters of another base"
            )
        differing = 0
        for start in range(0, pieces, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, pieces))
            theirs = adapters.tensors.read(name, (rows, slice(0, shape[1])))
            differing += int((~_same(theirs, np.asarray(ours[rows]))).any(1).sum())
        if differing:
            raise UserError(
                f"{directory}: {name} differs from the base's in {differing} of {pieces} rows: it was trained as well, "
                f"or belongs to another base; {MERGE}"
            )


def _same(a: Float[np.ndarray, "rows width"], b: Float[np.ndarray, "rows width"]) -> Bool[np.ndarray, "rows width"]:
    """Where a and b can be the same number, each rounded once to its own dtype."""
    kinds = [jnp.finfo(x.dtype) for x in (a, b)]
    relative = sum(float(kind.eps) for kind in kinds) / 2
    absolute = sum(float(kind.smallest_subnormal) for kind in kinds) / 2
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.abs(a - b) <= relative * (1 + relative) * np.maximum(np.abs(a), np.abs(b)) + absolute
