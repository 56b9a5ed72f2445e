"""When training ends before its last step: a signal asks for it, or the loss says that it has gone wrong."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_SAVED = 75  # EX_TEMPFAIL: the same command again goes on
WINDOW, LEAST = 64, 20  # losses remembered, and how many of them a judgement needs


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Stopped(RuntimeError):
    """A signal ended the run; what was trained is saved."""


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect SIGTERM and SIGUSR1 (Slurm's usual warning) in the list instead of dying of them."""
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number).name)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once() -> None:
    """Outside of training there is nothing to save: the signals end the run where it is."""

    def end(number: int, frame: Any) -> None:
        raise Stopped(f"{signal.Signals(number).name} between training stages")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, end)


class LossWatch:
    """Tells a loss that is not finite, or that lies `spike` median deviations above the recent median.

    The deviation counts as at least 5 % of the median, so that a converged,
    quiet loss does not stop at a ripple.
    """

    def __init__(self, spike: float) -> None:
        self.spike = spike
        self.recent: list[float] = []

    def judge(self, loss: float) -> str | None:
        """What is wrong with the next loss, or None; a loss that is right is remembered."""
        if not abs(loss) < float("inf"):
            return f"the loss is {loss}"
        if self.spike and len(self.recent) >= LEAST:
            middle = statistics.median(self.recent)
            spread = statistics.median(abs(x - middle) for x in self.recent)
            limit = middle + self.spike * max(spread, 0.05 * abs(middle))
            if loss > limit:
                return (
                    f"the loss jumped to {loss:.4g}, the median of the last "
                    f"{len(self.recent)} is {middle:.4g}"
                )
        self.recent = [*self.recent[-(WINDOW - 1) :], loss]
        return None
