"""What a person reads while a stage runs: the line that says what trains, and the progress line."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from catmllm.train.stage import Context


def describe(context: Context, stage: str) -> str:
    """One line of what runs on what."""
    config, model, world = context.config, context.model, context.world

    def part(name: str, parameters: Iterable[torch.nn.Parameter]) -> str:
        some = list(parameters)
        total, trained = (sum(p.numel() for p in some if p.requires_grad >= least) for least in (0, 1))
        share = "trained" if trained == total else "frozen" if not trained else f"{_short(trained)} trained"
        return f"{name} {_short(total)} ({share})"

    llm = (p for n, p in model.llm.named_parameters() if not n.startswith("model.visual."))
    graph = (*model.encoder.parameters(), *model.projector.parameters())
    shards = world.size // config.replicate
    mesh = f"{shards} shards" + (f" x {config.replicate} copies" if config.replicate > 1 else "")
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    forced = os.environ.get("CATMLLM_KERNELS")
    kernels = forced or ("Triton" if world.device.type == "cuda" else "CPU")
    seen = f", {part('image tower', model.visual.parameters())}" if config.data.images else ""
    return (
        f"{stage}: {part('LLM', llm)}, {part('encoder', graph)}{seen} on {world.size} x {device} ({mesh}); "
        f"LLM in {config.precision}, encoder in {config.encoder_precision}, master weights fp32; attention "
        f"{config.model.llm.attention}, kernels {kernels}, checkpointing {config.checkpointing}"
        + (", compiled blocks" if config.compile else "")
        + (f", LoRA r {config.lora.r}" if config.lora.r else "")
    )


def _short(n: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)


def shown(row: dict[str, float]) -> dict[str, str]:
    """The progress line."""
    line = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
    if "reward" in row:
        line["reward"] = f"{row['reward']:.2f}"
    if "mfu" in row:
        line["MFU"] = f"{row['mfu']:.1%}"
    line |= {
        "data": f"{row['prepare_seconds'] / row['seconds']:.0%}",
        "GiB": f"{row['memory_gib']:.1f}",
    }
    if "loss_scale" in row:
        line |= {"scale": f"{row['loss_scale']:.0f}", "skipped": f"{row['skipped_steps']:.0f}"}
    if "val" in row:
        line["val"] = f"{row['val']:.4g}"
    return line
