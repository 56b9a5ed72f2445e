"""Group-relative advantages (paper Eqs. 45-47) and the policy loss of a sample (Eqs. 48-52)."""

from __future__ import annotations

import numpy as np
import torch


def group_advantages(rewards: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(r - mean) / (std + delta) inside each group, with the population std.

    rewards [groups, K] float64. Returns advantages of that shape and `informative` [groups] bool: a group whose
    rewards are all equal (to 1e-9) carries no signal; its advantages are 0 and it should be left out.
    """
    if not np.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    centred = rewards - rewards.mean(1, keepdims=True)
    informative = np.abs(centred).max(1) > 1e-9
    advantages = centred / (rewards.std(1, keepdims=True) + delta)
    return advantages * informative[:, None], informative


def kl_estimate(logprob: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) on the policy's own samples, any shape.

    `k1` log-ratio (the paper's Eq. 50: unbiased, but as a loss its expected gradient is zero), `k2` half its square,
    `k3` exp(-d) - 1 + d: unbiased and never negative.
    """
    d = logprob - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {kind!r}; choose k1, k2 or k3")


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """-A l + beta KL of each sample, both length-normalised, and the KL alone: two tensors [n_rows].

    logprob, old, reference [M] per token (old: of the policy that sampled), advantage [n_rows], row [M] the sample of
    each token. l enters as the ratio exp(logprob - old), clipped to 1 ± clip, whose value and gradient at one update
    a rollout are those of A l.
    """
    length = torch.bincount(row, minlength=n_rows).clamp_min(1)

    def per_row(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(n_rows).index_add(0, row, x) / length

    ratio = (logprob - old).exp()
    a = advantage[row]
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    divergence = per_row(kl_estimate(logprob, reference, kl))
    return -per_row(gain) + beta * divergence, divergence
