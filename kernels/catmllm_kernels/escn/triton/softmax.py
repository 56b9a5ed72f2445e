"""The attention weights: LayerNorm, SmoothLeakyReLU, dot, softmax over the edges of a target;
and their gradient."""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.escn.layout import EdgeAttention
from catmllm_kernels.escn.triton.activation import sigmoid
from catmllm_kernels.escn.triton.tiles import PROGRAMS, power_of_two, tile
from catmllm_kernels.launch import SIZES, launch


@triton.jit
def normalised(x, a_mask, A: tl.constexpr):
    """(x - mean) / deviation over the channels, and 1 / deviation."""
    mean = tl.sum(x, 1) / A
    x = tl.where(a_mask[None, :], x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / A + 1e-5)
    return x * scale[:, None], scale


@triton.jit
def softmax_kernel(
    extra,
    norm_weight,
    norm_bias,
    dot,
    ptr,
    alpha,
    extra_edge,
    HEADS: tl.constexpr,
    A: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """alpha [E, HEADS] of one target and head: LayerNorm, SmoothLeakyReLU, dot, softmax over its edges.

    Here and in the gradient float32 is calculated in float64:
    the gradient of the norm's bias cancels to a tenth of its terms.
    """
    WIDE: tl.constexpr = tl.float64 if extra.dtype.element_ty == tl.float32 else tl.float32
    node, head = tl.program_id(0), tl.program_id(1)
    a = tl.arange(0, BLOCK_A)
    a_mask = a < A
    d = tl.load(dot + head * A + a, mask=a_mask, other=0.0).to(WIDE)
    if NORM:
        w = tl.load(norm_weight + a, mask=a_mask, other=0.0).to(WIDE)
        b = tl.load(norm_bias + a, mask=a_mask, other=0.0).to(WIDE)
    begin, end = tl.load(ptr + node), tl.load(ptr + node + 1)
    top = tl.full([], -float("inf"), WIDE)
    total = tl.zeros([], WIDE)
    for first in range(begin, end, BLOCK_E):
        edge = (first + tl.arange(0, BLOCK_E)).to(tl.int64)
        real = edge < end
        at = extra + edge[:, None] * extra_edge + (head * A + a)[None, :]
        x = tl.load(at, mask=real[:, None] & a_mask[None, :], other=0.0).to(WIDE)
        if NORM:
            x, _ = normalised(x, a_mask, A)
            x = x * w[None, :] + b[None, :]
        logit = tl.sum((0.2 * x + 0.8 * x * sigmoid(x)) * d[None, :], 1)
        logit = tl.where(real, logit, -float("inf"))
        tl.store(alpha + edge * HEADS + head, logit, mask=real)
        highest_ = tl.maximum(top, tl.max(logit, 0))
        total = total * tl.exp(top - highest_) + tl.sum(tl.exp(logit - highest_), 0)
        top = highest_
    tl.debug_barrier()  # the logits just written are read by other threads of this program
    for first in range(begin, end, BLOCK_E):
        edge = (first + tl.arange(0, BLOCK_E)).to(tl.int64)
        real = edge < end
        logit = tl.load(alpha + edge * HEADS + head, mask=real, other=0.0)
        tl.store(alpha + edge * HEADS + head, tl.exp(logit - top) / total, mask=real)


@triton.jit(do_not_specialize=SIZES)
def softmax_grad_kernel(
    extra,
    norm_weight,
    norm_bias,
    dot,
    ptr,
    alpha,
    grad_alpha,
    grad_extra,
    partial,
    n_nodes,
    extra_edge,
    grad_edge,
    HEADS: tl.constexpr,
    A: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Gradients of the attention weights to `extra`, and this program's share of those to norm and dot.
    A hot loop: one kernel.

    Programs take nodes in turn; partial [programs, HEADS, 3, A] (dot, norm weight, norm bias)
    is summed afterwards.
    """
    WIDE: tl.constexpr = tl.float64 if extra.dtype.element_ty == tl.float32 else tl.float32
    head = tl.program_id(1)
    a = tl.arange(0, BLOCK_A)
    a_mask = a < A
    d = tl.load(dot + head * A + a, mask=a_mask, other=0.0).to(WIDE)
    if NORM:
        w = tl.load(norm_weight + a, mask=a_mask, other=0.0).to(WIDE)
        b = tl.load(norm_bias + a, mask=a_mask, other=0.0).to(WIDE)
    sum_dot = tl.zeros([BLOCK_A], WIDE)
    sum_w = tl.zeros([BLOCK_A], WIDE)
    sum_b = tl.zeros([BLOCK_A], WIDE)
    for node in range(tl.program_id(0), n_nodes, tl.num_programs(0)):
        begin, end = tl.load(ptr + node), tl.load(ptr + node + 1)
        mean = tl.zeros([], WIDE)
        mass = tl.zeros([], WIDE)
        for first in range(begin, end, BLOCK_E):
            edge = (first + tl.arange(0, BLOCK_E)).to(tl.int64)
            real = edge < end
            p = tl.load(alpha + edge * HEADS + head, mask=real, other=0.0).to(WIDE)
            mean += tl.sum(p * tl.load(grad_alpha + edge * HEADS + head, mask=real, other=0.0), 0)
            mass += tl.sum(p, 0)
        mean = mean / mass  # which is 1 up to rounding: then a target's gradients sum to 0
        for first in range(begin, end, BLOCK_E):
            edge = (first + tl.arange(0, BLOCK_E)).to(tl.int64)
            real = edge < end
            mask = real[:, None] & a_mask[None, :]
            p = tl.load(alpha + edge * HEADS + head, mask=real, other=0.0).to(WIDE)
            g = p * (tl.load(grad_alpha + edge * HEADS + head, mask=real, other=0.0) - mean)
            at = extra + edge[:, None] * extra_edge + (head * A + a)[None, :]
            z = tl.load(at, mask=mask, other=0.0).to(WIDE)
            scale = g
            t = z
            if NORM:
                z, scale = normalised(z, a_mask, A)
                t = z * w[None, :] + b[None, :]
            s = sigmoid(t)
            sum_dot += tl.sum(g[:, None] * (0.2 * t + 0.8 * t * s), 0)
            dx = g[:, None] * d[None, :] * (0.2 + 0.8 * s * (1 + t * (1 - s)))
            if NORM:
                sum_w += tl.sum(dx * z, 0)
                sum_b += tl.sum(dx, 0)
                dx = dx * w[None, :]
                dx -= (tl.sum(dx, 1) / A)[:, None] + z * (tl.sum(dx * z, 1) / A)[:, None]
                dx = dx * scale[:, None]
            out = grad_extra + edge[:, None] * grad_edge + (head * A + a)[None, :]
            tl.store(out, dx.to(grad_extra.dtype.element_ty), mask=mask)
    at = partial + (tl.program_id(0) * HEADS + head) * 3 * A + a
    tl.store(at, sum_dot, mask=a_mask)
    tl.store(at + A, sum_w, mask=a_mask)
    tl.store(at + 2 * A, sum_b, mask=a_mask)


def attention_weights(a: EdgeAttention, extra: Tensor) -> Tensor:
    """alpha [E, heads] float32."""
    heads, width = a.alpha_dot.shape
    alpha = extra.new_empty(len(extra), heads, dtype=torch.float32)
    t = tile("softmax")
    launch(
        softmax_kernel,
        (len(a.x), heads),
        extra, *(a.alpha_norm or (None, None)), a.alpha_dot, a.graph.ptr, alpha, extra.shape[1],
        HEADS=heads, A=width, NORM=a.alpha_norm is not None, BLOCK_A=power_of_two(width), **t,
    )  # fmt: skip
    return alpha


def attention_grad(
    a: EdgeAttention, extra: Tensor, alpha: Tensor, grad_alpha: Tensor, out: Tensor
) -> list[Tensor]:
    """Fills the first columns of `out`; gradients of norm weight, norm bias (if any) and dot."""
    heads, width = a.alpha_dot.shape
    wide = torch.float64 if extra.dtype == torch.float32 else torch.float32
    partial = extra.new_empty(min(PROGRAMS, len(a.x)), heads, 3, width, dtype=wide)
    t = tile("softmax_grad")
    launch(
        softmax_grad_kernel,
        (len(partial), heads),
        extra, *(a.alpha_norm or (None, None)), a.alpha_dot, a.graph.ptr, alpha, grad_alpha, out, partial,
        len(a.x), extra.shape[1], out.shape[1],
        HEADS=heads, A=width, NORM=a.alpha_norm is not None, BLOCK_A=power_of_two(width), **t,
    )  # fmt: skip
    dot, weight, bias = partial.sum(0).unbind(1)
    norm = [] if a.alpha_norm is None else [weight.sum(0), bias.sum(0)]
    return [g.to(like.dtype) for g, like in zip([*norm, dot], [*(a.alpha_norm or ()), a.alpha_dot])]
