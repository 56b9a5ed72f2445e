"""A run that hangs ends by itself and says where: which rank stands in which call.

Ranks wait for each other in every step. One that stays in a loop or on a dead disk leaves all others in a
collective, in silence. So a thread of each rank looks whether its step moves; after too long it writes where
its own process stands, reads what the others wrote, and ends the process, which torchrun takes as a failure.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from catmllm.train.store import Folder, StoreError

EXIT_HUNG = 76  # EX_PROTOCOL
GRACE = 5.0  # seconds that ranks give each other to write
PACKAGE = str(Path(__file__).parents[1])


class Watchdog:
    """Watches the thread that makes it. `beat` says what that thread begins; where it begins nothing else for
    `limit` seconds (0: for ever), the process ends with status 76.

    In `folder` rank-N.txt has the stacks of all threads. In `shared`, which all ranks see (None: `folder`),
    rank-N.json has the call.
    """

    def __init__(
        self, folder: Path, rank: int, ranks: int, limit: float, shared: Folder | None = None
    ) -> None:
        self.folder, self.rank, self.ranks, self.limit = folder, rank, ranks, limit
        self.shared = shared or Folder(folder)
        self.thread = threading.get_ident()
        self.beat("the first step")
        self._over, self._telling = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="catmllm-watchdog", daemon=True)

    def beat(self, what: str) -> None:
        self._now = (what, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self.limit:
            if self.rank == 0:
                self.shared.remove()
            self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._telling.is_set():  # who ended first has broken our collective: no news
            self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self.limit / 4)):
            what, since = self._now
            if (spent := time.monotonic() - since) > self.limit:
                self._telling.set()
                try:
                    self._tell(what, spent)
                finally:
                    os._exit(EXIT_HUNG)

    def _tell(self, what: str, spent: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {"rank": self.rank, "in": what, "seconds": round(spent, 1), **stands(self.thread)}
        with (self.folder / f"rank-{self.rank}.txt").open("w") as f:
            faulthandler.dump_traceback(f, all_threads=True)
        told = {self.rank: found}
        with contextlib.suppress(StoreError):
            self.shared.write(f"rank-{self.rank}.json", json.dumps(found).encode())
        time.sleep(GRACE)
        for rank in {*range(self.ranks)} - {self.rank}:
            with contextlib.suppress(StoreError, json.JSONDecodeError):  # one may be written at this moment
                told[rank] = json.loads(self.shared.read(f"rank-{rank}.json") or b"")
        if min(told) == self.rank:
            said = verdict([told[rank] for rank in sorted(told)], self.ranks, self.folder)
            print(said, file=sys.stderr, flush=True)


def stands(thread: int) -> dict[str, Any]:
    """Where a thread of this process stands: the `collective` that it waits in (None: in none), its innermost
    `call`, and the line of ours that led there."""
    frame: FrameType | None = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame)
    inner = stack[-1]
    collective, ours = _where(stack)
    line = f" ({inner.line})" if inner.line else ""
    return {
        "collective": collective,
        "call": f"{inner.name} at {inner.filename}:{inner.lineno}{line}",
        "line": ours,
    }


def _where(stack: traceback.StackSummary) -> tuple[str | None, str | None]:
    """The collective of a stack, and the innermost line of ours."""
    inside = [s for s in stack if "torch/distributed/distributed_c10d" in s.filename.replace(os.sep, "/")]
    # the outermost of its functions is the one that was called
    collective = next((s.name for s in inside if s.name != "wrapper"), None)
    mine = [s for s in stack if s.filename.startswith(PACKAGE)]
    ours = f"{Path(mine[-1].filename).relative_to(Path(PACKAGE).parent)}:{mine[-1].lineno}" if mine else None
    return collective, ours


def lost(error: RuntimeError, rank: int) -> str | None:
    """One line where an error says that another rank has died; None: it says something else."""
    text = next(iter(str(error).splitlines()), "")
    if not isinstance(error, dist.DistError) and "/gloo/" not in text:
        return None
    collective, ours = _where(traceback.extract_tb(error.__traceback__))
    why = text.rpartition("] ")[2] if text.startswith("[") else text
    return (
        f"another rank is gone: rank {rank} stood in {collective or 'a collective'} ({ours}) and read: "
        f"{why.partition('. ')[0]}. The log of that rank has the reason; the same command goes on"
    )


def verdict(told: list[dict[str, Any]], ranks: int, folder: Path) -> str:
    """Which rank holds up the others, from what each has written."""
    there = {one["rank"] for one in told}
    silent = sorted(set(range(ranks)) - there)
    waiting = [one for one in told if one["collective"]]
    elsewhere = [one for one in told if not one["collective"]]
    said = [
        f"rank {one['rank']} is in {one['call']}, {one['seconds']:g} s after it began {one['in']}"
        for one in elsewhere
    ]
    if silent:
        said.append(f"rank {', '.join(map(str, silent))} says nothing: it is gone, or holds Python's lock")
    said += [
        f"rank {one['rank']} waits in {one['collective']} ({one['line']}), begun in {one['in']}"
        for one in waiting
    ]
    return f"error: the run hangs and ends here: {'; '.join(said)}. The stacks are in {folder}."
