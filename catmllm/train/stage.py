"""What a stage is to the loop: what trains, and how a step becomes losses.
A new stage is one class that fits `Stage`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from catmllm.config import Config, OptimConfig
from catmllm.data.batches import Collator
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.system import System
from catmllm.train.store import Mirror
from catmllm.world import World, settled

Metrics = dict[str, float | torch.Tensor]


@dataclass
class Context:
    """What a stage works with: the model (sharded), its collator, the systems by split, and this process.
    What the configuration leaves to the device is settled here."""

    config: Config
    model: CatalyticMLLM
    collate: Collator
    data: Mapping[str, Sequence[System]]
    world: World
    folder: Path
    mirror: Mirror | None = None  # of the run's folder, on a store

    def __post_init__(self) -> None:
        self.config = settled(self.config, self.world.device.type)


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
    """All passes of one optimizer step on this rank; `metrics` is read after the last one.

    What a pass calculates stays on the device, a tensor of one number: a `float()` would wait for the device
    in the middle of a step."""

    passes: list[MicroBatch]
    metrics: Metrics = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)  # for people to read, a row an answer


@dataclass
class Validation:
    """How a stage is judged while it trains. `run` returns what to log, the same on every rank up to the mean
    that the loop takes; its "val" is what is minimised: the best weights seen are the stage's result."""

    run: Callable[[], dict[str, float]]
    every: int  # steps
    patience: int  # the stage ends after so many validations without a better one; 0: never
    first: bool = False  # whether the weights that the stage begins with are validated too

    def due(self, step: int, last: int) -> bool:
        """Whether the weights after `step` of `last` updates are validated."""
        return step % self.every == 0 or step == last


class Stage(Protocol):
    """What differs between stages."""

    name: str

    @property
    def config(self) -> OptimConfig:
        """Steps, batch, learning rate; the steps may be others after `load_state`."""

    @property
    def samples(self) -> bool:
        """Whether it learns from answers that it samples: without dropout, so its adapters have none."""

    @property
    def validation(self) -> Validation | None:
        """None: the stage is not validated, and its last weights are its result."""

    @property
    def spike(self) -> float:
        """Median deviations above its recent median at which the loss ends the stage; 0: at none."""

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of this name is trained."""

    def begin(self) -> None:
        """Called once, when the model is sharded and has its weights."""

    def step(self, step: int) -> Step:
        """The passes of optimizer step `step` on this rank; every rank must return equally many."""

    def whole(self, step: int) -> bool:
        """Whether a run may stop before optimizer step `step`: `state` has all that goes on from there."""

    def finish(self) -> str:
        """Called when all steps are done, with the weights that are to stay; returns what is to be noted."""

    def end(self) -> None:
        """Called once, however training ended."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep beside weights and moments, as JSON values of this rank."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


class Plain:
    """Base of stages: nothing to begin, end, keep or validate,
    and steps that are functions of the step number alone."""

    @property
    def validation(self) -> Validation | None:
        return None

    @property
    def spike(self) -> float:
        return 0.0

    @property
    def samples(self) -> bool:
        return False

    def whole(self, step: int) -> bool:
        return True

    def begin(self) -> None:
        """Nothing to prepare."""

    def finish(self) -> str:
        return ""

    def end(self) -> None:
        """Nothing to put away."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
