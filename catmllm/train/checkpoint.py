"""Checkpoints inside a stage: sharded, written beside training, atomic, rotated,
resumable on any number of ranks, on a disk or on a store.

The state is copied to the CPU and training goes on while a thread writes it. A folder is a checkpoint once it
has its record, which is written after every rank has written its part, so that a kill at any moment leaves
the one before intact. Order of data and all random draws are functions of (seed, step, rank): a few numbers
are all the position there is. Frozen parameters are those of the stage's start and are not written.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
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
from catmllm.train.store import Folder
from catmllm.world import World

FAILURES = 3  # in a row, after which training stops
TRAINED = StateDictOptions(ignore_frozen_params=True)
PARTIAL = StateDictOptions(strict=False)
RECORD = "step.json"  # of a checkpoint, written last
PLAIN = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


class CheckpointError(RuntimeError):
    """Checkpoints cannot be written or read; says where, and that earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one stage, in folder/step-N. Every method is called by all ranks together,
    except `poll`."""

    def __init__(
        self, folder: Folder, world: World, keep: int, before: Callable[[], None] | None = None
    ) -> None:
        """before: what the main rank's writing thread does before it calls a checkpoint complete."""
        self.folder, self.world, self.keep, self.before = folder, world, keep, before
        # The writing thread has collectives of its own:
        # in the group of training they would mix with training's.
        self.group = dist.new_group(backend="gloo")
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="catmllm-checkpoint")
        self.pending: tuple[int, Future] | None = None
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
        """Begin to write the state after `step` updates; `settle` comes before, and tells how it went.
        `extra`: JSON values of this rank; `value`: of a validation, the lowest of which is kept."""
        _begin_states(optimizer)
        weights, moments = get_state_dict(model, optimizer, options=TRAINED)
        stager = DefaultStager(PLAIN)
        state = stager.stage({"model": weights, "optimizer": moments})
        stager.close()
        text = json.dumps(extra)  # of this moment
        self.pending = (step, self.writer.submit(self._write, step, state, text, value))

    def _write(self, step: int, state: Any, extra: str, value: float | None) -> None:
        """What the writing thread of each rank does of a checkpoint; raises on all ranks alike, but for what
        the main rank does after the others have written."""
        place = self._place(step)
        if self.world.main:
            self._together(place.remove)
        else:
            self._together(lambda: None)
        self._together(lambda: place.write(f"extra-{self.world.rank}.json", extra.encode()))
        dcp.save(state, checkpoint_id=place.at, process_group=self.group)
        if self.world.main:
            if self.before is not None:
                self.before()
            record = {"step": step, "world": self.world.size, "value": value}
            place.write(RECORD, json.dumps(record).encode())
            self._rotate()

    def _together(self, act: Callable[[], None]) -> None:
        """Have every rank act; where one fails, all raise what it says."""
        problem = None
        try:
            act()
        except Exception as error:
            problem = _reason(error)
        problems: list[Any] = [None] * self.world.size
        dist.all_gather_object(problems, problem, group=self.group)
        for rank, found in enumerate(problems):
            if found:
                raise CheckpointError(f"rank {rank}: {found}")

    def _rotate(self) -> None:
        """Delete what is neither among the last ones nor the best."""
        finished = _finished(self.folder)
        best = _best(finished)
        for step in sorted(finished)[: -self.keep]:
            if step != best:
                # Without its record a folder is no checkpoint: a kill in the middle leaves no half of one.
                place = self._place(step)
                place.delete(RECORD)
                place.remove()

    def poll(self) -> None:
        """Tell that a write has failed; needs nobody else."""
        if self.world.main and self.pending is not None and self.pending[1].done():
            step, future = self.pending
            if (error := future.exception()) is not None:
                self._tell(step, _reason(error))

    def settle(self) -> int | None:
        """Wait for the write under way, so that every rank knows how it went; returns the step of a
        checkpoint that is lost.

        A write that fails is told, its remains are removed and training goes on;
        raises `CheckpointError` at the third in a row.
        """
        if self.pending is None:
            return None
        step, future = self.pending
        problem = None
        try:
            future.result()
        # Whatever it was, the ranks must agree before anything else. DCP's own error is a BaseException.
        except (Exception, dcp.CheckpointException) as error:
            problem = _reason(error)
        self.pending = None
        if problem := next((p for p in self.world.gather(problem) if p), None):
            self._failed(step, problem)
            return step
        self.failures = 0
        return None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Let the write under way end; after an error without waiting for ranks that may never come."""
        if kind is None:
            self.settle()
            dist.destroy_process_group(self.group)
        elif self.pending is not None and issubclass(kind, TrainingError | Stopped | CheckpointError):
            with contextlib.suppress(Exception, dcp.CheckpointException):
                self.pending[1].result(timeout=60)
            self.poll()
        self.writer.shutdown(wait=False)

    def restore(self, model: Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load the newest finished checkpoint in place. Returns (its record with "step" and "world", extra of
        this rank), or None where there is none.

        On another number of ranks weights and moments are re-sharded;
        `extra` then comes from the rank modulo the old count.
        """
        record = self.world.gather(self._newest() if self.world.main else None)[0]
        if record is None:
            return None
        place = self._place(record["step"])
        _begin_states(optimizer)
        weights, moments = get_state_dict(model, optimizer, options=TRAINED)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        self._load(state, place)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=PARTIAL,
        )
        extra = place.read(f"extra-{self.world.rank % record['world']}.json")
        if extra is None:
            raise CheckpointError(f"{place} lacks a file; remove that folder to resume from the one before")
        return record, json.loads(extra)

    def _newest(self) -> dict[str, Any] | None:
        """The record of the newest checkpoint; removes what writes that never ended have left."""
        finished = _finished(self.folder)
        for name in {*self.folder.names()} - {_name(step) for step in finished}:
            (self.folder / name).remove()
        return finished[max(finished)] if finished else None

    def restore_weights(self, step: int, model: Module) -> None:
        """Load the weights of a finished checkpoint in place."""
        state = {"model": get_model_state_dict(model, options=TRAINED)}
        self._load(state, self._place(step))
        set_model_state_dict(model, state["model"], options=PARTIAL)

    def _load(self, state: dict[str, Any], place: Folder) -> None:
        try:
            dcp.load(state, checkpoint_id=place.at)
        except (Exception, dcp.CheckpointException) as error:
            raise CheckpointError(
                f"{place} cannot be read ({_reason(error)}); remove that folder to resume from the one before"
            ) from error

    def _place(self, step: int) -> Folder:
        return self.folder / _name(step)

    def _good(self) -> Folder | None:
        """The newest checkpoint, if a failing disk or store still tells."""
        with contextlib.suppress(Exception):
            if finished := _finished(self.folder):
                return self._place(max(finished))
        return None

    @property
    def _advice(self) -> str:
        return "Free some space" if self.folder.local else "See that the store can be written"

    def _failed(self, step: int, problem: str) -> None:
        self.failures += 1
        if self.world.main:
            self._tell(step, problem)
        if self.failures == FAILURES:
            good = self._good()
            raise CheckpointError(
                f"{FAILURES} checkpoints in a row could not be written to {self.folder} ({problem}). "
                + (f"{good} is good. " if good else "")
                + f"{self._advice} and start the same command again: it resumes."
            )

    def _tell(self, step: int, problem: str) -> None:
        """Say once that a write failed, and remove what there is of it."""
        if self.told == step:
            return
        self.told = step
        # torch's writer reports a full disk as "unexpected pos": the free space tells what it means.
        if self.folder.local:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(Path(self.folder.root).parent).free
                problem += f"; {free / 2**20:.1f} MiB free there"
        with contextlib.suppress(Exception):
            self._place(step).remove()
        good = self._good()
        print(
            f"warning: the checkpoint of step {step} could not be written ({problem}). "
            + (f"The last good one is {good}." if good else "There is none yet.")
            + f" {self._advice}; training goes on and the next one is tried in its turn.",
            file=sys.stderr,
            flush=True,
        )


def _begin_states(optimizer: Optimizer) -> None:
    """Give parameters that have had no gradient so far the states with which an Adam begins them: a
    checkpoint holds, and is read into, the states of all. torch would make them by a step on gradients of
    zero where there are none at all, and that step would count."""
    torchs = isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        if not torchs:
            group.setdefault("step", 0)  # apex counts a group's
        for p in group["params"]:
            if p not in optimizer.state:
                optimizer.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                if torchs:
                    optimizer.state[p]["step"] = torch.zeros((), device=p.device)


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _finished(folder: Folder) -> dict[int, dict[str, Any]]:
    """The records of complete checkpoints by their steps. A record that was cut off is none."""
    found = {}
    for name in folder.names():
        text = (folder / name).read(RECORD)
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(text or b"")
            if name == _name(record["step"]):
                found[record["step"]] = record
    return found


def _best(finished: dict[int, dict[str, Any]]) -> int | None:
    """The step with the lowest value, the earliest of equals."""
    values = [(r["value"], step) for step, r in finished.items() if r.get("value") is not None]
    return min(values, default=(None, None))[1]


def _reason(error: BaseException) -> str:
    """One line: of a failure on several ranks, the first."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
