"""What a step costs and where its time goes: model FLOPs and MFU, seconds by phase, memory, the profiler."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from catmllm.models.catalytic_mllm import CatalyticMLLM

PHASES = ("data", "forward", "backward", "optimizer", "comm", "checkpoint")
# Dense fp16/bf16 FLOP/s of a device by a part of its name (vendors' data sheets).
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "A800": 312e12, "L40S": 362e12, "V100": 125e12}
SKIPPED, TRACED = 2, 3  # steps that the profiler passes over, and that it keeps


def peak_flops(device: torch.device) -> float | None:
    """Dense half-precision FLOP/s of a known GPU, None of anything else."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((v for k, v in PEAKS.items() if k in name), None)


class ModelFlops:
    """FLOPs that training the LLM needs, without recomputation: 6 a parameter and token (2 forward, 2 for the
    gradient of the input, 2 for that of the weights), and the attention's products, 4 · layers · width ·
    length forward.

    Frozen weights count 4 where a gradient passes through them and 2 where none does. The encoder is not
    credited, so that the utilisation is a lower bound. Make it before sharding.
    """

    def __init__(self, model: CatalyticMLLM, gradient: bool) -> None:
        """`gradient`: whether a gradient passes through the LLM at all (stage 1a: no)."""
        self.forward = 0  # 2 a parameter
        self.backward = 0
        parts = [*model.text.layers.parameters(), *model.llm.lm_head.parameters()]
        for p in (p for p in parts if p.dim() > 1):
            self.forward += 2 * p.numel()
            self.backward += (4 if p.requires_grad else 2) * p.numel() if gradient else 0
        c = model.text.config
        head = model.text.layers[0].self_attn.head_dim
        per_position = 4 * c.num_hidden_layers * c.num_attention_heads * head
        self.attention = per_position * (3 if gradient else 1)

    def of(self, tokens: int, sequences: int) -> float:
        """FLOPs of a pass over `tokens` tokens in `sequences` sequences of about one length."""
        return tokens * (self.forward + self.backward + self.attention * tokens / max(1, sequences))


def memory_gib(device: torch.device) -> float:
    """Highest memory so far that tensors took on a GPU; on a CPU what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * 4096 / 2**30


class Clock:
    """Seconds of a step by phase, as this process waits for them;
    the same ranges are marked for the profiler."""

    def __init__(self, beat: Callable[[str], None] = lambda name: None) -> None:
        """`beat` hears of every phase that begins."""
        self.seconds: dict[str, float] = {}
        self.beat = beat

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.beat(name)
        began = time.perf_counter()
        with torch.profiler.record_function(f"phase:{name}"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


class Profile:
    """torch.profiler over a few steps: trace-<rank>.json for chrome://tracing or Perfetto,
    and phases.json."""

    def __init__(self, folder: Path, rank: int, device: torch.device) -> None:
        self.folder, self.rank, self.steps = folder, rank, 0
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds)
        self.table: str | None = None

    def step(self) -> None:
        """Count a finished step; begins and ends the trace when it is time."""
        self.steps += 1
        if self.steps == SKIPPED:
            self.profiler.start()
        elif self.steps == SKIPPED + TRACED:
            self.finish()

    def finish(self) -> None:
        """Write what was traced; a stage shorter than the window leaves what there is."""
        if self.steps < SKIPPED or self.table is not None:
            return
        self.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / f"trace-{self.rank}.json"))
        rows = phase_rows(self.profiler.events(), max(1, min(TRACED, self.steps - SKIPPED)))
        (self.folder / f"phases-{self.rank}.json").write_text(json.dumps(rows, indent=1))
        self.table = "\n".join(
            f"{name:10s} {row['host_ms']:10.1f} ms host {row['device_ms']:10.1f} ms device a step"
            for name, row in rows.items()
        )


def phase_rows(events: Any, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step by phase. `comm` is the time inside collectives,
    which lie in the other phases too."""
    rows = {name: {"host_ms": 0.0, "device_ms": 0.0} for name in PHASES}
    for e in events:
        if e.name.startswith("phase:"):
            name = e.name.removeprefix("phase:")
        elif e.name.startswith(("gloo:", "nccl:")):
            name = "comm"
        else:
            continue
        rows[name]["host_ms"] += e.cpu_time_total / 1000 / steps
        rows[name]["device_ms"] += e.device_time_total / 1000 / steps
    return rows
