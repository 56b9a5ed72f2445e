"""Group-relative advantages (paper Eqs. 45-47) and the policy loss of a sample (Eqs. 48-52)."""

from __future__ import annotations

import numpy as np
import torch

from catmllm.models.catalytic_mllm import counts


def group_advantages(rewards: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(r - mean) / (std + delta) inside each group, with the population std.

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
    return np.where(informative, centred / (std + delta), 0.0), informative


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

    `sample`: their mean, so that every answer counts alike (Eq. 48); `token`: their sum,
    so that every token does.
    """
    total = x.new_zeros(n_rows).index_add(0, row, x)
    if normalise == "token":
        return total
    return total / counts(row, n_rows).clamp_min(1)


def policy_loss(
    logprob: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor,
    advantage: torch.Tensor,
    row: torch.Tensor,
    n_rows: int,
    beta: float,
    kl: str,
    clip: float,
    normalise: str = "sample",
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A l + beta KL of each answer, and the KL alone, both as `per_answer` has it: two tensors [n_rows].

    logprob, old, reference [M] per token (old: of the policy that sampled), advantage [n_rows], row [M] the
    answer of each token. l enters as the ratio exp(logprob - old), clipped to 1 ± clip, whose value and
    gradient at one update a rollout are those of A l.
    """
    ratio = (logprob - old).exp()
    a = advantage[row]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    divergence = per_answer(kl_estimate(logprob, reference, kl), row, n_rows, normalise)
    return -per_answer(gain, row, n_rows, normalise) + beta * divergence, divergence
