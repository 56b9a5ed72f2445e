"""Stage 2, GRPO on the PVCP reward (paper §6.4-6.6): the LLM learns to write CIFs that hold together.

Each step samples K answers to every prompt, scores them, and takes the policy gradient of the group-relative
advantages with a KL term to the stage's starting point. A tenth of each batch replays property samples, so that the
energy head keeps up with the backbone that moves under it.
"""

from __future__ import annotations

import copy
import json
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from catmllm.data.batches import Batch, Collator, Encoded
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.rl.advantages import group_advantages, policy_loss
from catmllm.rl.grammar import answer_pattern
from catmllm.rl.reward import mean_terms
from catmllm.rl.rollout import Rollout, RolloutEngine
from catmllm.stages.supervised import chosen, property_with_dropout, relatives, sample_losses
from catmllm.trainer.distributed import DTYPES, unsharded
from catmllm.trainer.loop import Context, MicroBatch, Step

# prompts, their rollouts, and per rollout its advantage and whether its group is informative; what to log
Rolled = tuple[list[Sample], list[Rollout], np.ndarray, np.ndarray, dict[str, float]]


class GRPO:
    """Prompts of the CIF and the design task in turn; encoder and projector stay frozen."""

    name = "grpo"

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config.grpo
        self.systems = context.data["train"]
        self.pvcp = self.config.reward.scorer()
        # The reference is the stage's starting point. Made before sharding, it is a whole copy on every rank.
        self.reference = copy.deepcopy(context.model).eval().requires_grad_(False)
        self.reference.llm.to(DTYPES[context.config.precision])
        self.kin = relatives(self.systems)
        self.skipped = 0
        self.rolled: Rolled | None = None
        self.old: dict[int, torch.Tensor] = {}  # log-probabilities of the sampling policy, by pass

    def trains(self, parameter: str) -> bool:
        return parameter.startswith(("llm.", "energy_head."))

    def step(self, step: int) -> Step:
        """New rollouts every `updates_per_rollout` steps; the steps between go over the same ones again."""
        if step % self.config.updates_per_rollout == 0 or self.rolled is None:
            self.rolled = self._roll(step)
        prompts, rollouts, advantages, informative, metrics = self.rolled
        work = Step([], metrics | {"kl": 0.0, "clipped": 0.0, "energy_mae": 0.0})
        self._add_policy(work, prompts, rollouts, advantages, informative)
        self._add_replay(work, step)
        return work

    def _roll(self, step: int) -> Rolled:
        c, o = self.context, self.config
        picks = chosen(len(self.systems), o.batch_size, c.config.seed + 3, step, c.world.rank, c.world.size)
        prompts = [self._prompt(i, k, rng) for k, (i, rng) in enumerate(picks)]
        patterns = None
        if o.sampling.grammar:
            asked = [self.systems[i] for i, _ in picks]
            patterns = [
                answer_pattern(s.identity, s.target, k % 3 > 0, c.config.data.decimals)
                for k, s in enumerate(asked)
            ]
        with unsharded(c.model):
            engine = RolloutEngine(c.model, c.collate, DTYPES[c.config.precision])
            rollouts = engine.generate(
                prompts, o.sampling, [c.config.seed, step, c.world.rank], o.group_size, patterns=patterns
            )
        targets = [self.systems[picks[r.prompt][0]].target for r in rollouts]
        began = time.perf_counter()
        scores = self.pvcp.score([r.text for r in rollouts], targets)
        scored = time.perf_counter() - began
        advantages, informative = group_advantages(scores.total.reshape(-1, o.group_size), o.delta)
        self.skipped += int((~informative).sum())
        self.old.clear()
        metrics = {"reward" if k == "total" else f"reward_{k}": v for k, v in mean_terms(scores).items()}
        metrics |= {
            "parse_failures": float(np.mean([r is not None for r in scores.reason])),
            "exact_composition": float(np.mean(scores.comp >= 10.0)),
            "skipped_groups": float((~informative).mean()),
            "tokens_per_answer": float(np.mean([len(r.ids) for r in rollouts])),
            "reward_seconds": scored,
        }
        if c.world.main:
            self._show(step, prompts, rollouts, scores.total)
        return prompts, rollouts, advantages.reshape(-1), np.repeat(informative, o.group_size), metrics

    def _prompt(self, i: int, k: int, rng: np.random.Generator) -> Sample:
        """CIF prompts, design prompts and design prompts with an exemplar in turn."""
        s = self.systems[i]
        if k % 3 == 0:
            return Sample(cif_prompt(s.identity))
        if k % 3 == 1 or not self.kin[i]:
            return Sample(design_prompt(s.identity, s.known_energy))
        exemplar = self.systems[rng.choice(self.kin[i])]
        return Sample(design_prompt(s.identity, s.known_energy, exemplar=True), "", exemplar)

    def _add_policy(
        self,
        work: Step,
        prompts: list[Sample],
        rollouts: list[Rollout],
        advantages: np.ndarray,
        informative: np.ndarray,
    ) -> None:
        """Passes over the informative rollouts; every rank makes as many as the one that needs most."""
        c, o = self.context, self.config
        kept = np.flatnonzero(informative)
        n = c.world.maximum(-(-len(kept) // o.micro_batch))
        for k, part in enumerate(np.array_split(kept, n) if n else []):
            # A rank that has run out of rows still takes part in the collectives, with weight zero.
            rows = part if len(part) else np.array([0])
            weight = len(part) / max(1, len(kept))
            batch = rollout_batch(
                c.collate, [prompts[rollouts[i].prompt] for i in rows], [rollouts[i] for i in rows]
            ).to(c.world.device)
            advantage = torch.tensor(advantages[rows], dtype=torch.float32, device=c.world.device)
            work.passes.append(
                MicroBatch(
                    partial(self._policy_loss, k, batch, advantage, weight, work.metrics),
                    batch.tokens,
                )
            )

    def _policy_loss(
        self, k: int, batch: Batch, advantage: torch.Tensor, weight: float, metrics: dict[str, float]
    ) -> torch.Tensor:
        o = self.config
        logprob = self.context.model("answer", batch, temperature=o.sampling.temperature)["logprob"]
        old = self.old.setdefault(k, logprob.detach())
        with torch.no_grad():
            reference = self.reference("answer", batch, temperature=o.sampling.temperature)["logprob"]
        loss, kl = policy_loss(
            logprob, old, reference, advantage, batch.answer_sample, len(batch), o.beta, o.kl, o.clip
        )
        metrics["kl"] += weight * float(kl.detach().mean())
        outside = ((logprob.detach() - old).exp() - 1).abs() > o.clip
        metrics["clipped"] += weight * float(outside.float().mean())
        return weight * loss.mean()

    def _add_replay(self, work: Step, step: int) -> None:
        """A pass over property samples, as many as `property_share` of the rollouts."""
        c, o = self.context, self.config
        count = round(o.property_share * o.batch_size * o.group_size)
        if not count:
            return
        samples = [
            property_with_dropout(self.systems[i], rng, 0.2, 0.2, 0.0)
            for i, rng in chosen(
                len(self.systems), count, c.config.seed + 4, step, c.world.rank, c.world.size
            )
        ]
        batch = c.collate(samples).to(c.world.device)

        def loss() -> torch.Tensor:
            ce, mae, labelled = sample_losses(c.model, batch)
            work.metrics["energy_mae"] = float(mae[labelled].detach().mean()) * float(c.model.energy_std)
            return o.property_share * (ce + mae).mean()

        work.passes.append(MicroBatch(loss, batch.tokens))

    def _show(self, step: int, prompts: list[Sample], rollouts: list[Rollout], rewards: np.ndarray) -> None:
        """Keep one sampled answer a step for people to read."""
        r = rollouts[0]
        row = {
            "step": step,
            "prompt": prompts[r.prompt].prompt,
            "answer": r.text,
            "reward": float(rewards[0]),
        }
        with (self.context.folder / "samples.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]


def rollout_batch(collate: Collator, prompts: list[Sample], rollouts: list[Rollout]) -> Batch:
    """Prompts and the very tokens that were sampled, as a batch whose labels are those tokens."""
    rows = [Encoded(collate.prompt_ids(p), r.ids.tolist(), None, p.graph) for p, r in zip(prompts, rollouts)]
    return collate.join(rows)
