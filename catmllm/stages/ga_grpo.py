"""Stage 3, GA-GRPO (paper §5.2.3, Algorithm 3): the closed loop
of design and refinement trains the AR head alone.

Encoder, projector, backbone and energy head are frozen, so the hidden states kept from decoding serve the
policy and the reference alike: they differ in the last matrix, and an update never touches the backbone.
`batch_size` tasks run at a time on each rank; one optimizer step is one iteration of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from catmllm.data.batches import draw
from catmllm.data.prompts import Sample
from catmllm.design.exemplar_pool import Candidate, ExemplarPool
from catmllm.design.search import ClosedLoop, Task, TaskState, summary
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Choices, Rollout
from catmllm.sample.engine import RolloutEngine
from catmllm.seeds import Stream
from catmllm.stages.advantages import group_advantages
from catmllm.stages.policy import Pass, Read, add_policy, on_device, validation
from catmllm.stages.supervised import validation_systems
from catmllm.train.sharding import unsharded
from catmllm.train.stage import Context, Plain, Step, Validation
from catmllm.train.stop import TrainingError
from catmllm.world import DTYPES


class GAGRPO(Plain):
    """Waves of tasks, each searched for `iterations` steps; pools survive in checkpoints."""

    name = "ga_grpo"
    any_ranks = False  # pools belong to ranks

    def __init__(self, context: Context) -> None:
        o, world = context.config.ga_grpo, context.world
        wave = o.batch_size * world.size
        if o.tasks % wave:
            raise TrainingError(
                f"ga_grpo.tasks ({o.tasks}) must be a multiple of ga_grpo.batch_size x ranks ({wave})"
            )
        self.context = context
        self.config = replace(o, steps=o.tasks // wave * o.iterations)
        self.loop = ClosedLoop(context.model, context.collate, o)
        self.systems = context.data["train"]
        self.running: list[TaskState] = []
        self.finished: list[dict[str, Any]] = []

    def begin(self) -> None:
        weight = self.context.model.llm.lm_head.weight.detach()
        self.reference_head = (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()

    def trains(self, parameter: str) -> bool:
        return parameter == "llm.lm_head.weight"

    def step(self, step: int) -> Step:
        c, o = self.context, self.config
        wave, iteration = divmod(step, o.iterations)
        seed = Stream.GA_GRPO_SEARCH.key(c.config.seed, wave, c.world.rank)
        before = dict(self.loop.seconds)
        with unsharded(c.model):
            engine = RolloutEngine(c.model, c.collate, DTYPES[c.config.precision])
            if iteration == 0:
                self.finished += [summary(s) for s in self.running]
                self.running = self.loop.start(self._tasks(wave), engine, seed)
            rollouts, rewards, metrics = self.loop.refine(
                self.running, engine, iteration + 1, seed, keep=True
            )
        advantages, informative = group_advantages(rewards, o.delta)
        best = [s.pool.best for s in self.running]
        errors = [abs(b.predicted - s.task.energy) for b, s in zip(best, self.running) if b is not None]
        metrics |= {
            "best_error": float(np.mean(errors)) if errors else float("inf"),
            "skipped_groups": float((~informative.any(1)).mean()),
            "kl": 0.0,
            "seconds_prefill": engine.seconds["prefill"],
            "seconds_decode": engine.seconds["decode"],
            "seconds_reward": self.loop.seconds["reward"] - before["reward"],
            "seconds_predict": self.loop.seconds["predict"] - before["predict"],
        }
        work = Step([], {**metrics})
        self.add_policy(work, rollouts, advantages.reshape(-1), informative.reshape(-1))
        return work

    def _tasks(self, wave: int) -> list[Task]:
        """This rank's tasks of a wave: identity and energy of training systems,
        none twice before all were used."""
        c, o = self.context, self.config
        order = Stream.GA_GRPO_TASKS.key(c.config.seed)
        picks = draw(len(self.systems), o.batch_size, order, wave, c.world.rank, c.world.size)
        return [Task(s.identity, s.target, s.known_energy) for s in (self.systems[i] for i in picks)]

    @property
    def validation(self) -> Validation | None:
        return validation(self.config, self.context.world, self._validation_rewards)

    def _validation_rewards(self) -> np.ndarray:
        """Of the candidates of one refinement for this rank's validation systems."""
        c = self.context
        systems = validation_systems(c, self.config)[c.world.rank :: c.world.size]
        tasks = [Task(s.identity, s.target, s.known_energy) for s in systems]
        seed = Stream.GA_GRPO_VALIDATION.key(c.config.seed, c.world.rank)
        with unsharded(c.model):
            engine = RolloutEngine(c.model, c.collate, DTYPES[c.config.precision])
            states = self.loop.start(tasks, engine, seed)
            return self.loop.refine(states, engine, 1, seed, keep=False)[1]

    def add_policy(
        self, work: Step, rollouts: list[Rollout], advantages: np.ndarray, informative: np.ndarray
    ) -> None:
        """Passes over the informative rollouts, from their hidden states through the head."""

        def prepare(some: list[Rollout], prompts: Sequence[Sample]) -> Pass:
            return Pass(partial(self._read, some), sum(len(r.ids) for r in some))

        heads = [0] * (1 + max(r.prompt for r in rollouts))  # hidden states are kept: no prompt is read
        world = self.context.world
        add_policy(work, world, self.config, rollouts, advantages, informative, prepare, heads=heads)

    def _read(self, rollouts: list[Rollout]) -> Read:
        hidden = torch.cat([r.hidden for r in rollouts if r.hidden is not None])
        targets = torch.cat([r.ids for r in rollouts]).to(hidden.device)
        chosen = on_device(Choices.join(rollouts), hidden.device)
        t = self.config.sampling.temperature
        return Read(*self.context.model(CatalyticMLLM.head, hidden, targets, t, self.reference_head, chosen))

    def state(self) -> dict[str, Any]:
        return {
            "finished": self.finished,
            "running": [
                {
                    "task": vars(s.task),
                    "pool": [c.to_json() for c in s.pool.members],
                    "trace": s.trace,
                }
                for s in self.running
            ],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.finished = state["finished"]
        self.running = [
            TaskState(
                Task(**s["task"]),
                ExemplarPool(self.config.pool, [Candidate(**c) for c in s["pool"]]),
                s["trace"],
            )
            for s in state["running"]
        ]
