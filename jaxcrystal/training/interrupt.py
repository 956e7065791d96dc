"""Stopping on a signal: SIGTERM, as Slurm and Kubernetes send it, Ctrl-C, or a TPU host about to be taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Within `with Interrupt() as interrupt`, the first signal only sets `interrupt.signal`; a second one acts as ever.

    Where several processes run, JAX's preemption service takes SIGTERM itself and makes them agree on the last step;
    Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            handled = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._before[self.signal])
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; the same on all of several processes."""
        if jax.process_count() > 1:
            if not multihost_utils.reached_preemption_sync_point(step):
                return False
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None
