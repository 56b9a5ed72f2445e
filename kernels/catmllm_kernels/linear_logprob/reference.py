"""The definition: log-softmax of a linear layer's output, read at the target token, with every logit in memory.

Cross-entropy, GRPO and the closed loop all need this one number a token. `chunked.py` and `triton.py` give the same
without the logits; the tests hold them to this file in float64.
"""

import torch

IGNORED = -100  # a target of this value has no log-probability: 0, and no gradient


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(z)[targets], entropy of softmax(z)) with z = hidden @ weight.T / temperature.

    hidden [T, H] and weight [V, H] in one floating dtype, targets [T] int64 in [0, V) or IGNORED. Returns two [T], in
    float32 or wider, zero where the target is IGNORED.
    """
    kept = targets != IGNORED
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprob = torch.log_softmax(logits, -1)
    at_target = logprob.gather(1, targets.where(kept, 0)[:, None]).squeeze(1)
    entropy = -(logprob.exp() * logprob).sum(1)
    return at_target.where(kept, 0.0), entropy.where(kept, 0.0)
