"""The op by torch's own products, a chunk of logits at a time: the path of CPUs, and of float64 anywhere.

Forward goes by tokens, so that a row's softmax is one fused pass. Backward goes by words: a chunk's rows of the weight's
gradient are then complete when written, and only the hidden states' gradient is summed over chunks, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from catmllm_kernels.dense import product, summed_outer

# With no more logits than this in all, their log-softmax is kept for the backward pass instead of made again: on a CPU a
# tenth of a small model's step. 64 MiB in float32.
KEEP = 1 << 24
LOGITS = 1 << 24  # logits at a time: 64 MiB in float32; a chunk this size hides the cost of a call


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    reference: Tensor | None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(at the target, logsumexp, entropy, reference at the target), each [T], and with `keep` the log-softmax [T, V];
    [0] for what was not asked for."""
    lp = hidden.new_empty(len(hidden), dtype=wide(hidden.dtype))
    lse = torch.empty_like(lp)
    spread = torch.empty_like(lp) if entropy else lp.new_empty(0)
    kept = lp.new_empty(0)
    if keep:
        kept = lp.new_empty(len(hidden), weight.shape[0])
    for rows, z in _logits(hidden, weight, temperature):
        own = z.gather(1, targets[rows, None]).squeeze(1)
        # One fused pass; torch's logsumexp takes several.
        logprob = torch.log_softmax(z, 1, out=kept[rows]) if keep else torch.log_softmax(z, 1)
        lp[rows] = logprob.gather(1, targets[rows, None]).squeeze(1)
        lse[rows] = own - lp[rows]
        if entropy:
            spread[rows] = -(logprob.exp() * logprob).sum(1)
    if reference is None:
        return lp, lse, spread, lp.new_empty(0), kept
    return lp, lse, spread, forward(hidden, reference, targets, temperature, False, None)[0], kept


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    count = max(1, LOGITS // weight.shape[0])
    for start in range(0, len(hidden), count):
        rows = slice(start, start + count)
        z = product(hidden[rows], weight).to(wide(hidden.dtype))
        yield rows, z if temperature == 1.0 else z.div_(temperature)


def backward(
    grad: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight); None for one not needed. grad, grad_entropy [T]."""
    words = max(1, LOGITS // max(1, len(hidden)))
    rows = torch.arange(len(hidden), device=hidden.device)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=wide(hidden.dtype)) if need_hidden else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    for start in range(0, weight.shape[0], words):
        part = weight[start : start + words]
        if kept is not None:
            z = kept[:, start : start + words]
        else:
            z = product(hidden, part).to(wide(hidden.dtype))
            if temperature != 1.0:
                z.div_(temperature)
            z.sub_(lse[:, None])
        if grad_entropy is None:
            d = (z.exp() if kept is not None else z.exp_()).mul_(-grad[:, None])
        else:
            d = -z.exp() * (grad[:, None] + grad_entropy[:, None] * (z + entropy[:, None]))
        inside = (targets >= start) & (targets < start + len(part))
        d.index_put_((rows, (targets - start).where(inside, 0)), grad.where(inside, 0.0), accumulate=True)
        if temperature != 1.0:
            d.div_(temperature)
        d = d.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden += product(d, part.t())
        if grad_weight is not None:
            summed_outer(d, hidden, grad_weight[start : start + words])
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight
