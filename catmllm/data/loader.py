"""Batches for one rank, from an endless sequence of samples that all ranks share.

A sample is a function of its position in that sequence, a window of consecutive samples is packed for itself,
and windows are dealt to ranks in turn. So what a batch holds depends neither on the number of workers nor on
the number of ranks, and the whole state is a few integers. Built on torch's DataLoader: worker processes,
order, prefetch, pinning.
"""

from __future__ import annotations

import functools
import gc
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, get_worker_info

from catmllm.data.batches import Batch, Collator, Encoded, each_tensor
from catmllm.data.packing import evenly, pack
from catmllm.data.prompts import Sample

PACKS = 64  # a window, about: one pack of it is half empty at worst, 0.8 % of all on average
PROBE = 256  # samples whose mean length sets how many a window of packs takes


def cut(costs: Sequence[int], passes: int, budget: int | None, dealt: bool) -> list[list[int]]:
    """The passes of a window: positions of samples of these costs. With a budget, packs of at most so much;
    else as many passes as a batch has, or 64 times as many where they are dealt, so that all cost the
    same."""
    if budget is not None:
        return pack(costs, budget)
    if dealt:
        return evenly(costs, PACKS * passes)
    ends = [len(costs) * k // passes for k in range(passes + 1)]
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)]


class Window(NamedTuple):
    """The packs of one window, and how many of its samples were left out for being longer than a pack."""

    packs: list[Batch]
    too_long: int


@dataclass(frozen=True)
class Windows:
    """window number -> its packs. `example`: position -> sample, the same whenever and wherever it is called.

    With a budget, a window of about 64 packs of at most so many tokens; else `batch_size` samples,
    cut into `passes`; or 64 times as many where they are `dealt`, so that all passes cost the same. An atom
    of a sample's structure counts for `atom_tokens`.
    """

    example: Callable[[int], Sample]
    collate: Collator
    batch_size: int = 1
    passes: int = 1
    budget: int | None = None
    origin: int = 0  # where window 0 begins
    dealt: bool = False
    atom_tokens: float = 0.0

    def cost(self, row: Encoded) -> int:
        """The tokens that a sample counts for."""
        return row.length + (round(self.atom_tokens * len(row.graph)) if row.graph is not None else 0)

    @functools.cached_property
    def size(self) -> int:
        """Samples a window."""
        if self.budget is None:
            return self.batch_size * (PACKS if self.dealt else 1)
        lengths = [self.cost(self.collate.encoded(self.example(i))) for i in range(PROBE)]
        return max(1, round(PACKS * self.budget / (sum(lengths) / PROBE)))

    def __getitem__(self, number: int) -> Window:
        first = self.origin + number * self.size
        rows = [self.collate.encoded(self.example(i)) for i in range(first, first + self.size)]
        kept = rows
        if self.budget is not None:
            kept = [r for r in rows if self.cost(r) <= self.budget]
        places = cut([self.cost(r) for r in kept], self.passes, self.budget, self.dealt)
        groups = [[kept[i] for i in group] for group in places]
        packs = [self.collate.join(group) for group in groups if group]
        if get_worker_info() is not None:
            # Arrays go through a pipe; tensors would go through /dev/shm, a file descriptor each, and
            # containers have little of the one and few of the other.
            packs = [each_tensor(p, torch.Tensor.numpy) for p in packs]
        return Window(packs, len(rows) - len(kept))


class Loader:
    """This rank's batches, endlessly. `ranks` loaders that differ in `rank` alone see every pack once.

    The sequence of windows is `leftover` (pairs of a window and its first pack to take; what a run with
    another number of ranks had begun), then all windows from `start` on; rank r takes entries r, r + ranks,
    ... The state is that and each rank's place in it. `too_long` counts the samples left out so far.
    """

    def __init__(
        self, windows: Windows, rank: int = 0, ranks: int = 1, workers: int = 0, pin: bool = False
    ) -> None:
        self.windows, self.rank, self.ranks, self.workers, self.pin = windows, rank, ranks, workers, pin
        self.leftover: list[tuple[int, int]] = []
        self.start = 0
        self.too_long = 0
        self._place = (rank, 0)  # the entry being taken, and its packs taken
        self._batches = self._stream()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self._place, too_long = next(self._batches)
        self.too_long += too_long
        return batch

    def state(self, gather: Callable[[Any], list[Any]] = lambda place: [place]) -> dict[str, Any]:
        """JSON values, the same on every rank; `gather` brings the values of all ranks, in their order."""
        return {
            "leftover": self.leftover,
            "start": self.start,
            "places": gather([*self._place, self.too_long]),
            "window": self.windows.size,
            "origin": self.windows.origin,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there. With another number of ranks the remaining packs are dealt anew: none is lost,
        none comes twice, and the order is the sequence's. Another `batch_size` goes on from the same sample;
        raises ValueError for another window of packs (a budget, a tokenizer or data that changed)."""
        self.leftover = [(w, p) for w, p in state["leftover"]]
        self.start = state["start"]
        self.windows = replace(self.windows, origin=state["origin"])
        places = [(entry, taken) for entry, taken, _ in state["places"]]
        too_long = [n for *_, n in state["places"]]
        size = state["window"]
        if len(places) == self.ranks and size == self.windows.size:
            self._place, self.too_long = places[self.rank], too_long[self.rank]
        else:
            self.too_long = 0 if self.rank else sum(too_long)
            # the entries before `begun` are all that anybody has touched
            ahead = (entry + 1 if taken else entry + 1 - len(places) for entry, taken in places)
            begun = max(len(self.leftover), *ahead)
            entries = _Entries(tuple(self.leftover), self.start, 0, 1)
            left = []
            for entry in range(begun):
                reached, taken = places[entry % len(places)]
                if entry >= reached:
                    window, first = entries.entry(entry)
                    left.append((window, taken if entry == reached and taken else first))
            self.start += begun - len(self.leftover)
            self.leftover, self._place = left, (self.rank, 0)
        if size != self.windows.size:
            if self.leftover:
                raise ValueError(
                    f"the saved order of data has packs from windows of {size} samples, these data and "
                    f"settings make windows of {self.windows.size}: `batch_tokens`, tokenizer or data have "
                    "changed since"
                )
            self.windows = replace(self.windows, origin=state["origin"] + self.start * size)
            self.start = 0
        self._batches = self._stream()

    def _stream(self) -> Iterator[tuple[Batch, tuple[int, int], int]]:
        # A function of values, not of the loader: one that held its own stream
        # would outlive its last user, and its workers too.
        entries = _Entries(tuple(self.leftover), self.start, self._place[0], self.ranks)
        return _run(self.windows, entries, self._place[1], self.workers, self.pin)


@dataclass(frozen=True)
class _Entries(Iterable[int]):
    """The windows of the entries first, first + step, ... of a sequence."""

    leftover: tuple[tuple[int, int], ...]
    start: int
    first: int
    step: int

    def __iter__(self) -> Iterator[int]:
        return (self.entry(k)[0] for k in itertools.count(self.first, self.step))

    def entry(self, number: int) -> tuple[int, int]:
        """A window and its first pack."""
        if number < len(self.leftover):
            return self.leftover[number]
        return self.start + number - len(self.leftover), 0


def _run(
    windows: Windows, entries: _Entries, taken: int, workers: int, pin: bool
) -> Iterator[tuple[Batch, tuple[int, int], int]]:
    """Each pack, the place after it, and how many samples were left out since the last."""
    if workers:
        gc.collect()  # a process group that is garbage ends here, where its threads are, and in no fork
    loaded: Iterable[Window] = DataLoader(
        windows,  # type: ignore[arg-type]
        sampler=entries,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        worker_init_fn=_quiet,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # or it would draw from the generator of training
    )
    entry, left_out, empty = entries.first, 0, 0
    for packs, too_long in loaded:
        first = taken or entries.entry(entry)[1]
        left_out += 0 if first else too_long
        for k in range(first, len(packs)):
            last = k + 1 == len(packs)
            place = (entry + entries.step, 0) if last else (entry, k + 1)
            yield each_tensor(packs[k], torch.as_tensor), place, left_out
            left_out = 0
        empty = 0 if packs else empty + 1
        if empty == 3:
            raise ValueError(
                f"of {3 * windows.size} samples none fits {windows.budget} tokens; raise `batch_tokens`"
            )
        entry, taken = entry + entries.step, 0


def _as_it_is(window: Window) -> Window:
    return window


def _quiet(worker: int) -> None:
    """A worker ends with its parent; the signals that the parent answers by saving are not its own."""
    gc.freeze()  # what the parent made is not this process's to end: it waits for threads that are not here
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
