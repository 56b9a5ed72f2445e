"""What every phase measures with: rows as they come, medians by CUDA events, peaks, launches, guards.

On a CPU everything runs once and its times mean nothing: a proof that the script runs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import record

LOST = 3  # exit status of a process whose CUDA context is broken: what it would still measure is worthless


@dataclass(frozen=True)
class Settings:
    """How `bench/gpu.py` was asked."""

    device: str  # "cuda" or "cpu"
    tiny: bool
    quick: bool
    tune: bool
    ranks: int
    filled: bool  # whether the kernels were compiled beforehand
    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"


@dataclass
class Starts:
    """What a profiler saw of one call."""

    busy: float = 0.0  # seconds in which the GPU had work
    wall: float = 0.0  # seconds of a call without the profiler
    count: int = 0
    kernels: dict[str, tuple[int, float]] = field(
        default_factory=dict
    )  # name -> calls, seconds; longest first


def write_row(rows: Path, phase: str, case: str, **values: Any) -> None:
    """One line, whole or not at all: several processes append."""
    line = json.dumps({"phase": phase, "case": case, **record.rounded(values)})
    with rows.open("a") as file:
        file.write(line + "\n")


class Bench:
    """One phase in its own process."""

    def __init__(self, phase: str, settings: Settings) -> None:
        import torch

        self.phase, self.settings = phase, settings
        self.device, self.gpu = torch.device(settings.device), settings.device == "cuda"
        self.tiny, self.quick = settings.tiny, settings.quick
        self.end = float("inf")
        self._flush: Any = None

    @property
    def left(self) -> float:
        """Seconds of the turn that are left."""
        return self.end - time.monotonic()

    def row(self, case: str, who: str = "", **values: Any) -> None:
        named = {"who": who} if who else {}
        write_row(self.settings.rows, self.phase, case, **named, **values)
        print(case, who, values, flush=True)

    @contextlib.contextmanager
    def guard(self, case: str, who: str = "") -> Iterator[None]:
        """A failure within is a row; after a CUDA error the process ends, since nothing later can be
        trusted."""
        import torch

        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.row(case, who, error=f"{type(error).__name__}: {error}"[:400])
            if "CUDA error" in str(error) or "illegal memory access" in str(error):
                sys.exit(LOST)
        finally:
            gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()

    def sync(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """One call by the host's clock."""
        self.sync()
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    def turns(
        self,
        case: str,
        ways: Mapping[str, Callable[[], Any]],
        budget: float = 2.0,
        rates: Callable[[str, float], dict[str, float]] | None = None,
    ) -> dict[str, float]:
        """All ways in turn, an L2 flush before each; a row each with milliseconds, the first call's seconds
        and the peak GiB above what was held. A way that fails costs its row alone. Returns median
        seconds."""
        facts: dict[str, dict[str, float]] = {}
        alive: dict[str, Callable[[], Any]] = {}
        for who, run in ways.items():
            with self.guard(case, who):
                first = self.seconds(run)
                facts[who] = {"first_call_s": first} | self.peak(run)
                alive[who] = run
        samples: dict[str, list[float]] = {who: [] for who in alive}
        end = time.monotonic() + (budget / 4 if self.quick else budget)
        least, most = (5, 50) if self.gpu else (1, 1)
        for turn in range(most):
            if turn >= least and time.monotonic() > end:
                break
            for who, run in alive.items():
                samples[who].append(self._timed(run))
        medians = {who: statistics.median(x) for who, x in samples.items()}
        for who, seconds in samples.items():
            more = rates(who, medians[who]) if rates else {}
            self.row(case, who, unit="ms", samples=[1e3 * s for s in seconds], **more, **facts[who])
        return medians

    def _timed(self, run: Callable[[], Any]) -> float:
        import torch

        if not self.gpu:
            return self.seconds(run)
        if self._flush is None:
            self._flush = torch.empty(64 * 2**20, dtype=torch.int32, device=self.device)  # larger than any L2
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak(self, run: Callable[[], Any]) -> dict[str, float]:
        """GiB that a call takes above what was there."""
        import torch

        if not self.gpu:
            return {}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.sync()
        return {"GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}

    def starts(self, run: Callable[[], Any]) -> Starts:
        """Which kernels one call starts, and how long the GPU was busy with them."""
        if not self.gpu:
            return Starts()
        from torch.profiler import ProfilerActivity, profile

        run()
        found = Starts(wall=self.seconds(run))
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            self.sync()
        kernels: dict[str, tuple[int, float]] = {}
        for event in profiler.events():
            if str(event.device_type).endswith("CUDA"):
                calls, seconds = kernels.get(event.name, (0, 0.0))
                kernels[event.name] = calls + 1, seconds + event.device_time_total / 1e6
        found.kernels = dict(sorted(kernels.items(), key=lambda kv: -kv[1][1]))
        found.busy = sum(s for _, s in kernels.values())
        found.count = sum(n for n, _ in kernels.values())
        return found

    def host_row(self, case: str, run: Callable[[], Any], kernels: int = 0) -> None:
        """A row on how much of a call the GPU is busy, and one for each of the `kernels` longest kernels."""
        if not self.gpu:
            return
        found = self.starts(run)
        self.row(f"{case}: host", starts=found.count, wall_ms=1e3 * found.wall, busy_ms=1e3 * found.busy,
                 busy_share=found.busy / found.wall)  # fmt: skip
        for name, (calls, seconds) in list(found.kernels.items())[:kernels]:
            short = name.split("<")[0].split("(")[0][-48:]
            self.row(f"{case}: kernel {short}", calls=calls, us=1e6 * seconds, share=seconds / found.busy)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The Triton kernels that get a new specialisation within, from source or from the folder of compiled
    ones."""
    from triton import knobs

    found: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **about: found.append(about["fn"].name)  # type: ignore
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


def serve(phase: str, settings: Settings, link: Connection) -> None:
    """A phase's process: prepare, say so, wait for the turn, measure."""
    os.setsid()  # so that what it starts ends with it
    log = os.open(settings.folder / f"{phase}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module = importlib.import_module(f"bench.gpu_phases.{phase}")
    bench = Bench(phase, settings)
    prepared = module.prepare(bench)
    link.send(record.versions())
    try:
        seconds = link.recv()
    except EOFError:
        return  # nobody waits for this any more
    bench.end = time.monotonic() + seconds
    if bench.gpu:
        import torch

        link.send(torch.cuda.get_device_name())
    else:
        link.send("CPU (no measurement)")
    with bench.guard("whole phase"):
        module.run(bench, prepared)
    print(f"{time.process_time():.1f} s of this process's CPU", flush=True)
