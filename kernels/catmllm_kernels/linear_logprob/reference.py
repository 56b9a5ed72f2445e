"""The definition: log-softmax of a linear layer's output, read at the target token.

Cross-entropy, GRPO and the closed loop all need this one number a token. Where [tokens, vocabulary] is large, the rows
are taken in chunks and each chunk is recomputed in backward, so that no more than one chunk of logits exists at a time.
"""

import torch
from torch.utils.checkpoint import checkpoint


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    max_logits: int = 1 << 26,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets].

    hidden [T, H] and weight [V, H] in one floating dtype, targets [T] int64 in [0, V). Returns [T] float32
    (float64 of float64 inputs): products are taken in the inputs' dtype, the softmax in float32 or wider.
    At most `max_logits` logits (2^26: 256 MiB in float32) exist at a time.
    """
    chunk = max(1, max_logits // weight.shape[0])
    if hidden.shape[0] <= chunk:
        return _rows(hidden, weight, targets, temperature)
    parts = [
        checkpoint(_rows, h, weight, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk))
    ]
    return torch.cat(parts)


def _rows(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    # One fused pass each way; gather minus logsumexp took half of a training step on a CPU.
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
