"""Checkpoints inside a stage: sharded, written beside training, atomic, rotated,
resumable on any number of ranks.

The state is copied to the CPU and training goes on while a thread writes it. A folder gets its final name
only after every rank has written its part, so that a kill at any moment leaves the one before intact. Order
of data and all random draws are functions of (seed, step, rank): a few numbers are all the position there is.
Frozen parameters are those of the stage's start and are not written.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from catmllm.train.stop import Stopped, TrainingError
from catmllm.world import World

FAILURES = 3  # in a row, after which training stops
TRAINED = StateDictOptions(ignore_frozen_params=True)
PARTIAL = StateDictOptions(strict=False)


class CheckpointError(RuntimeError):
    """Checkpoints cannot be written or read; says where, and that earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one stage, in folder/step-N. Every method is called by all ranks together,
    except `poll`."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        # The writing thread has collectives of its own:
        # in the group of training they would mix with training's.
        self.group = dist.new_group(backend="gloo")
        self.pending: tuple[int, float | None, Future] | None = None
        self.failures = 0
        self.told = -1  # the last step whose failure was told

    def save(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer,
        extra: dict[str, Any],
        value: float | None = None,
    ) -> None:
        """Begin to write the state after `step` updates. `extra`: JSON values of this rank; `value`: of a
        validation, the lowest of which is kept.

        A write that fails is told, its remains are removed and training goes on;
        raises `CheckpointError` at the third in a row.
        """
        self.settle()
        partial = self._path(step, ".partial")
        problem = None
        if self.world.main:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                problem = str(error)
        if not (problem := self.world.gather(problem)[0]):
            try:
                (partial / f"extra-{self.world.rank}.json").write_text(json.dumps(extra))
            except OSError as error:
                problem = str(error)
            problem = next((p for p in self.world.gather(problem) if p), None)
        if problem:
            self._failed(step, problem)
            return
        _begin_states(optimizer)
        weights, moments = get_state_dict(model, optimizer, options=TRAINED)
        future: Any = dcp.async_save(
            {"model": weights, "optimizer": moments}, checkpoint_id=partial, process_group=self.group
        )
        self.pending = (step, value, future)

    def poll(self) -> None:
        """Give a finished write its name, or tell that it failed; needs nobody else."""
        if self.world.main and self.pending is not None and self.pending[2].done():
            step, value, future = self.pending
            error = future.exception()
            if error is not None:
                self._tell(step, _reason(error))
            elif not self._path(step).exists():
                with contextlib.suppress(OSError):  # `settle` tries again and judges
                    self._publish(step, value)

    def settle(self) -> None:
        """Wait for the write under way, so that every rank knows how it went."""
        if self.pending is None:
            return
        step, value, future = self.pending
        problem = None
        try:
            future.result()
            if self.world.main and not self._path(step).exists():
                self._publish(step, value)
        # Whatever it was, the ranks must agree before anything else. DCP's own error is a BaseException.
        except (Exception, dcp.CheckpointException) as error:
            problem = _reason(error)
        self.pending = None
        if problem := next((p for p in self.world.gather(problem) if p), None):
            self._failed(step, problem)
        else:
            self.failures = 0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Let the write under way end; after an error without waiting for ranks that may never come."""
        if kind is None:
            self.settle()
            dist.destroy_process_group(self.group)
        elif self.pending is not None and issubclass(kind, TrainingError | Stopped | CheckpointError):
            with contextlib.suppress(Exception, dcp.CheckpointException):
                self.pending[2].result(timeout=60)
            self.poll()

    def restore(self, model: Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load the newest finished checkpoint in place. Returns (its record with "step" and "world", extra of
        this rank), or None where there is none.

        On another number of ranks weights and moments are re-sharded;
        `extra` then comes from the rank modulo the old count.
        """
        if self.world.main:
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        found = self.world.gather([str(p) for p in _finished(self.folder)])[0]
        if not found:
            return None
        path = Path(found[-1])
        record = json.loads((path / "step.json").read_text())
        weights, moments = get_state_dict(model, optimizer, options=TRAINED)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        self._load(state, path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=PARTIAL,
        )
        extra = json.loads((path / f"extra-{self.world.rank % record['world']}.json").read_text())
        return record, extra

    def restore_best(self, model: Module) -> int:
        """Load the weights of the checkpoint with the lowest value of validation; returns its step."""
        self.settle()
        path = Path(self.world.gather(str(_best(self.folder)))[0])
        state = {"model": get_model_state_dict(model, options=TRAINED)}
        self._load(state, path)
        set_model_state_dict(model, state["model"], options=PARTIAL)
        return json.loads((path / "step.json").read_text())["step"]

    def _load(self, state: dict[str, Any], path: Path) -> None:
        try:
            dcp.load(state, checkpoint_id=path)
        except (Exception, dcp.CheckpointException) as error:
            raise CheckpointError(
                f"{path} cannot be read ({_reason(error)}); remove that folder to resume from the one before"
            ) from error

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step-{step:07d}{suffix}"

    def _publish(self, step: int, value: float | None) -> None:
        partial = self._path(step, ".partial")
        record = {"step": step, "world": self.world.size, "value": value}
        (partial / "step.json").write_text(json.dumps(record))
        partial.rename(self._path(step))
        finished = _finished(self.folder)
        best = _best(self.folder)
        for old in finished[: -self.keep]:
            if old != best:
                # Without its record a folder is no checkpoint: a kill in the middle leaves no half of one.
                (old / "step.json").unlink()
                shutil.rmtree(old, ignore_errors=True)

    def _failed(self, step: int, problem: str) -> None:
        self.failures += 1
        if self.world.main:
            self._tell(step, problem)
        if self.failures == FAILURES:
            good = _finished(self.folder)
            raise CheckpointError(
                f"{FAILURES} checkpoints in a row could not be written to {self.folder} ({problem}). "
                + (f"{good[-1]} is good. " if good else "")
                + "Free some space and start the same command again: it resumes."
            )

    def _tell(self, step: int, problem: str) -> None:
        """Say once that a write failed, and remove what there is of it."""
        if self.told == step:
            return
        self.told = step
        # torch's writer reports a full disk as "unexpected pos": the free space tells what it means.
        with contextlib.suppress(OSError):
            problem += f"; {shutil.disk_usage(self.folder.parent).free / 2**20:.1f} MiB free there"
        shutil.rmtree(self._path(step, ".partial"), ignore_errors=True)
        good = _finished(self.folder)
        print(
            f"warning: the checkpoint of step {step} could not be written ({problem}). "
            + (f"The last good one is {good[-1]}." if good else "There is none yet.")
            + " Free some space; training goes on and the next one is tried in its turn.",
            file=sys.stderr,
            flush=True,
        )


def _begin_states(optimizer: Optimizer) -> None:
    """Give parameters that have had no gradient so far the states with which an Adam would begin them. A
    checkpoint is read into the states of all; DCP makes missing ones itself where there is none at all."""
    known: dict[str, torch.Tensor] = next((state for p, state in optimizer.state.items() if p.dim()), {})
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p not in optimizer.state and known:
            optimizer.state[p] = {k: torch.zeros_like(p if v.dim() else v) for k, v in known.items()}


def _finished(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".partial" and (p / "step.json").is_file())


def _best(folder: Path) -> Path | None:
    """The checkpoint with the lowest value, the earliest of equals."""
    values = [(json.loads((p / "step.json").read_text()).get("value"), p) for p in _finished(folder)]
    return min(((v, p) for v, p in values if v is not None), default=(None, None))[1]


def _reason(error: BaseException) -> str:
    """One line: of a failure on several ranks, the first."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
