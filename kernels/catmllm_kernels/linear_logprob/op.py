"""The public op: one function, whatever the device. Triton on CUDA, chunks of torch's own products on a CPU.

Through `torch.library`, so that compile, activation checkpointing and planning without data see one node with
a known output, a known FLOP count and a known workspace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import catmllm_kernels.linear_logprob.cpu as cpu
from catmllm_kernels.backend import implementation
from catmllm_kernels.linear_logprob.arguments import Backward, Forward
from catmllm_kernels.linear_logprob.reference import IGNORED
from catmllm_kernels.schema import arguments_of

OP = "linear_logprob"


class LogProbs(NamedTuple):
    """Per token [T] in float32 (float64 of float64 inputs); None for what was not asked for."""

    logprob: Tensor
    entropy: Tensor | None
    reference: Tensor | None


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[targets], the logits never in memory as a whole.

    hidden [T, H] and weight [V, H] in one floating dtype, targets [T] int64 in [0, V), or -100: ignored, a
    result of 0 and no gradient. Returns [T] float32 (float64 of float64 inputs). Sums run in float32; a CPU
    rounds the logits to the inputs' dtype in between. Differentiable once in hidden and weight; the backward
    pass recomputes the logits (a CPU keeps them where they are few, see cpu.KEEP). Under autocast the two are
    cast as for a linear layer. Raises ValueError for shapes or dtypes that do not fit, and on a CPU for a
    target out of range; on CUDA, where looking would stall the queue, such a target's result is NaN.

    Two words of equal score, and a token that is ignored:

    >>> hidden, weight = torch.ones(2, 3), torch.ones(2, 3)
    >>> linear_logprob(hidden, weight, targets=torch.tensor([1, -100])).exp()
    tensor([0.5000, 1.0000])
    """
    return linear_logprobs(hidden, weight, targets, temperature).logprob


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    reference: Tensor | None = None,
) -> LogProbs:
    """`linear_logprob`, and where asked: the entropy of each distribution (differentiable; 0 where ignored),
    and the log-probabilities of a second head `reference` [V, H] on the same hidden states in the same pass
    (no gradient).

    >>> found = linear_logprobs(torch.ones(1, 3), torch.ones(4, 3), torch.tensor([2]), entropy=True)
    >>> found.logprob, found.entropy, found.reference
    (tensor([-1.3863]), tensor([1.3863]), None)
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [T, H] and weight [V, H], not {_shape(hidden)} and {_shape(weight)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target for each of the {len(hidden)} tokens, not {_shape(targets)}")
    if reference is not None and reference.shape != weight.shape:
        raise ValueError(f"the reference head is {_shape(reference)}, the policy's {_shape(weight)}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        reference = None if reference is None else reference.to(dtype)
    for w in (weight, reference):
        if w is not None and w.dtype != hidden.dtype:
            raise ValueError(f"hidden is {hidden.dtype}, a head is {w.dtype}: cast one of them")
    frozen = None if reference is None else reference.detach()
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = trains and implementation(OP, hidden) is cpu and len(hidden) * len(weight) <= cpu.KEEP
    logprob, _, spread, other, _ = torch.ops.catmllm.linear_logprob(
        hidden.contiguous(), weight.contiguous(), targets, float(temperature), entropy, frozen, keep
    )
    return LogProbs(logprob, spread if entropy else None, None if reference is None else other.detach())


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


@torch.library.custom_op(
    "catmllm::linear_logprob",
    mutates_args=(),
    schema=f"({arguments_of(Forward)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    p = Forward(*inputs)
    asked, valid = p.targets != IGNORED, _valid(p)
    if p.hidden.device.type == "cpu" and not bool((valid | ~asked).all()):
        wrong = int(p.targets[asked & ~valid][0])
        raise ValueError(
            f"target {wrong} is outside the vocabulary of {len(p.weight)} (or {IGNORED} to ignore)"
        )
    out = implementation(OP, p.hidden).forward(p._replace(targets=p.targets.where(valid, 0)))
    lp, lse, spread, ref, kept = out
    # 0 where ignored, NaN where out of range
    rest = torch.where(asked, torch.nan, 0.0).to(lp.dtype)
    lp, spread, ref = (x.where(valid, rest) if x.numel() else x for x in (lp, spread, ref))
    return lp, lse, spread, ref, kept


def _valid(p: Forward | Backward) -> Tensor:
    return (p.targets >= 0) & (p.targets < p.weight.shape[0])


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    p = Forward(*inputs)
    lp = p.hidden.new_empty(p.hidden.shape[0], dtype=cpu.wide(p.hidden.dtype))
    nothing = lp.new_empty(0)
    return (
        lp,
        torch.empty_like(lp),
        torch.empty_like(lp) if p.entropy else nothing,
        torch.empty_like(lp) if p.reference is not None else nothing.clone(),
        p.hidden.new_empty((p.hidden.shape[0], p.weight.shape[0]) if p.keep else 0),
    )


@torch.library.custom_op(
    "catmllm::linear_logprob_backward",
    mutates_args=(),
    schema=f"({arguments_of(Backward)}) -> (Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    p = Backward(*inputs)
    valid = _valid(p)
    of_hidden, of_weight = implementation(OP, p.hidden).backward(
        p._replace(
            grad=p.grad.where(valid, 0.0),
            grad_entropy=None if p.grad_entropy is None else p.grad_entropy.where(valid, 0.0),
            targets=p.targets.where(valid, 0),
        )
    )
    nothing = p.hidden.new_empty(0)
    return nothing if of_hidden is None else of_hidden, nothing.clone() if of_weight is None else of_weight


@_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    p = Backward(*inputs)
    return (
        torch.empty_like(p.hidden) if p.need_hidden else p.hidden.new_empty(0),
        torch.empty_like(p.weight) if p.need_weight else p.weight.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p = Forward(*inputs)
    ctx.temperature, ctx.entropy, ctx.keep = p.temperature, p.entropy, p.keep
    _, lse, spread, _, kept = output
    ctx.save_for_backward(p.hidden, p.weight, p.targets, lse, spread, kept)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad: Tensor | None, _lse: Any, grad_entropy: Tensor | None, _ref: Any, _kept: Any
) -> tuple[Any, ...]:
    hidden, weight, targets, lse, spread, kept = ctx.saved_tensors
    if not ctx.entropy:
        grad_entropy = None
    if grad is None and grad_entropy is None:
        return (None,) * 7
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    of_hidden, of_weight = torch.ops.catmllm.linear_logprob_backward(
        torch.zeros_like(lse) if grad is None else grad,
        grad_entropy,
        hidden,
        weight,
        targets,
        lse,
        spread,
        ctx.temperature,
        need_hidden,
        need_weight,
        kept if ctx.keep else None,
    )
    return of_hidden if need_hidden else None, of_weight if need_weight else None, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.catmllm.linear_logprob, get_raw=True)
def forward_flops(*inputs: Any, **_: Any) -> int:
    """A product a head: 2·T·V·H."""
    p = Forward(*inputs)
    return 2 * p.hidden.shape[0] * p.weight.numel() * (1 if p.reference is None else 2)


@register_flop_formula(torch.ops.catmllm.linear_logprob_backward, get_raw=True)
def backward_flops(*inputs: Any, **_: Any) -> int:
    """The logits once more where their gradient was not kept or serves none,
    and a product for each gradient."""
    p = Backward(*inputs)
    again = p.kept is None or p.grad_entropy is not None
    return 2 * p.hidden.shape[0] * p.weight.numel() * (again + p.need_hidden + p.need_weight)


def workspace(tokens: int, width: int, words: int, element_size: int, backward: bool) -> int:
    """Bytes that the op allocates on CUDA beside inputs and outputs at its peak,
    for plans made without running it."""
    if not backward:
        return 0
    from catmllm_kernels.linear_logprob.triton import slice_of

    return tokens * slice_of(tokens, words) * element_size + 8 * tokens * width
