"""Several GPUs of a node: collectives, the joint step of the configurations for eight of them with FSDP2
(MFU, peak beside the plan's, how much of the gathers hides behind compute), and a rank that is killed and a
run that goes on.

Weights are random, of the published sizes; systems are made up, of 80 atoms. A rank is a process of its
own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu_phases.measure import Bench, Settings
from bench.gpu_phases.models import Maker, options, planned
from bench.gpu_phases.train import Ended, Stepping
from catmllm.config import Config, load_config
from catmllm.plan.made_up import synthetic_systems
from catmllm.stages import STAGES
from catmllm.train.loop import train
from catmllm.train.stage import Context
from catmllm.world import World, start
from catmllm_kernels.launch import architecture

STEPS = 6
KILLED_AFTER, RESUMED_STEPS = 4, 8  # logged steps before the kill, and of the whole run


def prepare(bench: Bench) -> dict[str, float]:
    """GiB that the plan foresees of each configuration."""
    data = systems(bench.tiny)
    return planned(configured(bench.tiny), data, bench.settings.ranks, 2, forked=not bench.gpu)


def systems(tiny: bool) -> dict[str, Any]:
    made = synthetic_systems(8 if tiny else 80, 24 if tiny else 96)
    return {"train": made, "val": made[:8], "test": made[:8]}


def configured(tiny: bool) -> dict[str, Config]:
    """The joint stage of the configurations for 8 GPUs of this kind, with random weights."""
    words = ["tensorboard=false", "joint.log_every=1", "joint.validate_every=0", f"joint.steps={STEPS + 1}"]
    if tiny:
        small = ["joint.batch_size=2", "model.encoder.num_layers=1", "data.cutoff=4.0", *options("tiny")]
        return {"tiny": load_config(None, [*words, *small])}
    alone = ["data.path=", "init=", "model.encoder.checkpoint=", "model.llm.pretrained=", "joint.warmup=2"]
    folder = "h100x8" if architecture() >= 90 else "a100x8"
    return {
        f"{folder} {size}": load_config(
            [f"{folder}/{size}.yaml", "a100x8/joint.yaml"], [*alone, *words, *options(size.upper())]
        )
        for size in ("3b", "7b")
    }


def run(bench: Bench, foreseen: dict[str, float]) -> None:
    everyone = Ranks(bench.settings)
    with bench.guard("collectives"):
        everyone.run(collectives)
    for name in configured(bench.tiny):
        with bench.guard(name):
            everyone.run(joint, name, foreseen.get(name))
    with bench.guard("killed and resumed"):
        killed(bench, everyone)


class Ranks:
    """Starts a function in N processes that find each other as torchrun's do."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.context = multiprocessing.get_context("fork" if settings.device == "cpu" else "spawn")

    def start(self, work: Callable[..., None], *arguments: Any) -> list[Any]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        made = []
        for rank in range(self.settings.ranks):
            given = (rank, port, self.settings, work, arguments)
            made.append(self.context.Process(target=one_rank, args=given))  # type: ignore[attr-defined]
            made[-1].start()
        return made

    def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """Raises RuntimeError if a rank fails; the others are then ended."""
        made = self.start(work, *arguments)
        while any(p.exitcode is None for p in made) and not any(p.exitcode for p in made):
            time.sleep(0.05)
        codes = end(made) if any(p.exitcode for p in made) else [p.exitcode for p in made]
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}; see ranks.log")


def end(made: Sequence[Any]) -> list[int]:
    """Kill what still runs; exit statuses."""
    for process in made:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return [process.exitcode for process in made]


def one_rank(rank: int, port: int, settings: Settings, work: Callable[..., None], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(settings.ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    world = start(load_config(None, []))
    bench = Bench("ranks", settings)
    bench.device = world.device
    work(bench, world, *arguments)
    dist.destroy_process_group()


def collectives(bench: Bench, world: World) -> None:
    """Milliseconds and bytes a second of the bus, as nccl-tests counts them: (n - 1) / n of what is
    gathered."""
    n = world.size
    for mib in (1,) if bench.tiny else (1, 64, 1024):
        whole = torch.zeros(mib * 2**18 // n * n, device=world.device)
        part = whole[: len(whole) // n].clone()
        calls: dict[str, Callable[[], Any]] = {
            "all-gather": lambda w=whole, p=part: dist.all_gather_into_tensor(w, p),
            "reduce-scatter": lambda w=whole, p=part: dist.reduce_scatter_tensor(p, w),
            "all-reduce": lambda w=whole: dist.all_reduce(w),
        }
        for name, call in calls.items():
            for _ in range(1 if bench.tiny else 5):
                call()
            samples = [bench.seconds(call) for _ in range(2 if bench.tiny else 20)]
            moved = (2 if name == "all-reduce" else 1) * whole.nbytes * (n - 1) / n
            if world.main:
                rate = {"GB/s": moved / statistics.median(samples) / 1e9}
                taken = [1e3 * s for s in samples]
                bench.row(f"{name} of {mib} MiB", "ours", unit="ms", samples=taken, **rate)


def joint(bench: Bench, world: World, name: str, planned_gib: float | None) -> None:
    """A few steps of the joint stage, the last one under the profiler."""
    config = configured(bench.tiny)[name]
    maker = Maker(systems(bench.tiny))
    model, collate = maker.model(config, bench.device)
    Stepping.steps = 3 if bench.tiny else STEPS
    busy: tuple[float, float] | None = None

    class Profiled(Stepping):
        def step(self, step: int) -> Any:
            if step == self.steps - 1 and bench.gpu:
                profiler.start()
            return super().step(step)

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Ended):
            train(Profiled, Context(config, model, collate, maker.data, world, Path(folder)))
        if bench.gpu:
            bench.sync()
            profiler.stop()
            ran = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]
            busy = overlap([(e.name, e.time_range.start, e.time_range.end) for e in ran])
        if not world.main:
            return
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    later = rows[1:-1]
    middle = {k: statistics.median(r[k] for r in later) for k in ("tokens_per_s", "mfu") if k in later[0]}
    more = {"GiB": rows[-1]["memory_gib"], "loss_last": rows[-1]["loss"]}
    more |= {} if planned_gib is None else {"planned_GiB": planned_gib}
    if busy and busy[0]:
        more |= {"communication_ms": busy[0] / 1e3, "hidden_share": busy[1] / busy[0]}
    samples = [1e3 * r["seconds"] for r in later]
    bench.row(f"joint, {name}", "ours", unit="ms", samples=samples, **middle, **more)


def overlap(events: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """(time in NCCL's kernels, how much of it passes while another kernel computes), in the events' unit.
    `events`: name, start, end of everything that the GPU ran."""
    sent = joined((a, b) for name, a, b in events if "nccl" in name.lower())
    computed = joined((a, b) for name, a, b in events if "nccl" not in name.lower() and "Mem" not in name)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in sent for c, d in computed)
    return sum(b - a for a, b in sent), both


def joined(spans: Any) -> list[tuple[float, float]]:
    """The union of intervals, in order."""
    out: list[tuple[float, float]] = []
    for a, b in sorted(spans):
        if out and a <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], b)
        else:
            out.append((a, b))
    return out


def killed(bench: Bench, everyone: Ranks) -> None:
    """A run of which one rank is killed and which is started again has the losses of one that is left
    alone."""
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place) / "whole", Path(place) / "broken"
        everyone.run(small_run, str(whole), RESUMED_STEPS)
        made = everyone.start(small_run, str(broken), 2)
        while len(losses(broken)) < KILLED_AFTER and all(p.exitcode is None for p in made):
            time.sleep(0.01)
        os.kill(made[-1].pid, signal.SIGKILL)
        began = time.monotonic()
        while any(p.exitcode is None for p in made) and time.monotonic() < began + 60:
            time.sleep(0.05)
        noticed = time.monotonic() - began
        end(made)
        at = len(losses(broken))
        everyone.run(small_run, str(broken), RESUMED_STEPS)
        equal = losses(broken) == losses(whole)
        bench.row("killed and resumed", killed_after=at, others_ended_s=noticed, steps=len(losses(broken)),
                  equal_losses=equal, **({} if equal else {"wrong": True}))  # fmt: skip


def small_run(bench: Bench, world: World, folder: str, checkpoint_every: int) -> None:
    words = [*options("tiny"), "tensorboard=false", "joint.log_every=1", "joint.batch_size=2",
             f"joint.checkpoint_every={checkpoint_every}", f"joint.steps={RESUMED_STEPS}",
             "data.cutoff=4.0"]  # fmt: skip
    config = load_config(None, words)
    Path(folder).mkdir(parents=True, exist_ok=True)
    maker = Maker(systems(True))
    model, collate = maker.model(config, torch.device("cpu"))
    train(STAGES["joint"], Context(config, model, collate, maker.data, world, Path(folder)))


def losses(folder: Path) -> list[float]:
    log = folder / "log.jsonl"
    return [json.loads(row)["loss"] for row in log.read_text().splitlines()] if log.is_file() else []
