"""The definition: log-softmax of a linear layer's output, read at the target token.

Cross-entropy, GRPO and the closed loop all need this one number a token. The rows are taken in chunks and each chunk
is recomputed in backward, so that never more than `chunk` rows of [tokens, vocabulary] exist at a time.
"""

import torch
from torch.utils.checkpoint import checkpoint


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 4096,
) -> torch.Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets].

    hidden [T, H] and weight [V, H] in one floating dtype, targets [T] int64 in [0, V). Returns [T] float32: products
    are taken in the inputs' dtype, the softmax in float32.
    """
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
    logits = torch.nn.functional.linear(hidden, weight).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
