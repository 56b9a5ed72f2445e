"""From a stage and its model to what a step works on: frozen, adapted, wrapped, sharded, with an optimizer.

The loop trains with it and a plan traces it, so that a plan is of the very thing that runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from catmllm.config import OptimConfig
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.lora import add_lora
from catmllm.train.activations import prepare_blocks
from catmllm.train.fused_adam import over_shards
from catmllm.train.sharding import shard
from catmllm.train.stage import Context, Stage
from catmllm.train.stop import TrainingError
from catmllm.train.throughput import ModelFlops

READS_ENERGY = ("encoder.", "energy_head.graph.")  # what says energies of structures without the LLM
READS_GRAPHS = (*READS_ENERGY, "projector.")
# A stage that trains it may train adapters instead.
ADAPTED = "llm.model.language_model.layers.0.self_attn.q_proj.weight"


@dataclass
class Ready:
    """What `prepare` made of a stage's model, which it changed in place."""

    model: FSDPModule
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of float16's gradients; disabled where nothing is float16
    flops: ModelFlops
    adapters: bool  # of the LLM: they train in place of its weights


def prepare(stage: Stage, context: Context) -> Ready:
    """Freeze what `stage` does not train, add adapters, wrap the blocks, shard; make the optimizer.

    Raises TrainingError for a stage that trains nothing, and what `shard` and the optimizer raise.
    """
    config, model, optim = context.config, context.model, stage.config
    adapters = config.lora.r > 0 and stage.trains(ADAPTED)
    if adapters:
        dropout = 0.0 if stage.samples else config.lora.dropout
        add_lora(model, replace(config.lora, dropout=dropout), config.seed)
    freeze(model, stage, adapters)
    prepare_blocks(model, config)
    flops = ModelFlops(model, stage.name != "align")
    sharded = cast(FSDPModule, shard(model, config, context.world, optim.reshard))
    # From 2^16, the default, the first steps of every run overflow and are skipped: the MLP's scale takes 2^4
    # of the range. At 2^8 gradients differ from float32's by 0.1 %, as at 2^10; growth finds the rest.
    scaler = torch.amp.GradScaler(
        context.world.device.type,
        init_scale=2.0**8,
        growth_interval=500,
        enabled="fp16" in (config.precision, config.encoder_precision),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    return Ready(sharded, trained, adamw(model, optim, config.optimizer), scaler, flops, adapters)


def freeze(model: CatalyticMLLM, stage: Stage, adapters: bool) -> None:
    """What the stage names trains; of an adapted LLM the adapters alone."""
    for name, parameter in model.named_parameters():
        own = not adapters or not name.startswith("llm.") or ".lora_" in name
        parameter.requires_grad_(stage.trains(name) and own)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(f"{stage.name}: no parameter is trained")


def adamw(model: CatalyticMLLM, optim: OptimConfig, kind: str = "torch") -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed, encoder and projector may have a rate of their own."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            graph = name.startswith(READS_GRAPHS)
            groups.setdefault((graph, parameter.dim() > 1), []).append(parameter)
    rated = [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decay else 0.0,
            "peak_lr": (optim.encoder_lr or optim.lr) if graph else optim.lr,
        }
        for (graph, decay), parameters in groups.items()
    ]
    if kind == "apex":
        return over_shards(rated, optim.lr, optim.betas)
    return torch.optim.AdamW(rated, lr=optim.lr, betas=optim.betas, fused=True)


def clip(ready: Ready, most: float) -> torch.Tensor:
    """Scale the accumulated gradients to a norm of at most `most`; returns the norm that they had, on their
    device: not finite where float16's overflowed, and `update` then changes nothing."""
    ready.scaler.unscale_(ready.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(ready.trained, most, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def update(ready: Ready) -> None:
    """One optimizer step on gradients that `clip` has seen. It waits for no device: AdamW's fused step looks
    itself whether float16's gradients overflowed."""
    ready.scaler.step(ready.optimizer)
    ready.scaler.update()
    ready.optimizer.zero_grad(set_to_none=True)


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Linear warm-up to 1, then a half cosine down to `min_lr_ratio` at the last step."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
