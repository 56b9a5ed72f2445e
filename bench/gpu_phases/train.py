"""The joint stage on LLMs of published sizes beside the 31M encoder, by the trainer's own loop: tokens per
second, MFU, and the peak of memory beside that of the plan."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_phases.measure import Bench
from bench.gpu_phases.models import Maker, options, planned, some_systems
from catmllm.config import Config, load_config
from catmllm.stages.joint import Joint
from catmllm.train.loop import train
from catmllm.train.stage import Context, Step
from catmllm.world import World, start

STEPS, WARM = 12, 4
RUNS = [  # the LLM, what the configuration changes; compiled ones last: they compile for a minute
    ("0.5B", "precision=bf16"),
    ("3B", "precision=bf16 checkpointing=full"),
    ("3B", "precision=fp16 checkpointing=full"),
    ("1.5B", "precision=bf16 checkpointing=selective"),
    ("0.5B", "precision=fp16"),
    ("0.5B", "precision=bf16 compile=true"),
]
TINY = [("tiny", "precision=bf16"), ("tiny", "precision=fp16")]


@dataclass
class Run:
    """One of `RUNS`, and what was planned of it."""

    name: str
    config: Config
    planned_gib: float | None


class Ended(Exception):
    """Raised in place of a step after the last one: the whole state that a stage returns is not wanted."""


class Stepping(Joint):
    """The joint stage, left after `STEPS` steps."""

    steps = STEPS

    def step(self, step: int) -> Step:
        if step >= self.steps:
            raise Ended
        return super().step(step)


def configured(size: str, changes: str) -> Config:
    half = changes.split()[0].removeprefix("precision=")
    words = [f"encoder_precision={half}", "tensorboard=false", "joint.log_every=1", "joint.warmup=2",
             "joint.lr=1e-4", "joint.train_encoder=true", f"joint.steps={STEPS + 1}"]  # fmt: skip
    if size == "tiny":
        words += ["joint.batch_size=4", "model.encoder.num_layers=1", "data.cutoff=4.0"]
    else:
        words += ["joint.batch_size=144", "data.workers=4", "model.encoder.preset=31M", "data.cutoff=12",
                  "data.max_neighbours=20"]  # fmt: skip
    return load_config(None, [*words, *options(size), *changes.split()])


def prepare(bench: Bench) -> tuple[Maker, list[Run]]:
    maker = Maker(some_systems() if bench.tiny else None)
    configs = {
        f"{size}, {changes}": configured(size, changes) for size, changes in (TINY if bench.tiny else RUNS)
    }
    # a plan knows nothing of torch.compile
    asked = {n: c for n, c in configs.items() if not c.compile and not (bench.tiny and c.precision == "fp16")}
    found = planned(asked, maker.data, 1, 2 if bench.tiny else STEPS, forked=not bench.gpu)
    return maker, [Run(n, c, found.get(n.removesuffix(" compile=true"))) for n, c in configs.items()]


def run(bench: Bench, prepared: tuple[Maker, list[Run]]) -> None:
    maker, runs = prepared
    world = start(runs[0].config)
    Stepping.steps = 3 if bench.tiny else STEPS
    for one in runs:
        with bench.guard(one.name), tempfile.TemporaryDirectory() as folder:
            measured(bench, maker, one, world, Path(folder))
    torch.distributed.destroy_process_group()


def measured(bench: Bench, maker: Maker, one: Run, world: World, folder: Path) -> None:
    began = time.monotonic()
    model, collate = maker.model(one.config, bench.device)
    made = time.monotonic() - began
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(Ended):
        train(Stepping, Context(one.config, model, collate, maker.data, world, folder))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    later = rows[min(WARM, len(rows) - 1) :]
    kept = ("tokens_per_s", "tflops", "mfu", "prepare_seconds", "memory_gib")
    middle = {k: statistics.median(r[k] for r in later) for k in kept if k in later[0]}
    middle["GiB"] = middle.pop("memory_gib")
    more = {"first_step_s": rows[0]["seconds"], "model_s": made}
    more |= {} if one.planned_gib is None else {"planned_GiB": one.planned_gib}
    more |= {"loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"]}
    more |= {"skipped_steps": rows[-1]["skipped_steps"]} if "skipped_steps" in rows[-1] else {}
    bench.row(one.name, "ours", unit="ms", samples=[1e3 * r["seconds"] for r in later], **middle, **more)
