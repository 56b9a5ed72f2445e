"""The definition: log-softmax of a linear layer's output, read at the target token,
with every logit in memory.

Cross-entropy, GRPO and the closed loop all need this one number a token. `cpu.py` and `triton.py` give the
same without the logits; the tests hold them to this file in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from catmllm_kernels.backend import autograd_again
from catmllm_kernels.linear_logprob.arguments import Backward, Forward

IGNORED = -100  # a target of this value has no log-probability: 0, and no gradient


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log softmax(z)[targets], entropy of softmax(z)) with z = hidden @ weight.T / temperature.

    hidden [T, H] and weight [V, H] in one floating dtype, targets [T] int64 in [0, V) or IGNORED. Returns two
    [T], in float32 or wider, zero where the target is IGNORED.
    """
    kept = targets != IGNORED
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprob = torch.log_softmax(logits, -1)
    at_target = logprob.gather(1, targets.where(kept, 0)[:, None]).squeeze(1)
    entropy = -(logprob.exp() * logprob).sum(1)
    return at_target.where(kept, 0.0), entropy.where(kept, 0.0)


# --------------------------------------------------------------------------------------- as an implementation


def forward(p: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.forward`, but for the logsumexp, which the backward pass below does not need: zeros.
    Nothing is kept."""
    hidden, weight, targets, temperature, entropy, reference, _ = p
    with torch.no_grad():
        lp, spread = linear_logprob(hidden, weight, targets, temperature)
        other = None if reference is None else linear_logprob(hidden, reference, targets, temperature)[0]
    # each a tensor of its own: outputs of an operator must not share storage
    spread, other = (x if x is not None else lp.new_empty(0) for x in (spread if entropy else None, other))
    return lp, torch.zeros_like(lp), spread, other, hidden.new_empty(0)


def backward(p: Backward) -> tuple[Tensor, Tensor]:
    """By autograd through the definition, run once more."""
    h, w = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()
    with autograd_again():
        lp, spread = linear_logprob(h, w, p.targets, p.temperature)
        total = (lp * p.grad).sum() + (0 if p.grad_entropy is None else (spread * p.grad_entropy).sum())
        of_hidden, of_weight = torch.autograd.grad(total, (h, w))
    return of_hidden, of_weight
