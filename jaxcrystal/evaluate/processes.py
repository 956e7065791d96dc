"""One function over many crystals, in local processes, in order, with a progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")

#: Below this many items a second process would take longer to start than the work takes.
WORTH_A_POOL = 400
CHUNK = 50


def each(function: Callable[[T], R], items: Sequence[T], *, workers: int, label: str) -> list[R]:
    """`[function(item) for item in items]`; `function` and items must be picklable, and the function must not raise."""
    bar = {"total": len(items), "desc": label, "unit": "crystal", "mininterval": 0.5, "disable": not items}
    if workers < 2 or len(items) < WORTH_A_POOL:
        return [function(item) for item in tqdm(items, **bar)]
    # Spawned, not forked: the parent holds the threads of jax and torch, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(tqdm(pool.map(function, items, chunksize=CHUNK), **bar))


def each_chunk(function: Callable[[Sequence[T]], list[R]], items: Sequence[T], *, workers: int, label: str) -> list[R]:
    """As `each`, for a function that is faster with many items at once: it is given up to `CHUNK` of them."""
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    results: list[R] = []
    with tqdm(total=len(items), desc=label, unit="crystal", mininterval=0.5, disable=not items) as bar:

        def take(found: Iterable[list[R]]) -> list[R]:
            for part in found:
                results.extend(part)
                bar.update(len(part))
            return results

        if workers < 2 or len(items) < WORTH_A_POOL:
            return take(map(function, chunks))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            return take(pool.map(function, chunks))
