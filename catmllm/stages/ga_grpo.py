"""Stage 3, GA-GRPO (paper §5.2.3, Algorithm 3): the closed loop
of design and refinement trains the AR head alone.

Encoder, projector, backbone and energy head are frozen, so the hidden states kept from decoding (or, where
vLLM samples, computed in one pass behind it) serve the policy and the reference alike: they differ in the
last matrix, and an update never touches the backbone.
`batch_size` tasks run at a time on each rank; one optimizer step is one iteration of each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from catmllm.data.batches import shuffled
from catmllm.data.prompts import Sample
from catmllm.data.subsets import of_generation
from catmllm.design.exemplar_pool import Candidate, ExemplarPool
from catmllm.design.predict import predictor_of
from catmllm.design.search import ClosedLoop, Task, TaskState, summary, told
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.sample.answers import Choices, Rollout
from catmllm.sample.engine import RolloutEngine, Sampler
from catmllm.sample.vllm_engine import VLLMEngine
from catmllm.seeds import Stream
from catmllm.stages.advantages import group_advantages
from catmllm.stages.policy import Pass, Read, add_policy, on_device, validation, vllm_of
from catmllm.stages.supervised import validation_systems
from catmllm.structure.system import System
from catmllm.train.sharding import unsharded
from catmllm.train.stage import Context, Plain, Step, Validation
from catmllm.world import DTYPES

TASKS = "tasks.jsonl"


class GAGRPO(Plain):
    """Tasks of any age side by side. One leaves after `iterations` steps, or as soon as it is `solved`, and
    the next of an endless sequence enters in its place; tasks.jsonl has what came of it."""

    name = "ga_grpo"
    samples = True

    def __init__(self, context: Context) -> None:
        o, world = context.config.ga_grpo, context.world
        self.context = context
        self.config = replace(o, steps=-(-o.tasks // (o.batch_size * world.size)) * o.iterations)
        self.loop = ClosedLoop(context.model, context.collate, o)
        self.systems = of_generation(context.data["train"], context.config.data)
        self.running: list[TaskState] = []
        # begun by more ranks than there are now; they go on before others enter
        self.waiting: list[TaskState] = []
        self.entered = self.left = 0  # tasks, on all ranks
        self.done = self.worked = 0  # updates, and places of tasks in them on all ranks
        self.begun = False  # whether there was a search
        self.engine: RolloutEngine | None = None
        self.vllm: VLLMEngine | None = None

    def begin(self) -> None:
        weight = self.context.model.llm.lm_head.weight.detach()
        head = weight.full_tensor() if isinstance(weight, DTensor) else weight
        # its shards may be in the host's memory
        self.reference_head = head.to(self.context.world.device, copy=True)
        self.vllm = vllm_of(self.context, self.config)

    def end(self) -> None:
        if self.vllm is not None:
            self.vllm.close()

    def trains(self, parameter: str) -> bool:
        return parameter == "llm.lm_head.weight"

    def step(self, step: int) -> Step:
        c, o = self.context, self.config
        seed = Stream.GA_GRPO_SEARCH.key(c.config.seed, step, c.world.rank)
        new = self._entering()
        with unsharded(c.model):
            engine = self._engine()
            before = self.loop.seconds | engine.seconds
            self.running += self.loop.start(new, engine, seed) if new else []
            rollouts, rewards, metrics = self.loop.refine(self.running, engine, 1, seed, keep=True)
        advantages, informative = group_advantages(rewards, o.delta)
        best = [s.pool.best for s in self.running]
        errors = [abs(b.predicted - s.task.energy) for b, s in zip(best, self.running) if b is not None]
        spent = {f"seconds_{k}": v - before[k] for k, v in (self.loop.seconds | engine.seconds).items()}
        metrics |= {
            "best_error": float(np.mean(errors)) if errors else float("inf"),
            "skipped_groups": float((~informative.any(1)).mean()),
            "kl": 0.0,
            **spent,
        }
        metrics |= self._leave(step)
        self.done, self.worked = self.done + 1, self.worked + o.batch_size * c.world.size
        work = Step([], {**metrics})
        self.add_policy(work, rollouts, advantages.reshape(-1), informative.reshape(-1))
        return work

    def _engine(self) -> Sampler:
        """The engine, of which each step changes the head alone."""
        c = self.context
        if not self.begun:
            # not before the first search: a plan makes the stage without any file
            self.loop.predictor = predictor_of(c.config, c.world.device) or self.loop.predictor
            self.begun = True
        if self.vllm is not None:
            self.vllm.update()
            return self.vllm
        if self.engine is None:
            self.engine = RolloutEngine(c.model, c.collate, DTYPES[c.config.precision])
        else:
            self.engine.renew_head()
        return self.engine

    def _entering(self) -> list[Task]:
        """New tasks for this rank's free places: identity and energy of training systems, none twice before
        all were used. Collective."""
        c, o = self.context, self.config
        free = o.batch_size - len(self.running)
        self.running, self.waiting = self.running + self.waiting[:free], self.waiting[free:]
        free = o.batch_size - len(self.running)
        of_ranks = c.world.gather(free)
        first = self.entered + sum(of_ranks[: c.world.rank])
        self.entered += sum(of_ranks)
        order = Stream.GA_GRPO_TASKS.key(c.config.seed)
        picks = [shuffled(first + k, len(self.systems), order) for k in range(free)]
        return self._tasks([self.systems[i] for i in picks])

    def _tasks(self, systems: Sequence[System]) -> list[Task]:
        tasks = [Task(s.identity, s.target, s.known_energy) for s in systems]
        return told(tasks, self.config, self.systems)

    def _solved(self, state: TaskState) -> bool:
        o, best = self.config, state.pool.best
        near = best is not None and state.pool.feasible and o.solved is not None
        return near and abs(best.predicted - state.task.energy) <= o.solved  # type: ignore[union-attr]

    def _leave(self, step: int) -> dict[str, float]:
        """Let go of the tasks that have come to their end. Collective; says how many were solved."""
        world = self.context.world
        solved = [self._solved(s) for s in self.running]
        leaves = [done or len(s.trace) > self.config.iterations for s, done in zip(self.running, solved)]
        ended = [summary(s) | {"step": step} for s, gone in zip(self.running, leaves) if gone]
        self.running = [s for s, gone in zip(self.running, leaves) if not gone]
        if ended:
            self.loop.keep([s.task for s in self.running])
        rows = [json.dumps(row) + "\n" for part in world.gather(ended) for row in part]
        self.left += len(rows)
        if world.main:
            with (self.context.folder / TASKS).open("a") as f:
                f.writelines(rows)
        return {"solved": float(np.mean(solved)), "left": float(np.mean(leaves))}

    @property
    def validation(self) -> Validation | None:
        return validation(self.config, self.context.world, self._validation_rewards)

    def _validation_rewards(self) -> np.ndarray:
        """Of the candidates of one refinement for this rank's validation systems."""
        c = self.context
        systems = validation_systems(c, self.config)[c.world.rank :: c.world.size]
        tasks = self._tasks(systems)
        seed = Stream.GA_GRPO_VALIDATION.key(c.config.seed, c.world.rank)
        with unsharded(c.model):
            engine = self._engine()
            states = self.loop.start(tasks, engine, seed)
            rewards = self.loop.refine(states, engine, 1, seed, keep=False)[1]
        self.loop.keep([s.task for s in self.running])
        return rewards

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
        """What is done, and the tasks of all ranks, kept by the main one: any number of ranks may go on."""
        own = [
            {"task": vars(s.task), "pool": [c.to_json() for c in s.pool.members], "trace": s.trace}
            for s in (*self.running, *self.waiting)
        ]
        tasks = [task for part in self.context.world.gather(own) for task in part]
        counts = {"entered": self.entered, "left": self.left, "done": self.done, "worked": self.worked}
        return {**counts, "tasks": tasks if self.context.world.main else []}

    def load_state(self, state: dict[str, Any]) -> None:
        """Collective. The steps left are those in which the places of today work what is not worked yet."""
        world, path = self.context.world, self.context.folder / TASKS
        self.entered, self.left = state["entered"], state["left"]
        self.done, self.worked = state["done"], state["worked"]
        places = self.config.batch_size * world.size
        left = max(0, self.config.steps * places - self.worked)
        self.config = replace(self.config, steps=self.done + -(-left // places))
        size = self.config.pool
        mine = [
            TaskState(Task(**s["task"]), ExemplarPool(size, [Candidate(**c) for c in s["pool"]]), s["trace"])
            for s in world.gather(state["tasks"])[0][world.rank :: world.size]
        ]
        self.running, self.waiting = mine[: self.config.batch_size], mine[self.config.batch_size :]
        if world.main and path.exists():  # what was written after the checkpoint comes again
            with path.open("rb+") as f:
                for _ in range(self.left):
                    f.readline()
                f.truncate()
