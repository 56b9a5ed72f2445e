"""The consumer: attention weight, rotate back, sum over a target's edges in their order; and its gradient.

The same kernel, run over the edges at both ends of a node, is the gradient of the producer.
"""

# mypy: disable-error-code="assignment, misc, var-annotated"
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
    half_at,
    highest,
    lost_order_scale,
    n_half,
    n_rows,
    order_of,
    row_at,
    wigner_offset,
)
from catmllm_kernels.escn.triton.tiles import cells, power_of_two, tile
from catmllm_kernels.launch import SIZES, launch


@triton.jit
def add_edge(
    acc, edge, values, weights, wigner, c_mask, orders, l: tl.constexpr, L: tl.constexpr, M: tl.constexpr,
    KEPT: tl.constexpr, VALUE_ROW: tl.constexpr, WEIGHT_ROW: tl.constexpr, WEIGHT_EDGE: tl.constexpr,
):  # fmt: skip
    """acc + Dᵀ·(weight·value) of degree l of one edge.

    `values` and `weights` are the columns of a tile's channels. A weight per row m >= 0 (WEIGHT_ROW channels
    apart) or, with WEIGHT_ROW 0, one for all.
    """
    D = wigner + edge * wigner_offset(L + 1, M) + wigner_offset(l, M) + highest(l, M) * (2 * l + 1)
    values += edge * (n_rows(L, KEPT) * VALUE_ROW)
    weights += edge * WEIGHT_EDGE
    for i in range(2 * tl.minimum(l, orders) + 1):
        m = order_of(i)
        weight = tl.load(weights + half_at(l, m, L) * WEIGHT_ROW, mask=c_mask, other=0.0).to(tl.float32)
        value = tl.load(values + row_at(l, m, L) * VALUE_ROW, mask=c_mask, other=0.0).to(tl.float32)
        value = value * weight
        new = ()
        for k in tl.static_range(2 * l + 1):
            new = new + (acc[k] + tl.load(D + m * (2 * l + 1) + k) * value,)
        acc = new
    return acc


@triton.jit
def sum_degree(
    values, weights, wigner, source_order, out, c, begin, end, first_out, end_out, orders,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, l: tl.constexpr, L: tl.constexpr, M: tl.constexpr,
    KEPT: tl.constexpr, PAIR: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What `scatter_kernel` does for one degree."""
    W2: tl.constexpr = 2 * WIDTH
    H: tl.constexpr = n_half(L, M)
    c_mask = c < WIDTH
    acc = ()
    for _ in tl.static_range(2 * l + 1):
        acc = acc + (tl.zeros([BLOCK_C], tl.float32),)
    if PAIR:
        for outgoing in range(2):
            column = c + (1 - outgoing) * WIDTH
            last = tl.where(outgoing == 1, end_out, end)
            for slot in range(tl.where(outgoing == 1, first_out, begin), last):
                edge = tl.load(source_order + slot, mask=outgoing == 1, other=slot)
                acc = add_edge(
                    acc, edge, values + column, weights + column, wigner, c_mask, orders,
                    l, L, M, KEPT, W2, W2, H * W2,
                )  # fmt: skip
    else:
        head = c // (WIDTH // HEADS)
        for edge in range(begin, end):
            acc = add_edge(
                acc, edge, values + c, weights + head, wigner, c_mask, orders,
                l, L, M, KEPT, WIDTH, 0, HEADS,
            )  # fmt: skip
    for k in tl.static_range(2 * l + 1):
        total = acc[k]
        if not PAIR:
            total *= lost_order_scale(l, M)
        tl.store(out + (l * l + k) * WIDTH + c, total.to(out.dtype.element_ty), mask=c_mask)


@triton.jit(do_not_specialize=SIZES)
def scatter_kernel(
    values,
    weights,
    wigner,
    ptr,
    source_order,
    source_ptr,
    out,
    orders,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    KEPT: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [N, S, WIDTH] of one node, one degree and a tile of channels.

    Without PAIR the consumer: values [E, R', WIDTH] times weights [E, HEADS], over the node's incoming edges.
    With PAIR the gradient of the producer: values [E, R, 2·WIDTH] times radial weights [E, H, 2·WIDTH], the
    second half of the channels over the incoming, then the first over the outgoing edges.

    One warp that takes the edges one by one, so that no thread needs another's sum: with eight edges over
    four warps the sum of their parts took 75 instructions and five barriers a component, as many instructions
    as the edges themselves where a node has 20.
    """
    S: tl.constexpr = (L + 1) * (L + 1)
    node = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = tl.load(ptr + node), tl.load(ptr + node + 1)
    first_out, end_out = begin, begin
    if PAIR:
        first_out, end_out = tl.load(source_ptr + node), tl.load(source_ptr + node + 1)
    for l in tl.static_range(L + 1):
        if tl.program_id(2) == L - l:  # those with most work first
            sum_degree(
                values, weights, wigner, source_order, out + node * (S * WIDTH), c, begin, end, first_out,
                end_out, orders, WIDTH, HEADS, l, L, M, KEPT, PAIR, BLOCK_C,
            )  # fmt: skip


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
    orders,
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
        block = wigner + wigner_offset(l, M) + highest(l, M) * (2 * l + 1)
        for i in range(2 * tl.minimum(l, orders) + 1):
            m = order_of(i)
            row = row_at(l, m, L) * WIDTH
            g = turned(block + m * (2 * l + 1), gs, real, l)
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
        (len(grad), cells(channels, t["BLOCK_C"]), a.lmax + 1),
        grad_rows, weights, a.wigner, a.graph.ptr, a.graph.source_order, a.graph.source_ptr, grad,
        a.mmax,
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
        (n_nodes, cells(width, t["BLOCK_C"]), lmax + 1),
        values, alpha, wigner, graph.ptr, None, None, out,
        orders(values, lmax, mmax),
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
        orders(values, lmax, mmax),
        WIDTH=width, HEADS=heads, L=lmax, M=mmax, KEPT=orders(values, lmax, mmax), HEAD=head, **t,
    )  # fmt: skip
    return grad_values, grad_alpha
