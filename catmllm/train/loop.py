"""The one training loop. A stage says what trains and turns a step into losses; all the rest is here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from catmllm.models.lora import merged
from catmllm.seeds import Stream, hash_seed
from catmllm.train.checkpoint import CheckpointError, Checkpoints
from catmllm.train.hang import Watchdog
from catmllm.train.metrics import StageLog
from catmllm.train.progress import describe, shown
from catmllm.train.setup import Ready, clip, lr_factor, prepare, update
from catmllm.train.sharding import full_state
from catmllm.train.stage import Context, Stage, Step, Validation
from catmllm.train.stop import LossWatch, Stopped, TrainingError, stop_signals
from catmllm.train.store import Folder
from catmllm.train.throughput import Clock, Profile, memory_gib, peak_flops


def train(make_stage: Callable[[Context], Stage], context: Context) -> tuple[dict[str, torch.Tensor], Stage]:
    """Run one stage to its end, from its newest checkpoint where there is one.

    Shards `context.model` in place. Returns the whole state dict, float32, on the main rank (empty on the
    others), and the stage. Raises `Stopped` after a signal, when the state is saved, and `TrainingError`
    where the loss or (but for float16's) the gradient is not finite, or the loss jumps; the batch is then
    saved, and the weights are from before it.
    """
    stage = make_stage(context)
    ready = prepare(stage, context)
    with contextlib.ExitStack() as after:
        after.callback(stage.end)
        stage.begin()
        _steps(context, stage, ready)
    state = full_state(context.model, context.world)
    return (merged(state, context.config.lora) if ready.adapters else state), stage


def _steps(context: Context, stage: Stage, ready: Ready) -> None:
    """All steps of a stage that has begun, from its newest checkpoint on."""
    world, config, folder = context.world, context.config, context.folder
    if world.main:
        print(describe(context, stage.name), flush=True)
    watchdog = Watchdog(folder / "hang", world.rank, world.size, config.hang_after, _shared(context) / "hang")
    run = _Run(context, stage, ready, watchdog)
    optim = stage.config  # of the stage that goes on
    context.model.train()
    with (
        watchdog,
        stop_signals() as signals,
        StageLog(folder, stage.name, run.step, optim.steps, config, world.main) as log,
        run.checkpoints,
    ):
        if stage.validation and stage.validation.first and run.best is None and not run.step:
            run.validate(stage.validation)
            run.save()  # where nothing becomes better, the weights stay as they were
        while run.step < optim.steps and not run.enough:
            row, table = run.one_step(bool(signals))
            log.table(run.step - 1, table)
            if (validation := stage.validation) and validation.due(run.step, optim.steps):
                row |= run.validate(validation)
            if (run.step - 1) % optim.log_every == 0 or run.step == optim.steps or run.enough:
                log.row(run.step - 1, row)
            log.tick(shown(row))
            stopping = run.stopping and run.step < optim.steps and stage.whole(run.drawn)
            if run.step < optim.steps and (
                stopping or run.improved or run.step % optim.checkpoint_every == 0
            ):
                with run.clock.phase("checkpoint"):
                    run.save()
            run.checkpoints.poll()
            if run.profile is not None:
                run.profile.step()
            if stopping:
                run.settle()
                if run.checkpoints.failures:
                    raise CheckpointError(f"{stage.name}: stopped after step {run.step - 1}, but not saved")
                raise Stopped(f"{stage.name}: saved after step {run.step - 1}")
        if run.profile is not None:
            run.profile.finish()
            log.note(run.profile.table)
        run.settle()
        if run.best is not None and run.best_step < run.step:
            run.checkpoints.restore_weights(run.best_step, context.model)
            log.note(
                f"{stage.name}: the weights of step {run.best_step} are kept (validation {run.best:.4g})"
            )
        if note := stage.finish():
            log.note(note)


def _shared(context: Context) -> Folder:
    """The stage's folder that every machine sees."""
    mirror = context.mirror
    return mirror.folder / context.folder.name if mirror else Folder(context.folder)


class _Run:
    """One stage under way: what a step changes beside the weights, and what a checkpoint must hold of it."""

    def __init__(self, context: Context, stage: Stage, ready: Ready, watchdog: Watchdog) -> None:
        config, world = context.config, context.world
        self.context, self.stage, self.ready = context, stage, ready
        self.watch = LossWatch(stage.spike)
        self.clock = Clock(lambda phase: watchdog.beat(f"{phase} of step {self.step}"))
        self.peak = peak_flops(world.device)
        self.profile = (
            Profile(context.folder / "profile", world.rank, world.device) if config.profile else None
        )
        self.step = 0  # updates done
        self.drawn = 0  # the same, counted in steps of today's ranks and batches
        self.skipped = 0
        self.best: float | None = None
        self.best_step, self.worse = 0, 0  # of the best validation, and how many since were not better
        self.before: tuple[float | None, int] = (None, 0)  # the best one and its step before that
        self.improved = self.stopping = False
        mirror = context.mirror
        self.checkpoints = Checkpoints(
            _shared(context) / "checkpoints", world, config.keep_checkpoints, mirror.push if mirror else None
        )
        if (found := self.checkpoints.restore(context.model, ready.optimizer)) is not None:
            self._restore(*found)

    def one_step(self, signalled: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Passes, judgement of the loss, update. Returns what to log, and what to show."""
        stage, ready, world, clock = self.stage, self.ready, self.context.world, self.clock
        optim = stage.config
        began = time.perf_counter()
        # All that a pass draws (dropout) is a function of seed, step and rank,
        # so that no generator has to be saved.
        torch.manual_seed(hash_seed(Stream.DROPOUT.key(self.context.config.seed, self.step, world.rank)))
        scale = lr_factor(self.step, optim)
        for group in ready.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        with clock.phase("data"):
            work = stage.step(self.drawn)
        total = torch.zeros((), device=world.device)
        for i, part in enumerate(work.passes):
            ready.model.set_requires_gradient_sync(optim.sync_every_pass or i == len(work.passes) - 1)
            with clock.phase("forward"):
                value = part.loss()
            with clock.phase("backward"):
                ready.scaler.scale(value).backward()
            total += value.detach()
        # Everything that the device knows of the step is read at once: the only wait for it.
        found: dict[str, float | torch.Tensor] = {"loss": seen(total), "grad_norm": 0.0}
        if work.passes:
            with clock.phase("optimizer"):
                found["grad_norm"] = seen(clip(ready, optim.grad_clip))
        if ready.scaler.is_enabled():
            found["loss_scale"] = ready.scaler.scale(torch.ones_like(total))
        row = world.mean({"stop": signalled, **found, **work.metrics})
        self.stopping = row.pop("stop") > 0
        problem = self.watch.judge(row["loss"])
        if not ready.scaler.is_enabled() and not math.isfinite(row["grad_norm"]):
            problem = problem or "the gradient is not finite"
        if problem:
            raise TrainingError(self._bad_batch(problem, float(total), work))
        if work.passes:
            with clock.phase("optimizer"):
                update(ready)
            self.skipped += ready.scaler.is_enabled() and not math.isfinite(row["grad_norm"])
        self.step, self.drawn = self.step + 1, self.drawn + 1
        elapsed = time.perf_counter() - began
        tokens = sum(p.tokens for p in work.passes)
        done = sum(ready.flops.of(p.tokens, p.sequences) for p in work.passes)
        seconds = clock.take()
        row |= {"lr": optim.lr * scale, "tokens_per_s": world.size * tokens / elapsed}
        row |= {"tflops": done / elapsed / 1e12, "memory_gib": memory_gib(world.device)}
        if self.peak is not None:
            row["mfu"] = done / elapsed / self.peak
        row |= {"seconds": elapsed, "prepare_seconds": seconds["data"]}
        if ready.scaler.is_enabled():
            row |= {"skipped_steps": self.skipped}
        return row, work.table

    def validate(self, validation: Validation) -> dict[str, float]:
        """Judge the weights on the validation systems; notes whether they are the best so far."""
        self.context.model.eval()
        with torch.no_grad(), self.clock.phase("validation"):
            found = validation.run()
        self.context.model.train()
        row = self.context.world.mean(found)
        value = row["val"]
        with self.clock.phase("checkpoint"):
            self.settle()
        self.improved = math.isfinite(value) and (self.best is None or value < self.best)
        if self.improved:
            self.before = self.best, self.best_step
            self.best, self.best_step, self.worse = value, self.step, 0
        else:
            self.worse += 1
        return row

    @property
    def enough(self) -> bool:
        """Whether so many validations brought nothing better that the stage ends."""
        validation = self.stage.validation
        return validation is not None and 0 < validation.patience <= self.worse

    def settle(self) -> None:
        """Wait for the checkpoint under way. Where it is lost and had the best weights, the best are those
        before, if there are any."""
        lost = self.checkpoints.settle()
        if self.best is not None and lost == self.best_step:
            self.best, self.best_step = self.before

    def save(self) -> None:
        self.settle()
        extra = {
            "stage": self.stage.state(),
            "scaler": self.ready.scaler.state_dict(),
            "losses": self.watch.recent,
            "samples": self.drawn * self.context.world.size * self.stage.config.batch_size,
            "skipped": self.skipped,
            "validation": [self.best, self.best_step, self.worse],
        }
        value = self.best if self.improved else None
        self.improved = False
        self.checkpoints.save(self.step, self.context.model, self.ready.optimizer, extra, value)

    def _restore(self, record: dict[str, Any], extra: dict[str, Any]) -> None:
        self.step, world = record["step"], self.context.world.size
        # Ranks or batches may be others than before: the data go on from where they were, or, as other
        # batches may end in the middle of a rollout, behind it.
        self.drawn = -(-extra["samples"] // (world * self.stage.config.batch_size))
        while not self.stage.whole(self.drawn):
            self.drawn += 1
        self.skipped, self.watch.recent = extra["skipped"], extra["losses"]
        self.best, self.best_step, self.worse = extra["validation"]
        self.stage.load_state(extra["stage"])
        if self.ready.scaler.is_enabled():
            self.ready.scaler.load_state_dict(extra["scaler"])

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
        part = "precision" if self.context.config.precision == "fp16" else "encoder_precision"
        half = f" (float16 may have overflowed: try {part}=bf16)" if self.ready.scaler.is_enabled() else ""
        return (
            f"{stage.name}: {problem} at step {self.step}{half}; no weight was changed by it. The batches "
            f"are in {folder / f'bad-step-{self.step:07d}-rank-*.pt'} (rank {worst} has the highest loss), "
            f"the checkpoints in {folder / 'checkpoints'} are from before. Look at the data, "
            f"or lower {stage.name}.lr and start again."
        )


def seen(value: torch.Tensor) -> torch.Tensor:
    """With infinity in place of NaN, which a mean over the ranks would leave out; infinity stays."""
    return value.nan_to_num(math.inf, math.inf, -math.inf)


def tensors(batch: Any) -> Any:
    """A batch as nested dicts of CPU tensors and numbers, which `torch.load(weights_only=True)` reads."""
    if dataclasses.is_dataclass(batch):
        return {f.name: tensors(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
    return batch.cpu() if isinstance(batch, torch.Tensor) else batch
