"""Rewards of answers while others are still being sampled, by a function that may fail.

The worker thread scores whatever has ended so far; `rewards_fast` releases the GIL and takes microseconds,
somebody else's function may raise, return NaN or hang. Each of these costs the answer that it happened to,
and is told.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from catmllm.design.reward import PVCP_TERMS, Rewards

# Texts and what each was asked for -> `Rewards`, an object with an array `total` (as rewards_fast.Scores),
# or one number a text.
Reward = Callable[[list[str], list[Any]], Any]

BATCH = 64  # answers that one call of the reward gets at most


@dataclass
class Scored:
    """Rewards of n answers. total [n] float64, NaN where the reward failed; `terms` has its parts by name,
    where it tells them.

    `problems` says why an answer has no reward; `busy` are the seconds that the worker spent, `waited` those
    that sampling had already ended when the last reward came.
    """

    total: np.ndarray
    terms: dict[str, np.ndarray]
    reason: list[str | None]
    problems: dict[int, str] = field(default_factory=dict)
    busy: float = 0.0
    waited: float = 0.0


def joined(a: Scored, b: Scored) -> Scored:
    """The rewards of some answers and, behind them, of others."""
    n, m = len(a.total), len(b.total)

    def column(name: str) -> np.ndarray:
        parts = ((s.terms.get(name), k) for s, k in ((a, n), (b, m)))
        return np.concatenate([np.full(k, np.nan) if x is None else x for x, k in parts])

    return Scored(
        np.concatenate([a.total, b.total]),
        {name: column(name) for name in (*a.terms, *(t for t in b.terms if t not in a.terms))},
        a.reason + b.reason,
        a.problems | {i + n: problem for i, problem in b.problems.items()},
        a.busy + b.busy,
        a.waited + b.waited,
    )


class Scoring:
    """Collects the rewards of one set of answers: give `take` to the rollout engine, then call `finish`."""

    def __init__(self, reward: Reward, asked: Sequence[Any], timeout: float = 60.0) -> None:
        """asked [n]: what the reward is told of each answer."""
        self.reward, self.asked, self.timeout = reward, asked, timeout
        n = len(asked)
        self.out = Scored(np.full(n, np.nan), {}, [None] * n)
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._waiting: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._settled: set[int] = set()
        self._current: list[tuple[int, str]] = []  # what the worker is on, since when
        self._since = 0.0
        self._worker: threading.Thread | None = None

    def take(self, i: int, text: str) -> None:
        """Queue answer i; returns at once."""
        if self._worker is None:
            self._start()
        self._waiting.put((i, text))

    def finish(self) -> Scored:
        """Wait until every answer taken has its reward, or the reason why it has none."""
        began = time.perf_counter()
        wanted = len(self.asked)
        with self._news:
            while len(self._settled) < wanted and self._worker is not None:
                left = self.timeout
                if self._current:
                    left -= time.perf_counter() - self._since
                    if left <= 0:
                        self._give_up()
                        continue
                self._news.wait(max(left, 0.001))
        self._waiting.put(None)
        self.out.waited = time.perf_counter() - began
        return self.out

    def _start(self) -> None:
        self._worker = threading.Thread(target=self._work, name="catmllm-reward", daemon=True)
        self._worker.start()

    def _give_up(self) -> None:
        """The worker hangs (the lock is held): go on with another,
        one answer at a time for those it was on."""
        stuck, self._current = self._current, []
        if len(stuck) == 1:
            self._settle(stuck[0][0], np.nan, f"no reward within {self.timeout:g} s")
        self._start()
        if len(stuck) > 1:
            for item in stuck:
                threading.Thread(target=self._alone, args=(item,), name="catmllm-reward", daemon=True).start()

    def _alone(self, item: tuple[int, str]) -> None:
        """One answer of a batch that hung, with a limit of its own."""
        done = threading.Event()

        def run() -> None:
            self._score([item])
            done.set()

        threading.Thread(target=run, name="catmllm-reward", daemon=True).start()
        if not done.wait(self.timeout):
            with self._news:
                self._settle(item[0], np.nan, f"no reward within {self.timeout:g} s")

    def _work(self) -> None:
        me = threading.current_thread()
        while (item := self._waiting.get()) is not None:
            batch = [item]
            while len(batch) < BATCH and not self._waiting.empty():
                if (more := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                batch.append(more)
            with self._lock:
                self._current, self._since = batch, time.perf_counter()
            self._score(batch)
            with self._lock:
                if self._worker is not me:
                    return  # given up on: another has taken over
                self._current = []
                self.out.busy += time.perf_counter() - self._since

    def _score(self, batch: list[tuple[int, str]]) -> None:
        """Score a batch; where that fails, each of its answers alone, so that one cannot cost the others."""
        where = [i for i, _ in batch]
        try:
            result = self.reward([text for _, text in batch], [self.asked[i] for i in where])
            totals, terms, reasons = read_scores(result, len(batch))
            problems: dict[int, str] = getattr(result, "problems", {})  # of those without a reward
        except Exception as error:  # somebody else's code: anything may come
            if len(batch) > 1:
                for item in batch:
                    self._score([item])
                return
            with self._news:
                self._settle(where[0], np.nan, f"{type(error).__name__}: {error}"[:300])
            return
        with self._news:
            for k, i in enumerate(where):
                value = totals[k]
                why = f"the reward is {value}"
                self._settle(i, value, None if np.isfinite(value) else problems.get(k, why))
                self.out.reason[i] = reasons[k]
            for name, values in terms.items():
                column = self.out.terms.setdefault(name, np.full(len(self.asked), np.nan))
                column[where] = values

    def _settle(self, i: int, value: float, problem: str | None) -> None:
        """Keep the first word on an answer; what a worker says after it was given up on is not heard."""
        if i in self._settled:
            return
        self._settled.add(i)
        self.out.total[i] = value if problem is None else np.nan
        if problem is not None:
            self.out.problems[i] = problem
        self._news.notify_all()


def read_scores(result: Any, n: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str | None]]:
    """Totals, terms and reasons of what a reward returned; a number a text may be None (no reward)."""
    if isinstance(result, Rewards):
        total, terms, reasons = result.total, result.terms, result.reason
    elif hasattr(result, "total"):
        total = np.asarray(result.total, dtype=np.float64)
        terms = {name: np.asarray(getattr(result, name)) for name in PVCP_TERMS if hasattr(result, name)}
        reasons = list(getattr(result, "reason", [None] * n))
    else:
        total = np.array([np.nan if v is None else float(v) for v in result])
        terms, reasons = {}, [None] * n
    if total.shape != (n,):
        raise ValueError(f"the reward gave {total.shape} numbers for {n} texts")
    return total, terms, reasons
