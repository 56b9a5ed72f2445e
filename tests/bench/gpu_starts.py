"""What the phases of `make gpu` start on an H100: their own code at their own sizes, on fake tensors.

    TRITON_INTERPRET=0 python -m tests.bench.gpu_starts OUT.json PHASE …

In a process of its own, as `tests.plan.cuda_steps`, which writes down the starts. Layers that are alike start
the same: models have few here. Phase rollout starts no kernel of ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import catmllm.plan.trace as plan
from bench.gpu_phases import correct, edges, encoder, env, logprob, pipeline, prefill, ranks, train
from bench.gpu_phases.measure import Bench, Settings
from catmllm.config import STAGES, Config, from_arguments
from catmllm.data.open import open_data
from catmllm.models.equiformer_v2 import EquiformerV2, EquiformerV2Config
from catmllm.plan.ledger import backend_forced
from catmllm_kernels.launch import recorded
from catmllm_kernels.registry import tensors_of
from tests.plan.cuda_steps import Starting

ARCH = 90
CPU = torch.device("cpu")


class Once(Bench):
    """Calls what is ours once and measures nothing; a failure is one."""

    def turns(self, case: str, ways: Any, *_: Any) -> dict[str, float]:
        ways["ours"]()
        return {}

    def host_row(self, *_: Any, **__: Any) -> None:
        pass

    @contextmanager
    def guard(self, case: str, who: str = "") -> Iterator[None]:
        yield


@contextmanager
def counting() -> Iterator[None]:
    """Floats that are made within are fake, and what starts is written down."""
    with Starting(cuda=True), backend_forced("triton"), recorded(ARCH):
        yield


def unreal(part: Any) -> Any:
    """Arguments without data: made by torch.empty, floats are fake where it counts."""
    if isinstance(part, torch.Tensor):
        floats = part.is_floating_point()
        return (
            torch.empty(part.shape, dtype=part.dtype).requires_grad_(part.requires_grad) if floats else part
        )
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(unreal, part))
    return type(part)(map(unreal, part)) if isinstance(part, list | tuple) else part


def of_env(_: Bench) -> None:
    with recorded(ARCH) as found:
        env.our_start(torch.device("meta"))()
    Starting.starts["env"] = set(map(prefill.key_of, found))


def of_correct(_: Bench) -> None:
    for case, dtypes in correct.problems(False):
        for dtype in dtypes if case.compile else ():
            made = case.arguments(dtype, CPU, 0)
            with counting():
                given = unreal(made)
                out = case.function(*given)
                torch.autograd.grad(
                    out, [t for t in tensors_of(given) if t.requires_grad], torch.empty_like(out)
                )


def of_edges(bench: Bench) -> None:
    for size in edges.sizes(False).values():
        few = replace(size, degrees=(edges.PER_ATOM,) * 4)
        made = edges.escn.arguments(few, torch.bfloat16, CPU)[0]
        with counting():
            edges.timed(bench, edges.Problem("", few, 80, unreal(made)), None)


def of_encoder(bench: Bench) -> None:
    with counting():
        model = EquiformerV2(EquiformerV2Config.preset("31M", num_layers=2))
        for dtype in (torch.bfloat16, torch.float32):
            model.to(dtype)
            for training in (False, True):
                graph = encoder.random_graph(2, 80, CPU)
                encoder.timed(bench, "", model, None, graph, training)


def of_logprob(bench: Bench) -> None:
    bench.gpu = True  # its tiles are tried on a GPU alone
    for shape in logprob.SHAPES:
        with counting():
            logprob.timed(bench, None, *shape)


def of_train(_: Bench) -> None:
    for size, changes in train.RUNS:
        if "compile" not in changes:
            stepped(train.configured(size, changes), "joint")


def of_pipeline(_: Bench) -> None:
    for stage in STAGES:
        stepped(from_arguments(["out=none", "tensorboard=false", *pipeline.FEW.split()]), stage)


def of_ranks(_: Bench) -> None:
    with recorded(ARCH):
        configs = ranks.configured(False).values()
    for config in configs:
        stepped(config, "joint", 8)


def stepped(config: Config, stage: str, world: int = 1) -> None:
    """A step of the trainer, with few layers and few samples."""
    llm = replace(config.model.llm, num_hidden_layers=1)
    model = replace(config.model, llm=llm, encoder=replace(config.model.encoder, num_layers=2))
    few = replace(config.joint, batch_size=4, accumulate=1)
    data = {part: systems[:24] for part, systems in open_data().items()}
    plan.trace(replace(config, model=model, joint=few), stage, world, data=data, steps=1)


def main(out: Path, phases: list[str]) -> None:
    assert os.environ["TRITON_INTERPRET"] == "0", "start it with Triton's interpreter off"
    plan.Ledger = Starting  # type: ignore[misc]
    Starting.arch = ARCH
    bench = Once("starts", Settings("cpu", False, False, False, 0, True, Path()))
    compiled = set(map(prefill.key_of, prefill.launches(True, ARCH)))
    found = {}
    for phase in phases:
        Starting.starts = {}
        globals()[f"of_{phase}"](bench)
        keys = set().union(*Starting.starts.values())
        found[phase] = {"started": sorted(keys), "not compiled beforehand": sorted(keys - compiled)}
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
