"""The policy's update, whatever it moves: passes over sampled answers, and the loss of each.

GRPO and GA-GRPO differ in how a pass comes by its log-probabilities: through the whole model, or through the
LM head from hidden states that were kept. All that follows from them is the same and stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from catmllm.config import GAGRPOConfig, GRPOConfig
from catmllm.data.prompts import Sample
from catmllm.models.catalytic_mllm import Chosen
from catmllm.sample.answers import Rollout
from catmllm.sample.vllm_engine import VLLMEngine
from catmllm.stages.advantages import RECIPES, Recipe, importance, per_answer, policy_loss, ratios
from catmllm.stages.deal import Share, spread
from catmllm.train.stage import Context, Metrics, MicroBatch, Step, Validation
from catmllm.world import DTYPES, World


class Read(NamedTuple):
    """Of the tokens of a pass's answers, end to end [M]: log-probabilities by the policy and by the
    reference (None without KL), and the entropy of what they were drawn from. Under a grammar of those that
    were choices: a forced token's log-probability is 0 by either."""

    logprob: torch.Tensor
    reference: torch.Tensor | None
    entropy: torch.Tensor | None = None


class Correction(NamedTuple):
    """How answers are weighed for what the sampler differs from the policy; see `importance`."""

    kind: Literal["token", "sequence"]
    cap: float


class Pass(NamedTuple):
    """How some answers are read, how many tokens that takes, and the batch that is saved where the loss goes
    wrong."""

    read: Callable[[], Read]
    tokens: int
    batch: Any = None


@dataclass(frozen=True)
class Update:
    """What the losses of a step's passes share. `whole`: by what counts alike, the number of it in the mean
    rank; `old`: see `add_policy`."""

    metrics: Metrics
    config: GRPOConfig | GAGRPOConfig
    recipe: Recipe
    whole: Mapping[str, float]
    old: dict[int, torch.Tensor] | None
    correction: Correction | None

    def loss(
        self, k: int, read: Callable[[], Read], chosen: list[Rollout], advantages: np.ndarray, there: float
    ) -> torch.Tensor:
        """The loss of pass k over the answers `chosen`, with their advantages; `there`: 0 where they only
        stand in."""
        found, lengths, n = read(), [drawn(r) for r in chosen], len(chosen)
        device, made = found.logprob.device, self.recipe
        a = torch.tensor(advantages, dtype=torch.float32, device=device)
        each = torch.tensor(lengths, device=device)
        row = torch.arange(n, device=device).repeat_interleave(each, output_size=sum(lengths))
        now = found.logprob.detach()
        before = now if self.old is None else self.old.setdefault(k, now)
        sampler = before if self.old is None else torch.cat([by_sampler(r) for r in chosen]).to(device)
        weights = None
        if self.correction is not None:
            weights = importance(before, sampler, row, n, *self.correction)
        losses, kl = policy_loss(
            found.logprob,
            before,
            found.reference,
            a,
            row,
            n,
            self.config.beta,
            self.config.kl,
            made.low,
            made.normalise,
            clip_high=made.high,
            ratio=made.ratio,
            weight=weights,
        )
        weight = there / self.whole[made.normalise]
        if found.reference is not None:
            self.metrics["kl"] += weight * kl.detach().sum()
        log = partial(self._log, row, n, there)
        if self.old is not None:
            ratio = ratios(now, before, row, n, made.ratio)
            log("clipped", (ratio < 1 - made.low) | (ratio > 1 + made.high))
            d = before - sampler
            log("mismatch", d.abs())
            log("mismatch_kl", torch.expm1(d) - d)
            log("importance", torch.ones_like(d) if weights is None else weights)
        if found.entropy is not None:
            log("entropy", found.entropy)
        return weight * losses.sum()

    def _log(self, row: torch.Tensor, n: int, there: float, name: str, value: torch.Tensor) -> None:
        """A mean over tokens [M] of n answers `row` [M], or over answers where these count alike."""
        kind = "sample" if self.recipe.normalise == "sample" else "token"
        mean = per_answer(value.detach().float(), row, n, kind).sum()
        self.metrics[name] += there / self.whole[kind] * mean


def add_policy(
    work: Step,
    world: World,
    config: GRPOConfig | GAGRPOConfig,
    rollouts: list[Rollout],
    advantages: np.ndarray,
    informative: np.ndarray,
    prepare: Callable[[list[Rollout], Sequence[Sample]], Pass],
    prompts: Sequence[Sample] = (),
    heads: Sequence[int] = (),
    loss_of: Recipe = RECIPES["grpo"],
    old: dict[int, torch.Tensor] | None = None,
    correction: Correction | None = None,
) -> None:
    """Passes over the informative rollouts; every rank makes as many as the one that needs most.

    With `config.batch_tokens` the answers of all ranks are dealt anew (see `spread`). advantages, informative
    [answers]; prompts that the answers index, none where these have hidden states, and `heads`, the tokens of
    each that a pass reads once for all its answers. `old` keeps the log-probabilities of the policy before
    the first update, by pass, where several steps go over the same answers; they are then compared with those
    that the sampler has told, and by `correction` weigh the answers. Logs `kl`, and where there is `old`,
    `clipped`, `mismatch` (mean |difference| of policy and sampler), `mismatch_kl` (k3) and `importance` (the
    mean weight), and `entropy`.
    """
    if config.batch_tokens is None:
        kept = np.flatnonzero(informative)
        n = world.maximum(-(-len(kept) // config.micro_batch))
        parts = np.array_split(kept, n) if n else []
    else:
        share = spread(world, rollouts, advantages, informative, prompts, heads, config.batch_tokens)
        # A rank that reads nothing still has an answer to stand in; see below.
        prompts, rollouts = [*share.prompts, *prompts], [*share.rollouts, *_behind(share, rollouts[0])]
        advantages = np.append(share.advantages, 0.0)
        kept, parts = np.arange(len(share.rollouts)), share.passes
    # Ranks keep different numbers of answers and gradients are averaged over ranks: with the mean number
    # in the denominator the step is that of all answers in one batch.
    count = {
        "sample": float(len(kept)),
        "token": float(sum(drawn(rollouts[i]) for i in kept)),
        "limit": float(sum(rollouts[i].limit for i in kept)),
    }
    means = world.mean(count)
    whole = {name: max(value, 1.0) for name, value in means.items()}
    update = Update(work.metrics, config, loss_of, whole, old, correction)
    for k, part in enumerate(parts):
        # A rank that has run out of rows still takes part in the collectives, with weight zero.
        rows = part if len(part) else np.array([len(rollouts) - 1])
        chosen = [rollouts[i] for i in rows]
        one = prepare(chosen, prompts)
        call = partial(update.loss, k, one.read, chosen, advantages[rows], float(len(part) > 0))
        work.passes.append(MicroBatch(call, one.tokens, len(rows), one.batch))


def _behind(share: Share, rollout: Rollout) -> list[Rollout]:
    """A rollout of this rank's own behind those of its share, where its prompts are too."""
    return [replace(rollout, prompt=rollout.prompt + len(share.prompts))]


def drawn(rollout: Rollout) -> int:
    """The tokens of an answer that the policy chose: of a free one all."""
    return len(rollout.ids if rollout.choices is None else rollout.choices.at)


def by_sampler(rollout: Rollout) -> torch.Tensor:
    """The log-probabilities that the sampler told of those tokens."""
    return rollout.logprob if rollout.choices is None else rollout.logprob[rollout.choices.at]


def on_device(chosen: Chosen | None, device: torch.device) -> Chosen | None:
    return None if chosen is None else (chosen[0].to(device), chosen[1].to(device))


def validation(
    config: GRPOConfig | GAGRPOConfig, world: World, rewards: Callable[[], np.ndarray]
) -> Validation | None:
    """By the mean reward of validation systems, of which `rewards` gives this rank's (NaN for none). The
    weights of the stage's start take part: what does not help is not kept."""

    def run() -> dict[str, float]:
        found = rewards()
        there = found[np.isfinite(found)]
        total = world.mean({"sum": float(there.sum()), "n": float(len(there))})
        mean = total["sum"] / total["n"] if total["n"] else float("nan")
        return {"val": -mean, "val_reward": mean}

    return Validation(run, config.validate_every, config.patience, True) if config.validate_every else None


def vllm_of(context: Context, config: GRPOConfig | GAGRPOConfig) -> VLLMEngine | None:
    """The vLLM that samples for this rank, where one is asked for; without weights yet."""
    c = context
    if config.vllm is None:
        return None
    # Qwen's residual stream overflows in plain float16.
    dtype = torch.bfloat16 if c.config.precision == "fp16" else DTYPES[c.config.precision]
    log = c.folder / f"vllm.{c.world.rank}.log"
    return VLLMEngine(config.vllm, c.model, c.collate, config.sampling, dtype, log, memory=config.vllm_memory)
