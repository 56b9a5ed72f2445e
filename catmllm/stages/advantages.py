"""Group-relative advantages (paper Eqs. 45-47), the policy loss of a sample (Eqs. 48-52), and what other
recipes put in its place."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch

from catmllm.config import GRPOConfig
from catmllm.models.catalytic_mllm import counts

Ratio = Literal["token", "sequence", "capped"]
Normalise = Literal["sample", "token", "limit"]


class Recipe(NamedTuple):
    """A loss by what it is made of: of what the probability ratio is, what counts alike, and how far below
    and above 1 the ratio may go."""

    ratio: Ratio
    normalise: Normalise
    low: float
    high: float


RECIPES = {
    "grpo": Recipe("token", "sample", 0.2, 0.2),  # the paper's
    "dapo": Recipe("token", "token", 0.2, 0.28),  # arXiv 2503.14476
    "dr_grpo": Recipe("token", "limit", 0.2, 0.2),  # arXiv 2503.20783
    "gspo": Recipe("sequence", "sample", 3e-4, 4e-4),  # arXiv 2507.18071
    "cispo": Recipe("capped", "token", 1.0, 4.0),  # arXiv 2506.13585; a cap of 5 as arXiv 2510.13786
}


def recipe(o: GRPOConfig) -> Recipe:
    """What `o.loss` names, with what the configuration gives instead."""
    made = RECIPES[o.loss]
    if o.loss == "grpo":
        made = made._replace(normalise=o.normalise)
    if o.clip is not None:
        made = made._replace(low=o.clip, high=o.clip)
    return made if o.clip_high is None else made._replace(high=o.clip_high)


def group_advantages(rewards: np.ndarray, delta: float, scaled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(r - mean) / (std + delta) inside each group, with the population std; r - mean where not `scaled`.

    rewards [groups, K] float64, NaN for an answer that has none: it takes no part. Returns advantages of that
    shape and `informative` [groups, K] bool: an answer without a reward, and every answer of a group whose
    rewards are all equal (to 1e-9), carries no signal; its advantage is 0 and it should be left out.
    """
    if np.isinf(rewards).any():
        raise ValueError("rewards must be finite, or NaN where an answer has none")
    there = ~np.isnan(rewards)
    n = there.sum(1, keepdims=True).clip(1)
    known = np.where(there, rewards, 0.0)
    centred = np.where(there, known - known.sum(1, keepdims=True) / n, 0.0)
    std = np.sqrt((centred**2).sum(1, keepdims=True) / n)
    informative = there & (np.abs(centred).max(1, keepdims=True) > 1e-9)
    return np.where(informative, centred / (std + delta) if scaled else centred, 0.0), informative


def overlong(lengths: np.ndarray, limits: np.ndarray, soft: int) -> np.ndarray:
    """DAPO's punishment of long answers [n], from 0 to -1: it grows over the last `soft` tokens before an
    answer's limit, and is -1 at the limit itself. lengths, limits [n] tokens."""
    return -np.clip((lengths - (limits - soft)) / max(soft, 1), 0.0, 1.0)


def kl_estimate(logprob: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own samples, any shape.

    `k1` log-ratio (the paper's Eq. 50: unbiased, but as a loss its expected gradient is zero), `k2` half its
    square, `k3` exp(-d) - 1 + d: unbiased and never negative.
    """
    d = logprob - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2 or k3")


def per_answer(x: torch.Tensor, row: torch.Tensor, n_rows: int, normalise: str) -> torch.Tensor:
    """Per-token values x [M] of answers row [M] as one number an answer [n_rows].

    `sample`: their mean, so that every answer counts alike (Eq. 48); `token` and `limit`: their sum,
    so that every token does.
    """
    total = x.new_zeros(n_rows).index_add(0, row, x)
    if normalise != "sample":
        return total
    return total / counts(row, n_rows).clamp_min(1)


def ratios(
    logprob: torch.Tensor, old: torch.Tensor, row: torch.Tensor, n_rows: int, kind: Ratio
) -> torch.Tensor:
    """The probability ratios [M] of tokens; with `sequence` each has its answer's, the geometric mean."""
    d = logprob - old
    return (per_answer(d, row, n_rows, "sample")[row] if kind == "sequence" else d).exp()


def policy_loss(
    logprob: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantage: torch.Tensor,
    row: torch.Tensor,
    n_rows: int,
    beta: float,
    kl: str,
    clip: float,
    normalise: str = "sample",
    *,
    clip_high: float | None = None,
    ratio: Ratio = "token",
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A l + beta KL of each answer, and the KL alone, both as `per_answer` has it: two tensors [n_rows].

    logprob, old, reference [M] per token (old: of the policy that sampled; reference: None without KL),
    advantage [n_rows], row [M] the answer of each token. l enters as the ratio exp(logprob - old), clipped to
    1 - clip … 1 + clip_high (None: clip), whose value and gradient at one update a rollout are those of A l.

    `ratio`: of each token; of the `sequence`, which is the geometric mean of its tokens' (GSPO); or `capped`
    at 1 + clip_high and without gradient, as a weight of the token's log-probability (CISPO). `weight` [M]
    multiplies the gain of each token, not its KL (see `importance`).
    """
    high = clip if clip_high is None else clip_high
    r, a = ratios(logprob, old, row, n_rows, ratio), advantage[row]
    if ratio == "capped":
        gain = r.clamp(max=1 + high).detach() * a * logprob
    else:
        gain = torch.minimum(r * a, r.clamp(1 - clip, 1 + high) * a)
    if weight is not None:
        gain = gain * weight
    loss = -per_answer(gain, row, n_rows, normalise)
    if reference is None:
        return loss, torch.zeros_like(loss)
    divergence = per_answer(kl_estimate(logprob, reference, kl), row, n_rows, normalise)
    return loss + beta * divergence, divergence


def importance(
    policy: torch.Tensor,
    sampler: torch.Tensor,
    row: torch.Tensor,
    n_rows: int,
    kind: Literal["token", "sequence"],
    cap: float,
) -> torch.Tensor:
    """Truncated importance weights [M] of tokens that something near the policy has sampled (an engine in
    half precision, say): min(p_policy / p_sampler, cap) of each token, or of its whole answer. policy,
    sampler [M]: log-probabilities of the tokens by either, before any update."""
    d = policy - sampler
    if kind == "sequence":
        d = per_answer(d, row, n_rows, "token")[row]
    return d.exp().clamp(max=cap)
