"""The one training loop. A stage says what trains and turns a step into losses; all the rest is here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from catmllm.config import Config, OptimConfig
from catmllm.data.batches import Collator
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.lora import add_lora, merged
from catmllm.seeds import hash_seed
from catmllm.structure.system import System
from catmllm.train.activations import prepare_blocks
from catmllm.train.checkpoint import CheckpointError, Checkpoints
from catmllm.train.fused_adam import over_shards
from catmllm.train.metrics import StageLog
from catmllm.train.sharding import full_state, shard
from catmllm.train.stop import LossWatch, Stopped, TrainingError, stop_signals
from catmllm.train.throughput import Clock, ModelFlops, Profile, memory_gib, peak_flops
from catmllm.world import World

ADAPTED = (
    "llm.model.language_model.layers.0.self_attn.q_proj.weight"  # a stage that trains it may train adapters
)


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
    sequences: int = 1
    batch: Any = None  # saved where the loss goes wrong


@dataclass
class Step:
    """All passes of one optimizer step on this rank; `metrics` is read after the last one."""

    passes: list[MicroBatch]
    metrics: dict[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """What differs between stages."""

    name: str
    any_ranks: bool  # whether `state` may be read by another number of ranks

    @property
    def config(self) -> OptimConfig:
        """Steps, batch, learning rate."""

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""

    def begin(self) -> None:
        """Called once, when the model is sharded and has its weights."""

    def step(self, step: int) -> Step:
        """The passes of optimizer step `step` on this rank; every rank must return equally many."""

    def end(self) -> None:
        """Called once, however training ended."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep beside weights and moments, as JSON values of this rank."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


class Stateless:
    """Base of stages whose steps are functions of the step number alone."""

    any_ranks = True

    def begin(self) -> None:
        """Nothing to prepare."""

    def end(self) -> None:
        """Nothing to put away."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def train(make_stage: Callable[[Context], Stage], context: Context) -> tuple[dict[str, torch.Tensor], Stage]:
    """Run one stage to its end, from its newest checkpoint where there is one.

    Shards `context.model` in place. Returns the whole state dict, float32, on the main rank (empty on the others), and
    the stage. Raises `Stopped` after a signal, when the state is saved, and `TrainingError` where the loss is not
    finite or jumps; the batch is then saved, and the weights are from before it.
    """
    world, config = context.world, context.config
    stage = make_stage(context)
    optim = stage.config
    adapters = config.lora.r > 0 and stage.trains(ADAPTED)
    if adapters:
        add_lora(context.model, config.lora, config.seed)
    _freeze(context.model, stage, adapters)
    prepare_blocks(context.model, config)
    flops = ModelFlops(context.model, stage.name != "align")
    sharded = cast(FSDPModule, shard(context.model, config, world, optim.reshard))
    with contextlib.ExitStack() as after:
        after.callback(stage.end)
        stage.begin()
        _steps(context, stage, sharded, flops)
    state = full_state(context.model, world)
    return (merged(state, config.lora) if adapters else state), stage


def _steps(context: Context, stage: Stage, sharded: FSDPModule, flops: ModelFlops) -> None:
    """All steps of a stage that has begun, from its newest checkpoint on."""
    world, config, folder, optim = context.world, context.config, context.folder, stage.config
    if world.main:
        print(describe(context, stage.name), flush=True)
    run = _Run(context, stage, _optimizer(context.model, optim, config.optimizer), flops)
    context.model.train()
    with (
        stop_signals() as signals,
        StageLog(folder, stage.name, run.step, optim.steps, config, world.main) as log,
        run.checkpoints,
    ):
        while run.step < optim.steps and not run.enough:
            row = run.one_step(sharded, bool(signals))
            if validates(optim, run.step):
                row |= run.validate()
            if (run.step - 1) % optim.log_every == 0 or run.step == optim.steps or run.enough:
                log.row(run.step - 1, row)
            log.tick(_shown(row))
            stopping = run.stopping and run.step < optim.steps
            if run.step < optim.steps and (
                stopping or run.improved or run.step % optim.checkpoint_every == 0
            ):
                with run.clock.phase("checkpoint"):
                    run.save()
            run.checkpoints.poll()
            if run.profile is not None:
                run.profile.step()
            if stopping:
                run.checkpoints.settle()
                if run.checkpoints.failures:
                    raise CheckpointError(f"{stage.name}: stopped after step {run.step - 1}, but not saved")
                raise Stopped(f"{stage.name}: saved after step {run.step - 1}")
        if run.profile is not None:
            run.profile.finish()
            log.note(run.profile.table)
        if run.best is not None and run.best_step < run.step:
            run.checkpoints.restore_best(context.model)
            log.note(
                f"{stage.name}: the weights of step {run.best_step} are kept (validation {run.best:.4g})"
            )


class _Run:
    """One stage under way: what a step changes beside the weights, and what a checkpoint must hold of it."""

    def __init__(
        self, context: Context, stage: Stage, optimizer: torch.optim.Optimizer, flops: ModelFlops
    ) -> None:
        config, world = context.config, context.world
        self.context, self.stage, self.optimizer, self.flops = context, stage, optimizer, flops
        # From 2^16, the default, the first steps of every run overflow and are skipped: the MLP's scale takes 2^4 of
        # the range. At 2^8 gradients differ from float32's by 0.1 %, as at 2^10; growth finds the rest.
        self.scaler = torch.amp.GradScaler(
            world.device.type,
            init_scale=2.0**8,
            growth_interval=500,
            enabled="fp16" in (config.precision, config.encoder_precision),
        )
        self.trained = [p for p in context.model.parameters() if p.requires_grad]
        self.watch = LossWatch(getattr(stage.config, "spike", 0.0))
        self.clock, self.peak = Clock(), peak_flops(world.device)
        self.profile = (
            Profile(context.folder / "profile", world.rank, world.device) if config.profile else None
        )
        self.step = 0  # updates done
        self.drawn = 0  # the same, counted in steps of today's ranks and batches
        self.skipped = 0
        self.best: float | None = None
        self.best_step, self.worse = 0, 0  # of the best validation, and how many since were not better
        self.improved = self.stopping = False
        self.checkpoints = Checkpoints(context.folder / "checkpoints", world, config.keep_checkpoints)
        if (found := self.checkpoints.restore(context.model, optimizer)) is not None:
            self._restore(*found)

    def one_step(self, sharded: FSDPModule, signalled: bool) -> dict[str, float]:
        """Passes, judgement of the loss, update. Returns what to log."""
        stage, world, optim, clock = self.stage, self.context.world, self.stage.config, self.clock
        began = time.perf_counter()
        # All that a pass draws (dropout) is a function of seed, step and rank, so that no generator has to be saved.
        torch.manual_seed(hash_seed([self.context.config.seed, 23, self.step, world.rank]))
        scale = lr_factor(self.step, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        with clock.phase("data"):
            work = stage.step(self.drawn)
        total = torch.zeros((), device=world.device)
        for i, part in enumerate(work.passes):
            sharded.set_requires_gradient_sync(optim.sync_every_pass or i == len(work.passes) - 1)
            with clock.phase("forward"):
                value = part.loss()
            with clock.phase("backward"):
                self.scaler.scale(value).backward()
            total += value.detach()
        loss = float(total)
        row = world.mean({"loss": math.inf if math.isnan(loss) else loss, "stop": signalled, **work.metrics})
        self.stopping = row.pop("stop") > 0
        if problem := self.watch.judge(row["loss"]):
            raise TrainingError(self._bad_batch(problem, loss, work))
        norm = 0.0
        if work.passes:
            with clock.phase("optimizer"):
                norm, skipped = _update(self.optimizer, self.scaler, self.trained, optim.grad_clip)
            self.skipped += skipped
        self.step, self.drawn = self.step + 1, self.drawn + 1
        elapsed = time.perf_counter() - began
        tokens = sum(p.tokens for p in work.passes)
        done = sum(self.flops.of(p.tokens, p.sequences) for p in work.passes)
        seconds = clock.take()
        row |= {"lr": optim.lr * scale, "grad_norm": norm, "tokens_per_s": world.size * tokens / elapsed}
        row |= {"tflops": done / elapsed / 1e12, "memory_gib": memory_gib(world.device)}
        if self.peak is not None:
            row["mfu"] = done / elapsed / self.peak
        row |= {"seconds": elapsed, "prepare_seconds": seconds["data"]}
        if self.scaler.is_enabled():
            row |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.skipped}
        return row

    def validate(self) -> dict[str, float]:
        """Judge the weights on the validation systems; notes whether they are the best so far."""
        self.context.model.eval()
        with torch.no_grad():
            found = cast(Any, self.stage).validate()
        self.context.model.train()
        row = self.context.world.mean(found)
        value = row["val"]
        self.improved = math.isfinite(value) and (self.best is None or value < self.best)
        if self.improved:
            self.best, self.best_step, self.worse = value, self.step, 0
        else:
            self.worse += 1
        return row

    @property
    def enough(self) -> bool:
        """Whether so many validations brought nothing better that the stage ends."""
        patience = getattr(self.stage.config, "patience", 0)
        return bool(patience) and self.worse >= patience

    def save(self) -> None:
        extra = {
            "stage": self.stage.state(),
            "scaler": self.scaler.state_dict(),
            "losses": self.watch.recent,
            "samples": self.drawn * self.context.world.size * self.stage.config.batch_size,
            "skipped": self.skipped,
            "validation": [self.best, self.best_step, self.worse],
        }
        value = self.best if self.improved else None
        self.improved = False
        self.checkpoints.save(self.step, self.context.model, self.optimizer, extra, value)

    def _restore(self, record: dict[str, Any], extra: dict[str, Any]) -> None:
        self.step, world = record["step"], self.context.world.size
        if record["world"] != world and not self.stage.any_ranks:
            raise TrainingError(
                f"{self.stage.name} was begun on {record['world']} ranks and holds a state of each; "
                f"resume it on as many, not on {world}"
            )
        # Ranks or batches may be others than before: the data go on from where they were.
        self.drawn = -(-extra["samples"] // (world * self.stage.config.batch_size))
        self.skipped, self.watch.recent = extra["skipped"], extra["losses"]
        self.best, self.best_step, self.worse = extra["validation"]
        self.stage.load_state(extra["stage"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(extra["scaler"])

    def _bad_batch(self, problem: str, loss: float, work: Step) -> str:
        """Save this rank's batches of a step that went wrong; returns what to say."""
        stage, world, folder = self.stage, self.context.world, self.context.folder
        path = folder / f"bad-step-{self.step:07d}-rank-{world.rank}.pt"
        with contextlib.suppress(OSError):  # a full disk must not hide the loss
            torch.save(
                {"step": self.step, "loss": loss, "batches": [tensors(p.batch) for p in work.passes]}, path
            )
        losses = world.gather(loss)
        worst = max(range(world.size), key=lambda r: math.inf if math.isnan(losses[r]) else losses[r])
        half = " (float16 may have overflowed: try precision=bf16)" if self.scaler.is_enabled() else ""
        return (
            f"{stage.name}: {problem} at step {self.step}{half}; no weight was changed by it. The batches are in "
            f"{folder / f'bad-step-{self.step:07d}-rank-*.pt'} (rank {worst} has the highest loss), the checkpoints in "
            f"{folder / 'checkpoints'} are from before. Look at the data, or lower {stage.name}.lr and start again."
        )


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
    seen = f", {part('image tower', model.llm.model.visual.parameters())}" if config.data.images else ""
    return (
        f"{stage}: {part('LLM', llm)}, {part('encoder', graph)}{seen} on {world.size} x {device} ({mesh}); LLM in "
        f"{config.precision}, encoder in {config.encoder_precision}, master weights fp32; attention "
        f"{config.model.llm.attention}, kernels {kernels}, checkpointing {config.checkpointing}"
        + (", compiled blocks" if config.compile else "")
        + (f", LoRA r {config.lora.r}" if config.lora.r else "")
    )


def _short(n: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)


def validates(optim: OptimConfig, step: int) -> bool:
    """Whether the weights after `step` updates are validated."""
    every = getattr(optim, "validate_every", 0)
    return bool(every) and (step % every == 0 or step == optim.steps)


def tensors(batch: Any) -> Any:
    """A batch as nested dicts of CPU tensors and numbers, which `torch.load(weights_only=True)` reads."""
    if dataclasses.is_dataclass(batch):
        return {f.name: tensors(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    return batch.cpu() if isinstance(batch, torch.Tensor) else batch


def _shown(row: dict[str, float]) -> dict[str, str]:
    """The progress line."""
    shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}"}
    if "reward" in row:
        shown["reward"] = f"{row['reward']:.2f}"
    if "mfu" in row:
        shown["MFU"] = f"{row['mfu']:.1%}"
    shown |= {
        "data": f"{row['prepare_seconds'] / row['seconds']:.0%}",
        "GiB": f"{row['memory_gib']:.1f}",
    }
    if "loss_scale" in row:
        shown |= {"scale": f"{row['loss_scale']:.0f}", "skipped": f"{row['skipped_steps']:.0f}"}
    if "val" in row:
        shown["val"] = f"{row['val']:.4g}"
    return shown


def _update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    trained: list[torch.nn.Parameter],
    grad_clip: float,
) -> tuple[float, bool]:
    """One clipped optimizer step on the accumulated gradients; returns their norm before clipping, and whether the step
    was skipped because float16 gradients overflowed."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip, foreach=True)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm), scaler.get_scale() < scale


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Linear warm-up to 1, then a half cosine down to `min_lr_ratio` at the last step."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _freeze(model: CatalyticMLLM, stage: Stage, adapters: bool) -> None:
    """What the stage names trains; of an adapted LLM the adapters alone."""
    for name, parameter in model.named_parameters():
        own = not adapters or not name.startswith("llm.") or ".lora_" in name
        parameter.requires_grad_(stage.trains(name) and own)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(f"{stage.name}: no parameter is trained")


def _optimizer(model: CatalyticMLLM, optim: OptimConfig, kind: str = "torch") -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) are not decayed, encoder and projector may have a rate of their own."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            graph = name.startswith(("encoder.", "projector."))
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
