"""Checkpoints inside a stage: sharded, atomic, the last two kept.

A checkpoint folder gets its final name only after every rank has written its part, so that a kill at any moment
leaves the one before intact. Order of data and all random draws are functions of (seed, step, rank): the step number
is all the position there is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import Module
from torch.optim import Optimizer

from catmllm.trainer.distributed import World

KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; says where, and that earlier ones are untouched."""


def save(
    folder: Path, step: int, model: Module, optimizer: Optimizer, extra: dict[str, Any], world: World
) -> None:
    """Write the state after `step` updates to folder/step-N. `extra`: JSON values of this rank."""
    final, partial = folder / f"step-{step:07d}", folder / f"step-{step:07d}.partial"
    problem = None
    try:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
        (partial / f"extra-{world.rank}.json").write_text(json.dumps(extra))
    except Exception as error:  # every rank must learn of it before anything is renamed or removed
        problem = f"{type(error).__name__}: {error}"
    problems = [p for p in world.gather(problem) if p]
    if problems:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written ({problems[0]}); the checkpoints before it are untouched. "
            "Free some space and start the same command again: it resumes."
        )
    if world.main:
        (partial / "step.json").write_text(json.dumps({"step": step, "world": world.size}))
        partial.rename(final)
        for old in _finished(folder)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def restore(
    folder: Path, model: Module, optimizer: Optimizer, world: World
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest finished checkpoint in place. Returns (step, extra of this rank), or None where there is none.

    On another number of ranks the weights and moments are re-sharded; `extra` then comes from the rank modulo the
    old count.
    """
    found = world.gather([str(p) for p in _finished(folder)])[0]
    if not found:
        return None
    path = Path(found[-1])
    meta = json.loads((path / "step.json").read_text())
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=path)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); remove that folder to resume from the one before"
        ) from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    extra = json.loads((path / f"extra-{world.rank % meta['world']}.json").read_text())
    return meta["step"], extra


def _finished(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".partial" and (p / "step.json").is_file())
