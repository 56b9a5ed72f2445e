"""The op by matrix products, a chunk of logits at a time: the path of CPUs.

Between the products csrc/rows makes one pass over the logits where it can, torch's operators several: 1,600
tokens of 3,229 words in bf16 take 18 ms forward and backward on one thread, and took 55 by torch's. Forward
goes by tokens, so that a row's softmax is one fused pass. Backward goes by words: a chunk's rows of the
weight's gradient are then complete when written, and only the hidden states' gradient is summed over chunks,
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from catmllm_kernels import rows
from catmllm_kernels.backend import warn_once
from catmllm_kernels.dense import product, summed_outer
from catmllm_kernels.linear_logprob.arguments import Backward, Forward

# With no more logits than this in all, their gradient is kept for the backward pass instead of made again: on
# a CPU a tenth of a small model's step. 32 MiB in half precision.
KEEP = 1 << 24
LOGITS = 1 << 24  # logits at a time: 64 MiB in float32; a chunk this size hides the cost of a call
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unfit(x: Tensor) -> str:
    """Nothing: the products are torch's."""
    return ""


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def one_pass(logits: Tensor) -> bool:
    """Whether csrc/rows takes these logits; says once where it should and cannot."""
    why = rows.unfit(logits)
    if why and logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        warn_once("linear_logprob", why)
    return not why


def forward(p: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(at the target, logsumexp, entropy, reference at the target), each [T], and with `keep` the gradient of
    the first in logits / temperature [T, V]: 1 at the target, minus the softmax, in the inputs' dtype; [0]
    for what was not asked for."""
    hidden, weight, targets, temperature, entropy, reference, keep = p
    tokens, words = len(hidden), weight.shape[0]
    lp = hidden.new_empty(tokens, dtype=wide(hidden.dtype))
    lse = torch.empty_like(lp)
    spread = torch.empty_like(lp) if entropy else lp.new_empty(0)
    count = max(1, LOGITS // words)
    kept = hidden.new_empty((tokens, words) if keep and (tokens > count or not tokens) else 0)
    for start in range(0, tokens, count):
        part = slice(start, start + count)
        z = product(hidden[part], weight)
        if one_pass(z):
            arrays = [lp[part], lse[part], spread[part] if entropy else None]
            scale, target = 1 / temperature, targets[part].contiguous()
            rows.call("log_softmax", z.dtype, *z.shape, scale, target, z, int(keep), *arrays)
            if keep and tokens > count:
                kept[part] = z
            elif keep:
                kept = z
            continue
        z = _scaled(z, temperature)
        own = z.gather(1, targets[part, None]).squeeze(1)
        # One fused pass; torch's logsumexp takes several.
        logprob = torch.log_softmax(z, 1)
        lp[part] = logprob.gather(1, targets[part, None]).squeeze(1)
        lse[part] = own - lp[part]
        if entropy:
            spread[part] = -(logprob.exp() * logprob).sum(1)
        if keep:
            slope = _at_target(logprob.exp_().neg_(), targets[part], torch.ones_like(lp[part])).to(
                hidden.dtype
            )
            if tokens > count:
                kept[part] = slope
            else:
                kept = slope
    if reference is None:
        return lp, lse, spread, lp.new_empty(0), kept
    return lp, lse, spread, forward(Forward(hidden, reference, targets, temperature))[0], kept


def _scaled(z: Tensor, temperature: float) -> Tensor:
    """Logits in float32 or wider, divided by the temperature."""
    z = z.to(wide(z.dtype))
    return z if temperature == 1.0 else z.div_(temperature)


def _at_target(z: Tensor, targets: Tensor, value: Tensor) -> Tensor:
    """z [T, V] with value [T] added at each row's target, in place; a target outside of [0, V)
    is passed over."""
    inside = (targets >= 0) & (targets < z.shape[1])
    at = (torch.arange(len(z), device=z.device), targets.where(inside, 0))
    return z.index_put_(at, value.where(inside, 0.0), accumulate=True)


def backward(p: Backward) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight); None for one not needed."""
    grad, grad_entropy, hidden, weight, targets, lse, entropy, temperature, *_ = p
    if p.kept is not None and grad_entropy is None:
        return of_kept(grad / temperature, hidden, weight, p.kept, p.need_hidden, p.need_weight)
    words = max(1, LOGITS // max(1, len(hidden)))
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=wide(hidden.dtype)) if p.need_hidden else None
    grad_weight = torch.empty_like(weight) if p.need_weight else None
    for start in range(0, weight.shape[0], words):
        part = weight[start : start + words]
        d = product(hidden, part)
        if one_pass(d):
            sums = [lse, entropy if grad_entropy is not None else None, grad.contiguous()]
            of_entropy = None if grad_entropy is None else grad_entropy.contiguous()
            scale, target = 1 / temperature, targets.contiguous()
            rows.call("log_softmax_gradient", d.dtype, *d.shape, start, scale, target, *sums, of_entropy, d)
        else:
            z = _scaled(d, temperature).sub_(lse[:, None])
            if grad_entropy is None:
                d = z.exp_().mul_(-grad[:, None])
            else:
                d = -z.exp() * (grad[:, None] + grad_entropy[:, None] * (z + entropy[:, None]))
            d = _at_target(d, targets - start, grad)
            d = (d if temperature == 1.0 else d.div_(temperature)).to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden += product(d, part.t())
        if grad_weight is not None:
            summed_outer(d, hidden, grad_weight[start : start + words])
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def of_kept(
    grad: Tensor, hidden: Tensor, weight: Tensor, kept: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients by products with what was kept; each row's factor `grad` goes on the smaller matrix."""
    grad_hidden = grad_weight = None
    if need_hidden:
        grad_hidden = (product(kept, weight.t()) * grad[:, None]).to(hidden.dtype)
    if need_weight:
        # Loss scales and means over tokens would leave float16's range:
        # the largest factor goes on the result.
        most = grad.abs().max().clamp_min(torch.finfo(grad.dtype).tiny) if len(grad) else grad.new_ones(())
        grad_weight = torch.empty_like(weight)
        summed_outer(kept, (hidden * (grad / most)[:, None]).to(hidden.dtype), grad_weight)
        grad_weight.mul_(most)
    return grad_hidden, grad_weight
