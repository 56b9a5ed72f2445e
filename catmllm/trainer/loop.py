"""The one training loop. A stage says what trains and turns a step into losses; all the rest is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from catmllm.config import Config, OptimConfig
from catmllm.data.batches import Collator
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.system import System
from catmllm.trainer import checkpoint
from catmllm.trainer.activations import prepare_blocks
from catmllm.trainer.distributed import World, full_state, shard
from catmllm.trainer.metrics import StageLog


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@dataclass
class Context:
    """What a stage works with: the model (sharded), its collator, the systems by split, and this process."""

    config: Config
    model: CatalyticMLLM
    collate: Collator
    data: Mapping[str, Sequence[System]]
    world: World
    folder: Path


@dataclass
class MicroBatch:
    """One forward and backward pass: a loss already scaled so that those of a step add up, and what to log.

    `tokens` counts the tokens that the pass reads; `metrics` are means over this rank's part of the step.
    """

    loss: Callable[[], torch.Tensor]
    tokens: int = 0


@dataclass
class Step:
    """All passes of one optimizer step on this rank; `metrics` is read after the last one."""

    passes: list[MicroBatch]
    metrics: dict[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """What differs between stages."""

    name: str

    @property
    def config(self) -> OptimConfig:
        """Steps, batch, learning rate."""

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""

    def step(self, step: int) -> Step:
        """The passes of optimizer step `step` on this rank; every rank must return equally many."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep beside weights and moments, as JSON values of this rank."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


class Stateless:
    """Base of stages whose steps are functions of the step number alone."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def train(make_stage: Callable[[Context], Stage], context: Context) -> tuple[dict[str, torch.Tensor], Stage]:
    """Run one stage to its end, from its newest checkpoint where there is one.

    Shards `context.model` in place. Returns the whole state dict, float32, on every rank, and the stage.
    """
    world, config = context.world, context.config
    stage = make_stage(context)
    _freeze(context.model, stage)
    prepare_blocks(context.model, config)
    optim = stage.config
    sharded = cast(FSDPModule, shard(context.model, config, world, optim.reshard))
    optimizer = _optimizer(context.model, optim)
    # From 2^16, the default, the first steps of every run overflow and are skipped: the MLP's scale takes 2^4 of the
    # range. At 2^8 gradients differ from float32's by 0.1 %, as at 2^10; growth finds the rest.
    scaler = torch.amp.GradScaler(
        world.device.type,
        init_scale=2.0**8,
        growth_interval=500,
        enabled="fp16" in (config.precision, config.encoder_precision),
    )
    trained = [p for p in context.model.parameters() if p.requires_grad]
    first = 0
    if (
        found := checkpoint.restore(context.folder / "checkpoints", context.model, optimizer, world)
    ) is not None:
        first, extra = found
        stage.load_state(extra["stage"])
        if scaler.is_enabled():
            scaler.load_state_dict(extra["scaler"])
    context.model.train()
    with StageLog(context.folder, stage.name, first, optim.steps, world.main, config.tensorboard) as log:
        for step in range(first, optim.steps):
            began = time.perf_counter()
            scale = lr_factor(step, optim)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            work = stage.step(step)
            prepared = time.perf_counter()
            loss = 0.0
            for i, part in enumerate(work.passes):
                sharded.set_requires_gradient_sync(i == len(work.passes) - 1)
                value = part.loss()
                scaler.scale(value).backward()
                loss += float(value.detach())
            norm = _update(optimizer, scaler, trained, optim.grad_clip) if work.passes else 0.0
            elapsed = time.perf_counter() - began
            row = world.mean({"loss": loss, **work.metrics})
            if not math.isfinite(row["loss"]):
                raise TrainingError(
                    f"{stage.name}: the loss is {row['loss']} at step {step}; the checkpoints in "
                    f"{context.folder / 'checkpoints'} are from before. Lower {stage.name}.lr or check the data."
                )
            tokens = world.size * sum(p.tokens for p in work.passes)
            row |= {"lr": optim.lr * scale, "grad_norm": norm, "tokens_per_s": tokens / elapsed}
            row |= {"seconds": elapsed, "prepare_seconds": prepared - began}
            if scaler.is_enabled():
                row["loss_scale"] = scaler.get_scale()
            if step % optim.log_every == 0 or step == optim.steps - 1:
                log.row(step, row)
            shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
            log.tick(shown | ({"reward": f"{row['reward']:.2f}"} if "reward" in row else {}))
            if (step + 1) % optim.checkpoint_every == 0 and step + 1 < optim.steps:
                extra = {"stage": stage.state(), "scaler": scaler.state_dict()}
                checkpoint.save(
                    context.folder / "checkpoints", step + 1, context.model, optimizer, extra, world
                )
    return full_state(context.model), stage


def _update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    trained: list[torch.nn.Parameter],
    grad_clip: float,
) -> float:
    """One clipped optimizer step on the accumulated gradients; returns their norm before clipping."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip, foreach=True)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Linear warm-up to 1, then a half cosine down to `min_lr_ratio` at the last step."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _freeze(model: CatalyticMLLM, stage: Stage) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.trains(name) and not name.startswith("llm.model.visual."))
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(f"{stage.name}: no parameter is trained")


def _optimizer(model: CatalyticMLLM, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed, encoder and projector may have a rate of their own."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            graph = name.startswith(("encoder.", "projector."))
            groups.setdefault((graph, parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": optim.weight_decay if decay else 0.0,
                "peak_lr": (optim.encoder_lr or optim.lr) if graph else optim.lr,
            }
            for (graph, decay), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=optim.betas,
        fused=True,
    )
