"""The consumer: attention weight, rotate back, sum over a target's edges in their order; and its gradient.

The same kernel, run over the edges at both ends of a node, is the gradient of the producer.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.escn.layout import EdgeAttention, EdgeGraph
from catmllm_kernels.escn.triton.gather import turned
from catmllm_kernels.escn.triton.indices import (
    half_of,
    highest,
    lost_order_scale,
    n_half,
    n_rows,
    row_of,
    wigner_offset,
)
from catmllm_kernels.escn.triton.tiles import cells, power_of_two, tile
from catmllm_kernels.launch import SIZES, launch


@triton.jit
def add_edges(
    acc,
    slot,
    end,
    order,
    values,
    values_at,
    weights,
    weights_at,
    wigner,
    c_mask,
    l: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    KEPT: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    WEIGHT_EDGE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """acc + Dᵀ·(weight·value) of degree l over a list of edges: slots to `end`, through `order` where given.

    `values_at` and `weights_at` are the columns of a tile's channels. A weight per row m >= 0 (WEIGHT_ROW
    channels apart) or, with WEIGHT_ROW 0, one for all.
    """
    K: tl.constexpr = highest(l, M)
    VALUE_EDGE: tl.constexpr = n_rows(L, KEPT) * VALUE_ROW
    for first in range(slot, end, BLOCK_E):
        slots = first + tl.arange(0, BLOCK_E)
        real = slots < end
        if order is None:
            edge = slots.to(tl.int64)
        else:
            edge = tl.load(order + slots, mask=real, other=0)
        mask = real[:, None] & c_mask[None, :]
        D = wigner + edge * wigner_offset(L + 1, M) + wigner_offset(l, M)
        value = values + edge[:, None] * VALUE_EDGE + values_at[None, :]
        weight_at = weights + edge[:, None] * WEIGHT_EDGE + weights_at[None, :]
        for m in tl.static_range(highest(l, KEPT) + 1):
            weight = tl.load(weight_at + half_of(l, m, L) * WEIGHT_ROW, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(value + row_of(l, m, L) * VALUE_ROW, mask=mask, other=0.0).to(tl.float32) * weight
            new = ()
            for k in tl.static_range(2 * l + 1):
                d = tl.load(D + (K + m) * (2 * l + 1) + k, mask=real, other=0.0)
                new = new + (acc[k] + d[:, None] * v,)
            acc = new
            if m > 0:
                v = (
                    tl.load(value + row_of(l, -m, L) * VALUE_ROW, mask=mask, other=0.0).to(tl.float32)
                    * weight
                )
                new = ()
                for k in tl.static_range(2 * l + 1):
                    d = tl.load(D + (K - m) * (2 * l + 1) + k, mask=real, other=0.0)
                    new = new + (acc[k] + d[:, None] * v,)
                acc = new
    return acc


@triton.jit
def scatter_kernel(
    values,
    weights,
    wigner,
    ptr,
    source_order,
    source_ptr,
    out,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    KEPT: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [N, S, WIDTH] of one node and a tile of channels.

    Without PAIR the consumer: values [E, R', WIDTH] times weights [E, HEADS], over the node's incoming edges.
    With PAIR the gradient of the producer: values [E, R, 2·WIDTH] times radial weights [E, H, 2·WIDTH], the
    second half of the channels over the incoming, the first over the outgoing edges.
    """
    S: tl.constexpr = (L + 1) * (L + 1)
    node = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < WIDTH
    begin, end = tl.load(ptr + node), tl.load(ptr + node + 1)
    for l in tl.static_range(L + 1):
        acc = ()
        for _ in tl.static_range(2 * l + 1):
            acc = acc + (tl.zeros([BLOCK_E, BLOCK_C], tl.float32),)
        if PAIR:
            H = n_half(L, M)
            W2 = 2 * WIDTH
            acc = add_edges(
                acc, begin, end, None, values, c + WIDTH, weights, c + WIDTH, wigner, c_mask,
                l, L, M, KEPT, W2, W2, H * W2, BLOCK_E,
            )  # fmt: skip
            first, last = tl.load(source_ptr + node), tl.load(source_ptr + node + 1)
            acc = add_edges(
                acc, first, last, source_order, values, c, weights, c, wigner, c_mask,
                l, L, M, KEPT, W2, W2, H * W2, BLOCK_E,
            )  # fmt: skip
        else:
            head = c // (WIDTH // HEADS)
            acc = add_edges(
                acc, begin, end, None, values, c, weights, head, wigner, c_mask,
                l, L, M, KEPT, WIDTH, 0, HEADS, BLOCK_E,
            )  # fmt: skip
        for k in tl.static_range(2 * l + 1):
            total = tl.sum(acc[k], 0)
            if not PAIR:
                total *= lost_order_scale(l, M)
            at = out + node * (S * WIDTH) + (l * l + k) * WIDTH + c
            tl.store(at, total.to(out.dtype.element_ty), mask=c_mask)


@triton.jit(do_not_specialize=SIZES)
def value_grad_kernel(
    grad,
    values,
    alpha,
    wigner,
    target,
    grad_values,
    grad_alpha,
    n_edges,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Gradients of the consumer for a tile of edges and BLOCK_H heads (HEAD channels each, a power of two):
    to the values [E, R', WIDTH] and to alpha [E, HEADS], from the one of the sums [N, S, WIDTH]."""
    S: tl.constexpr = (L + 1) * (L + 1)
    V: tl.constexpr = WIDTH // HEADS
    BLOCK_C: tl.constexpr = BLOCK_H * HEAD
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = edge < n_edges
    lane = tl.arange(0, BLOCK_C)
    head = tl.program_id(1) * BLOCK_H + lane // HEAD
    if HEAD == V:
        c = tl.program_id(1) * BLOCK_C + lane
        c_mask = c < WIDTH
    else:
        c = head * V + lane % HEAD
        c_mask = (head < HEADS) & (lane % HEAD < V)
    mask = real[:, None] & c_mask[None, :]
    wigner += edge * wigner_offset(L + 1, M)
    node = tl.load(target + edge, mask=real, other=0)
    grad_at = grad + node[:, None] * (S * WIDTH) + c[None, :]
    at = edge[:, None] * (n_rows(L, KEPT) * WIDTH) + c[None, :]
    weight = tl.load(alpha + edge[:, None] * HEADS + head[None, :], mask=mask, other=0.0)
    by_channel = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    for l in tl.static_range(L + 1):
        gs = ()
        for k in tl.static_range(2 * l + 1):
            g = tl.load(grad_at + (l * l + k) * WIDTH, mask=mask, other=0.0).to(tl.float32)
            gs = gs + (g * lost_order_scale(l, M),)
        K = highest(l, M)
        block = wigner + wigner_offset(l, M)
        for i in tl.static_range(2 * highest(l, KEPT) + 1):
            row = row_of(l, i - highest(l, KEPT), L) * WIDTH
            g = turned(block + (K + i - highest(l, KEPT)) * (2 * l + 1), gs, real, l)
            by_channel += g * tl.load(values + at + row, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_values + at + row, (g * weight).to(grad_values.dtype.element_ty), mask=mask)
    by_head = tl.sum(tl.reshape(by_channel, [BLOCK_E, BLOCK_H, HEAD]), 2)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = real[:, None] & (heads < HEADS)[None, :]
    tl.store(grad_alpha + edge[:, None] * HEADS + heads[None, :], by_head, mask=mask)


def gather_rotate_nodes(a: EdgeAttention, weights: Tensor, grad_rows: Tensor) -> Tensor:
    """The gradient of the producer to the nodes [N, S, C]."""
    channels = a.x.shape[2]
    grad = torch.empty_like(a.x)
    t = tile("scatter", BLOCK_C=channels)
    launch(
        scatter_kernel,
        (len(grad), cells(channels, t["BLOCK_C"])),
        grad_rows, weights, a.wigner, a.graph.ptr, a.graph.source_order, a.graph.source_ptr, grad,
        WIDTH=channels, HEADS=1, L=a.lmax, M=a.mmax, KEPT=a.mmax, PAIR=True, **t,
    )  # fmt: skip
    return grad


def rotate_back_sum_forward(
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, n_nodes: int, lmax: int, mmax: int
) -> Tensor:
    width = values.shape[2]
    out = values.new_empty(n_nodes, (lmax + 1) ** 2, width)
    t = tile("scatter", BLOCK_C=width)
    launch(
        scatter_kernel,
        (n_nodes, cells(width, t["BLOCK_C"])),
        values, alpha, wigner, graph.ptr, None, None, out,
        WIDTH=width, HEADS=alpha.shape[1], L=lmax, M=mmax, KEPT=orders(values, lmax, mmax), PAIR=False, **t,
    )  # fmt: skip
    return out


def orders(values: Tensor, lmax: int, mmax: int) -> int:
    """The largest order in values [E, R', V]."""
    return 0 if values.shape[1] == lmax + 1 else mmax


def rotate_back_sum_backward(
    grad: Tensor, values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, lmax: int, mmax: int
) -> tuple[Tensor, Tensor]:
    n_edges, width, heads = len(values), values.shape[2], alpha.shape[1]
    grad_values, grad_alpha = torch.empty_like(values), torch.empty_like(alpha)
    head = power_of_two(width // heads)
    t: dict[str, Any] = tile("value_grad")
    t["BLOCK_H"] = min(power_of_two(heads), max(1, t.pop("BLOCK_C") // head))
    launch(
        value_grad_kernel,
        (cells(n_edges, t["BLOCK_E"]), cells(heads, t["BLOCK_H"])),
        grad, values, alpha, wigner, graph.target, grad_values, grad_alpha, n_edges,
        WIDTH=width, HEADS=heads, L=lmax, M=mmax, KEPT=orders(values, lmax, mmax), HEAD=head, **t,
    )  # fmt: skip
    return grad_values, grad_alpha
