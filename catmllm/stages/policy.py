"""The policy's update, whatever it moves: passes over sampled answers, and the loss of each.

GRPO and GA-GRPO differ in how a pass comes by its log-probabilities: through the whole model, or through the
LM head from hidden states that were kept. All that follows from them is the same and stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from catmllm.config import GAGRPOConfig, GRPOConfig
from catmllm.models.catalytic_mllm import Chosen
from catmllm.sample.answers import Rollout
from catmllm.stages.advantages import per_answer, policy_loss
from catmllm.train.stage import MicroBatch, Step, Validation
from catmllm.world import World


class Read(NamedTuple):
    """Of the tokens of a pass's answers, end to end [M]: log-probabilities by the policy and by the
    reference, and the entropy of what they were drawn from. Under a grammar of those that were choices: a
    forced token's log-probability is 0 by either."""

    logprob: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor | None = None


class Pass(NamedTuple):
    """How some answers are read, how many tokens that takes, and the batch that is saved where the loss goes
    wrong."""

    read: Callable[[], Read]
    tokens: int
    batch: Any = None


def add_policy(
    work: Step,
    world: World,
    config: GRPOConfig | GAGRPOConfig,
    rollouts: list[Rollout],
    advantages: np.ndarray,
    informative: np.ndarray,
    prepare: Callable[[list[Rollout]], Pass],
    clip: float = 1.0,
    normalise: Literal["sample", "token"] = "sample",
    old: dict[int, torch.Tensor] | None = None,
) -> None:
    """Passes over the informative rollouts; every rank makes as many as the one that needs most.

    advantages, informative [answers]. `old` keeps the log-probabilities of the policy that sampled, by pass,
    where several steps go over the same answers. Logs `kl`, and where there are any, `clipped` and `entropy`.
    """
    kept = np.flatnonzero(informative)
    n = world.maximum(-(-len(kept) // config.micro_batch))
    # Ranks keep different numbers of answers and gradients are averaged over ranks: with the mean number
    # in the denominator the step is that of all answers in one batch.
    count = {"rows": float(len(kept)), "tokens": float(sum(drawn(rollouts[i]) for i in kept))}
    whole = max(world.mean(count)["rows" if normalise == "sample" else "tokens"], 1.0)

    def loss(k: int, read: Callable[[], Read], lengths: list[int], rows: np.ndarray, weight: float) -> Any:
        found = read()
        device = found.logprob.device
        a = torch.tensor(advantages[rows], dtype=torch.float32, device=device)
        each = torch.tensor(lengths, device=device)
        row = torch.arange(len(rows), device=device).repeat_interleave(each, output_size=sum(lengths))
        sampled = found.logprob.detach() if old is None else old.setdefault(k, found.logprob.detach())
        losses, kl = policy_loss(
            found.logprob,
            sampled,
            found.reference,
            a,
            row,
            len(rows),
            config.beta,
            config.kl,
            clip,
            normalise,
        )

        def log(name: str, value: torch.Tensor) -> None:
            work.metrics[name] += weight * value.detach().sum()

        log("kl", kl)
        if old is not None:
            outside = (((found.logprob.detach() - sampled).exp() - 1).abs() > clip).float()
            log("clipped", per_answer(outside, row, len(rows), normalise))
        if found.entropy is not None:
            log("entropy", per_answer(found.entropy, row, len(rows), normalise))
        return weight * losses.sum()

    for k, part in enumerate(np.array_split(kept, n) if n else []):
        # A rank that has run out of rows still takes part in the collectives, with weight zero.
        rows = part if len(part) else np.array([0])
        chosen = [rollouts[i] for i in rows]
        one = prepare(chosen)
        lengths = [drawn(r) for r in chosen]
        weight = (len(part) > 0) / whole
        work.passes.append(
            MicroBatch(partial(loss, k, one.read, lengths, rows, weight), one.tokens, len(rows), one.batch)
        )


def drawn(rollout: Rollout) -> int:
    """The tokens of an answer that the policy chose: of a free one all."""
    return len(rollout.ids if rollout.choices is None else rollout.choices.at)


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
