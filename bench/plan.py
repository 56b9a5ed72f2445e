"""`catmllm plan` held to real training runs: peak bytes of live tensors by the allocator's own events,
on a CPU.

Each case trains two steps on one or two ranks under torch.profiler, which sees every allocation and release
that passes torch's allocator, those inside of operators too. `ratio` is planned over measured; the process is
as the system counts it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import record  # first: it decides whose packages are measured

SMALL = ["data.cutoff=5.0", "tensorboard=false"]
# 340M parameters: hidden 1024, 24 layers
LARGE = [
    *SMALL,
    "model.llm.hidden_size=1024",
    "model.llm.num_hidden_layers=24",
    "model.llm.num_attention_heads=16",
    "model.llm.num_key_value_heads=4",
    "model.llm.intermediate_size=3584",
    "model.llm.attention=sdpa",
]
# name -> (stage, ranks, overrides)
CASES: dict[str, tuple[str, int, list[str]]] = {
    "joint, fp32, one rank": ("joint", 1, [*SMALL, "precision=fp32", "joint.batch_size=12"]),
    "instruct, bf16, selective, two ranks": (
        "instruct",
        2,
        [*SMALL, "checkpointing=selective", "model.llm.attention=sdpa", "instruct.batch_size=16"],
    ),
    "align, bf16, two ranks": ("align", 2, [*SMALL, "align.batch_size=24"]),
    "joint, 340M, bf16, full, one rank": (
        "joint",
        1,
        [*LARGE, "checkpointing=full", "joint.batch_size=8"],
    ),
    "instruct, 340M, bf16, selective, two ranks": (
        "instruct",
        2,
        [*LARGE, "checkpointing=selective", "instruct.batch_size=6"],
    ),
}
QUICK = tuple(CASES)[:2]


class Enough(Exception):
    """Raised when the steps to be measured are done."""


def worker(name: str, out: Path) -> None:
    """Train two steps and write the peak of live tensor bytes, and the process's, of this rank."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from catmllm.config import load_config
    from catmllm.data.open import open_data
    from catmllm.models.build import new_model
    from catmllm.stages import STAGES
    from catmllm.train.loop import train
    from catmllm.train.stage import Context
    from catmllm.world import start

    stage, _, overrides = CASES[name]
    config = load_config(None, overrides)
    world = start(config)
    data = open_data()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def measured(context: Context) -> Any:
        made: Any = STAGES[stage](context)
        step = made.step

        def two(k: int) -> Any:
            if k == 2:
                raise Enough
            return step(k)

        made.step = two
        return made

    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        tempfile.TemporaryDirectory() as folder,
    ):
        model, collate = new_model(config, data["train"])
        with contextlib.suppress(Enough):
            train(measured, Context(config, model, collate, data, world, Path(folder)))
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    size = sum(p.numel() for p in model.parameters())
    row = {"peak": peak, "process": process, "process_before": before, "local_parameters": size}
    (out / f"{world.rank}.json").write_text(json.dumps(row))
    torch.distributed.destroy_process_group()


def measure(name: str) -> dict[str, float]:
    """The largest of all ranks, in bytes."""
    _, ranks, _ = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__]
        subprocess.run(
            [*command, "--worker", name, "--folder", folder],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("CATMLLM_TRACEBACK") else subprocess.DEVNULL,
        )
        rows = [json.loads(p.read_text()) for p in Path(folder).glob("*.json")]
    return {k: max(r[k] for r in rows) for k in rows[0]}


def planned(name: str) -> Any:
    from catmllm.config import load_config
    from catmllm.plan.trace import trace

    stage, ranks, overrides = CASES[name]
    return trace(load_config(None, overrides), stage, ranks, cuda=False, steps=2)


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder)
        return
    cases, parts = {}, {}
    for name in [args.case] if args.case else QUICK if args.quick else CASES:
        plan, real = planned(name), measure(name)
        cases[name] = {
            "planned": [plan.peak * 1024],
            "measured": [real["peak"] / 2**20],
            "process": [real["process"] / 2**20],
        }
        parts[name] = plan.parts
    claim = record.claim(
        "plan",
        "peak of live tensors of a training step per rank, planned compared with measured",
        "MiB",
        cases,
        {"precision, ranks": "in the names", "parts planned, GiB": parts},
        less_is_better=False,
    )
    record.finish(args, [claim])


if __name__ == "__main__":
    main()
