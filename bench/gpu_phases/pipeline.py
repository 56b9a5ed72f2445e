"""The tiny pipeline, every stage a few steps, with every evaluation and the report: does it run there at all,
and does the loss fall."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path

from bench.gpu_phases.measure import Bench
from catmllm.config import STAGES, from_arguments

FEW = """
encoder.steps=60 align.steps=8 joint.steps=60 instruct.steps=20
encoder.log_every=1 align.log_every=1 joint.log_every=1 instruct.log_every=1
grpo.steps=2 grpo.batch_size=6 grpo.sampling.max_new_tokens=128
ga_grpo.tasks=4 ga_grpo.batch_size=4 ga_grpo.initial=4 ga_grpo.iterations=1 ga_grpo.group_size=4
ga_grpo.sampling.max_new_tokens=64
evaluate.judge=none evaluate.generation_samples=32 evaluate.design_tasks=4
"""
TINY = """
encoder.steps=2 align.steps=1 joint.steps=2 instruct.steps=1 grpo.steps=1
encoder.batch_size=4 align.batch_size=4 joint.batch_size=4 instruct.batch_size=4
grpo.batch_size=2 grpo.group_size=2 grpo.sampling.max_new_tokens=8
ga_grpo.tasks=1 ga_grpo.batch_size=1 ga_grpo.initial=2 ga_grpo.pool=2 ga_grpo.group_size=2
ga_grpo.sampling.max_new_tokens=8
evaluate.generation_samples=2 evaluate.design_tasks=1 evaluate.sampling.max_new_tokens=8
data.cutoff=4.0 data.max_neighbours=6
model.llm.hidden_size=64 model.llm.num_hidden_layers=1 model.llm.num_attention_heads=4
model.llm.intermediate_size=96
model.encoder.num_layers=1 model.encoder.sphere_channels=16 model.encoder.attn_hidden_channels=16
model.encoder.ffn_hidden_channels=16
"""
TINY_SYSTEMS = 60


def prepare(bench: Bench) -> list[str]:
    import catmllm.pipeline  # noqa: F401  seconds of imports

    out = bench.settings.folder / "pipeline"
    shutil.rmtree(out, ignore_errors=True)  # or it would go on with what a former call left
    words = [f"out={out}", "tensorboard=false", *FEW.split()]
    if bench.tiny:
        from catmllm.data.slabs import SHIPPED

        data = bench.settings.folder / "slabs.jsonl"
        with gzip.open(SHIPPED, "rt") as lines:
            data.write_text("".join(line for line, _ in zip(lines, range(TINY_SYSTEMS))))
        words += [f"data.path={data}", *TINY.split()]
    return words


def run(bench: Bench, words: list[str]) -> None:
    from catmllm.pipeline import run as run_pipeline

    os.environ["CATMLLM_TRACEBACK"] = "1"  # an error is raised, not printed as one line
    config = from_arguments(words)
    began = time.monotonic()
    with bench.guard("six stages, evaluation and report"):  # the stages' rows come all the same
        status = run_pipeline(config)
        failed = {"error": f"ended with {status}"} if status else {}
        bench.row("six stages, evaluation and report", seconds=time.monotonic() - began, **failed)
    for stage in STAGES:
        logged(bench, Path(config.out), stage)


def logged(bench: Bench, out: Path, stage: str) -> None:
    """What a stage's log says of its first and of its last steps."""
    log = out / stage / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if not rows:
        bench.row(f"stage {stage}", error="no log")
        return
    part = max(1, len(rows) // 4)
    first, last = (sum(r["loss"] for r in some) / len(some) for some in (rows[:part], rows[-part:]))
    falls = {"falls": last < first} if stage in ("encoder", "joint", "instruct") else {}
    kept = {
        k: rows[-1][k] for k in ("tokens_per_s", "seconds", "prepare_seconds", "memory_gib") if k in rows[-1]
    }
    bench.row(f"stage {stage}", steps=rows[-1]["step"] + 1, loss_first=first, loss_last=last, **falls, **kept)
