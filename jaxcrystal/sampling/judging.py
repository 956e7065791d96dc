"""From texts to attempts: parsed, written as CIF, their symmetry found, in worker processes while the device goes on.

A cell that keeps moyo for a minute or ends its process costs its own space group, not the run.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.sampling.attempt import HIGHER_SYMMETRY, judge
from jaxcrystal.texts.forms import Form
from jaxcrystal.worker_process import Lost
from jaxcrystal.workers import Workers, local, run

T = TypeVar("T")

PROCESSES = 2  #: the second is started where one does not keep up
TIMEOUT = 20.0  #: seconds for one crystal; milliseconds are usual
AHEAD = 4096  #: texts that wait for their judgement at most


@dataclass(frozen=True)
class Judgement:
    """What a text turned out to be; fields as in `Attempt`."""

    status: str
    formula: str | None = None
    cif: str | None = None
    space_group: int | None = None
    symmetrized_cif: str | None = None
    symmetry_failure: str | None = None
    written_group: int | None = None
    higher_symmetry: bool | None = None

    def exact(self) -> Judgement:
        """Where a crystal must have the group that its text states, and no more: one that has more is not ok."""
        return replace(self, status=HIGHER_SYMMETRY, cif=None, symmetrized_cif=None) if self.higher_symmetry else self


def judgement(text: str, form: Form, symprec: float | None) -> Judgement:
    """Of a text that ended; `symprec` in Å, None: its symmetry is not looked for."""
    status, crystal = judge(text, form)
    stated = form.space_group(text)
    if crystal is None:
        return Judgement(status, written_group=stated)
    found = None if symprec is None else symmetrize(crystal, symprec)
    symmetry = (None, None) if found is None else (found.crystal.space_group, found.to_cif())
    higher = None
    if found is not None and stated is not None:
        higher = found.exceeds(stated, len(crystal))
    return Judgement(status, crystal.formula, crystal.to_cif(), *symmetry, written_group=stated, higher_symmetry=higher)


class Judges:
    """Processes that judge texts. They start with the first text and live until `close`, or as long as this object."""

    def __init__(self, form: Form, processes: int = PROCESSES, timeout: float = TIMEOUT) -> None:
        self._form, self._processes, self._timeout = form, processes, timeout
        self._open = ExitStack()
        weakref.finalize(self, self._open.close)
        self._workers: Workers | None = None

    def judged(
        self, items: Iterable[tuple[T, str | None]], symprec: float, form: Form | None = None
    ) -> Iterator[tuple[T, Judgement | None]]:
        """Each item with the judgement of its text, in their order, read by `form` (default: as all); None for an item
        without a text.

        The next items are taken while former ones are judged. A crystal whose symmetry, in three tries, takes longer
        than the time limit or ends its process has the `symmetry_failure` `timeout` or `crashed`, and no space group.
        """
        if self._workers is None:
            self._workers = self._open.enter_context(local(self._processes))
        one = partial(_judged, form=form or self._form, workers=self._workers, symprec=symprec, timeout=self._timeout)
        waiting: deque[tuple[T, Future[Judgement | None]]] = deque()
        threads = ThreadPoolExecutor(self._processes)  # each waits for a process
        threads.submit(one, "")  # a process that starts now is ready when the device has drawn
        try:
            for item, text in items:
                waiting.append((item, threads.submit(one, text)))
                while waiting and (waiting[0][1].done() or len(waiting) > AHEAD):
                    first, future = waiting.popleft()
                    yield first, future.result()
            for item, future in waiting:
                yield item, future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # whoever leaves does not wait for a crystal that hangs

    def close(self) -> None:
        """Ends the processes."""
        self._open.close()
        self._workers = None


def _judged(text: str | None, form: Form, workers: Workers, symprec: float, timeout: float) -> Judgement | None:
    if text is None:
        return None
    with closing(run(partial(_job, form, symprec), [text], workers, timeout=timeout)) as results:
        ((_, found),) = results
    if isinstance(found, Lost):  # what is left is our own, and safe
        return judgement_without_symmetry(text, form, found)
    return found


def judgement_without_symmetry(text: str, form: Form, why: Lost) -> Judgement:
    """Of a text whose symmetry nobody could find."""
    found = judgement(text, form, None)
    return replace(found, symmetry_failure=why.value)


def _job(form: Form, symprec: float, texts: Iterable[str]) -> Iterator[tuple[int, Judgement]]:
    return ((i, judgement(text, form, symprec)) for i, text in enumerate(texts))
