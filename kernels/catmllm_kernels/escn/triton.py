"""The edge path in Triton: seven kernels around plain matrix products. Layouts: layout.py, meaning: reference.py.

Forward    gather_rotate   producer: gather both ends, rotate, cut to |m| <= mmax, radial scale, pack by m
           product         first SO(2) product with the activation as its epilogue
           softmax         LayerNorm, SmoothLeakyReLU, dot, softmax over the edges of a target
           scatter         consumer: attention weight, rotate back, sum over a target's edges in their order
Backward   value_grad      of the consumer, to values and attention
           activation_grad
           softmax_grad
           gather_rotate   again, for the rows and the gradient of the radial weights in one pass over the nodes
           scatter         again, over the edges at both ends of a node

What has no epilogue worth fusing (the second product, the attention's scalars, gradients of weights and rows, the last radial
layer) is torch's own product. Nothing is added by atomics: sums run in the order of the graph, so equal inputs
give equal bits. Arithmetic outside the products is float32 (the softmax of float32 inputs float64).

Rows of an edge are tuples of tiles that are indexed at compile time, so that a block-diagonal rotation or a Legendre
transform is a few multiplications in registers, and no zero is ever multiplied.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.escn import layout
from catmllm_kernels.escn.layout import EdgeAttention, EdgeGraph
from catmllm_kernels.escn.reference import real_form
from catmllm_kernels.launch import launch

n_rows = triton.constexpr_function(layout.n_rows)
n_half = triton.constexpr_function(layout.n_half)
first_row = triton.constexpr_function(layout.first_row)
wigner_offset = triton.constexpr_function(layout.wigner_offset)
lost_order_scale = triton.constexpr_function(layout.lost_order_scale)


@triton.constexpr_function
def highest(l: int, mmax: int) -> int:
    """The largest order of degree l that is kept."""
    return min(l, mmax)


@triton.constexpr_function
def row_of(l: int, m: int, lmax: int) -> int:
    """Row (l, m) of an edge, m of either sign."""
    k = abs(m)
    return first_row(lmax, k) + (lmax + 1 - k if m < 0 else 0) + l - k


@triton.constexpr_function
def half_of(l: int, m: int, lmax: int) -> int:
    """Row (l, |m|) of the radial weights."""
    k = abs(m)
    return (n_half(lmax, k - 1) if k else 0) + l - k


@triton.constexpr_function
def wave_order(i: int) -> int:
    """The order m of column i of `Sphere.lon`."""
    return (i + 1) // 2 if i % 2 else -(i // 2)


@triton.constexpr_function
def abs_order(i: int) -> int:
    return (i + 1) // 2


@triton.constexpr_function
def at_least(a: int, b: int) -> int:
    return max(a, b)


@triton.constexpr_function
def wave_of(k: int, negative: int) -> int:
    """The column of order +k or -k."""
    return 2 * k - 1 + negative if k else 0


@triton.constexpr_function
def weight_offset(m: int, lmax: int, c_in: int, c_out: int, extra: int) -> int:
    """Where the matrix of order m begins in `packed_weights`."""
    if m == 0:
        return 0
    first = (lmax + 1) * c_in * (extra + (lmax + 1) * c_out)
    return first + sum(2 * (lmax + 1 - k) ** 2 * c_in * c_out for k in range(1, m))


# ------------------------------------------------------------------------------------------ producer


@triton.jit
def turned(wigner, xs, mask, l: tl.constexpr):
    """One row of a rotated block: Σ_k D[k]·x[k], xs the 2l+1 rows of degree l."""
    out = tl.load(wigner, mask=mask, other=0.0)[:, None] * xs[0]
    for k in tl.static_range(1, 2 * l + 1):
        out += tl.load(wigner + k, mask=mask, other=0.0)[:, None] * xs[k]
    return out


@triton.jit
def gather_rotate_kernel(
    x,
    weights,
    wigner,
    source,
    target,
    grad_rows,
    rows,
    grad_weights,
    n_edges,
    C: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """rows [E, R, 2C] of a tile of edges and channels; with GRAD also the gradient of the radial weights."""
    S: tl.constexpr = (L + 1) * (L + 1)
    R: tl.constexpr = n_rows(L, M)
    H: tl.constexpr = n_half(L, M)
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = edge < n_edges
    mask = real[:, None] & (c < C)[None, :]
    wigner += edge * wigner_offset(L + 1, M)
    row_at = edge[:, None] * (R * 2 * C) + c[None, :]
    weight_at = edge[:, None] * (H * 2 * C) + c[None, :]
    for end in tl.static_range(2):
        node = tl.load((target if end else source) + edge, mask=real, other=0)
        x_at = node[:, None] * (S * C) + c[None, :]
        for l in tl.static_range(L + 1):
            xs = ()
            for k in tl.static_range(2 * l + 1):
                xs = xs + (tl.load(x + x_at + (l * l + k) * C, mask=mask, other=0.0).to(tl.float32),)
            K = highest(l, M)
            block = wigner + wigner_offset(l, M)
            for m in tl.static_range(highest(l, M) + 1):
                at = half_of(l, m, L) * 2 * C + end * C
                plus = row_of(l, m, L) * 2 * C + end * C
                weight = tl.load(weights + weight_at + at, mask=mask, other=0.0).to(tl.float32)
                z = turned(block + (K + m) * (2 * l + 1), xs, real, l)
                tl.store(rows + row_at + plus, (z * weight).to(rows.dtype.element_ty), mask=mask)
                if GRAD:
                    grad = z * tl.load(grad_rows + row_at + plus, mask=mask, other=0.0).to(tl.float32)
                if m > 0:
                    minus = row_of(l, -m, L) * 2 * C + end * C
                    z = turned(block + (K - m) * (2 * l + 1), xs, real, l)
                    tl.store(rows + row_at + minus, (z * weight).to(rows.dtype.element_ty), mask=mask)
                    if GRAD:
                        grad += z * tl.load(grad_rows + row_at + minus, mask=mask, other=0.0).to(tl.float32)
                if GRAD:
                    out = grad.to(grad_weights.dtype.element_ty)
                    tl.store(grad_weights + weight_at + at, out, mask=mask)


# ------------------------------------------------------------------------------------------ consumer


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

    `values_at` and `weights_at` are the columns of a tile's channels. A weight per row m >= 0 (WEIGHT_ROW channels
    apart) or, with WEIGHT_ROW 0, one for all.
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

    Without PAIR the consumer: values [E, R', WIDTH] times weights [E, HEADS], over the node's incoming edges. With PAIR the
    gradient of the producer: values [E, R, 2·WIDTH] times radial weights [E, H, 2·WIDTH], the second half of the channels
    over the incoming, the first over the outgoing edges.
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


@triton.jit
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
    """Gradients of the consumer for a tile of edges and BLOCK_H heads (HEAD channels each, a power of two): to the values
    [E, R', WIDTH] and to alpha [E, HEADS], from the one of the sums [N, S, WIDTH]."""
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


# ------------------------------------------------------------------------------------------ activation


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def legendre(ys, table, m: tl.constexpr, l: tl.constexpr, L: tl.constexpr):
    return tl.load(table + half_of(l, m, L)) * ys[row_of(l, m, L)]


@triton.jit
def latitude(ys, table, L: tl.constexpr, M: tl.constexpr, FROM: tl.constexpr):
    """Rows -> 2M+1 waves at one latitude: Σ_l table[l, |m|]·y[l, m], degrees from FROM on."""
    waves = ()
    for i in tl.static_range(2 * M + 1):
        wave = legendre(ys, table, wave_order(i), at_least(abs_order(i), FROM), L)
        for l in tl.static_range(at_least(abs_order(i), FROM) + 1, L + 1):
            wave += legendre(ys, table, wave_order(i), l, L)
        waves = waves + (wave,)
    return waves


@triton.jit
def add_latitude(out, waves, table, L: tl.constexpr, M: tl.constexpr):
    """The transpose: out[l, m] + table[l, |m|]·waves[m]."""
    new = ()
    for k in tl.static_range(M + 1):
        for sign in tl.static_range(2 if k else 1):
            for l in tl.static_range(k, L + 1):
                scale = tl.load(table + half_of(l, k, L))
                new = new + (out[row_of(l, -k if sign else k, L)] + scale * waves[wave_of(k, sign)],)
    return new


@triton.jit
def point(waves, lon, M: tl.constexpr):
    """The value at one longitude."""
    g = waves[0]
    for i in tl.static_range(1, 2 * M + 1):
        g += tl.load(lon + i) * waves[i]
    return g


@triton.jit
def add_point(waves, g, lon, M: tl.constexpr):
    """The transpose."""
    new = (waves[0] + g,)
    for i in tl.static_range(1, 2 * M + 1):
        new = new + (waves[i] + tl.load(lon + i) * g,)
    return new


@triton.jit
def zero_tiles(N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros([BLOCK_E, BLOCK_C], tl.float32),)
    return tiles


@triton.jit
def activate(
    gates, hidden, active, to_lat, from_lat, lon, mask, HIDDEN: tl.constexpr, L: tl.constexpr, M: tl.constexpr,
    SPHERE: tl.constexpr, LAT: tl.constexpr, LON: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The activation of one tile; gates, hidden and active point to its first rows.

    On the sphere in two stages: to latitudes by sums over l, to longitudes by sums over m, and both back.
    """
    if SPHERE:
        gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
        tl.store(active, (gate * sigmoid(gate)).to(active.dtype.element_ty), mask=mask)
        ys = ()
        for i in tl.static_range(n_rows(L, M)):
            ys = ys + (tl.load(hidden + i * HIDDEN, mask=mask, other=0.0).to(tl.float32),)
        zs = zero_tiles(n_rows(L, M), BLOCK_E, BLOCK_C)
        for b in range(LAT):
            waves = latitude(ys, to_lat + b * n_half(L, M), L, M, 0)
            back = zero_tiles(2 * M + 1, BLOCK_E, BLOCK_C)
            for p in range(LON):
                g = point(waves, lon + p * (2 * M + 1), M)
                back = add_point(back, g * sigmoid(g), lon + p * (2 * M + 1), M)
            zs = add_latitude(zs, back, from_lat + b * n_half(L, M), L, M)
        for i in tl.static_range(1, n_rows(L, M)):
            tl.store(active + i * HIDDEN, zs[i].to(active.dtype.element_ty), mask=mask)
    else:
        for l in tl.static_range(L + 1):
            gate = tl.load(gates + (l - 1) * HIDDEN if l else hidden, mask=mask, other=0.0).to(tl.float32)
            gate = sigmoid(gate)
            for j in tl.static_range(2 * highest(l, M) + 1):
                row = row_of(l, j - highest(l, M), L) * HIDDEN
                z = tl.load(hidden + row, mask=mask, other=0.0).to(tl.float32) * gate
                tl.store(active + row, z.to(active.dtype.element_ty), mask=mask)


@triton.jit
def activation_kernel(
    gates,
    hidden,
    active,
    to_lat,
    from_lat,
    lon,
    n_edges,
    gates_edge,
    HIDDEN: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    SPHERE: tl.constexpr,
    LAT: tl.constexpr,
    LON: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The activation alone, behind a product that is not ours."""
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = edge[:, None] * (n_rows(L, M) * HIDDEN) + c[None, :]
    activate(
        gates + edge[:, None] * gates_edge + c[None, :], hidden + at, active + at, to_lat, from_lat, lon,
        (edge < n_edges)[:, None] & (c < HIDDEN)[None, :], HIDDEN, L, M, SPHERE, LAT, LON, BLOCK_E, BLOCK_C,
    )  # fmt: skip


@triton.jit
def load_tile(at, rows, columns, EVEN: tl.constexpr):
    """A tile for a product; EVEN: all columns are real. Masks that are always true cost registers."""
    if EVEN:
        return tl.load(at, mask=rows, other=0.0)
    return tl.load(at, mask=rows & columns, other=0.0)


@triton.jit
def load_weights(at, rows, columns, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=rows & columns, other=0.0)


@triton.jit
def product_kernel(
    rows,
    weights,
    bias,
    to_lat,
    from_lat,
    lon,
    gates,
    hidden,
    active,
    n_edges,
    gates_edge,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    SPHERE: tl.constexpr,
    LAT: tl.constexpr,
    LON: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
):
    """First SO(2) product of a tile of edges and hidden channels, all rows of it, then their activation STEP edges at a time.

    rows [E, R, C]; weights: one matrix after the other, the gates' outputs before those of m = 0; gates [E, .] with row stride
    gates_edge; hidden and active [E, R, HIDDEN]. The activation reads its tile back: in the layout of the product, four
    values a thread, input and output of all rows would not fit the registers (255 and 1200 bytes spilled at L4 M2, 8 KiB at L6 M3).
    """
    EVEN: tl.constexpr = C % BLOCK_K == 0 and HIDDEN % BLOCK_C == 0
    R: tl.constexpr = n_rows(L, M)
    G: tl.constexpr = 1 if SPHERE else L
    N0: tl.constexpr = L + 1
    edge = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real, c_mask = edge < n_edges, c < HIDDEN
    mask = real[:, None] & c_mask[None, :]
    row_at = rows + edge[:, None] * (R * C)
    hidden_at = hidden + edge[:, None] * (R * HIDDEN) + c[None, :]
    k = tl.arange(0, BLOCK_K)

    sums = ()
    for i in tl.static_range(G + N0):
        b = tl.load(bias + i * HIDDEN + c, mask=c_mask, other=0.0).to(tl.float32)
        sums = sums + (tl.zeros([BLOCK_E, BLOCK_C], tl.float32) + b[None, :],)
    W0: tl.constexpr = N0 * C
    for first in range(0, W0, BLOCK_K):
        k_mask = first + k < W0
        a = load_tile(row_at + (first + k)[None, :], real[:, None], k_mask[None, :], EVEN)
        w_at = weights + c[None, :] * W0 + (first + k)[:, None]
        new = ()
        for i in tl.static_range(G + N0):
            w = load_weights(w_at + i * HIDDEN * W0, k_mask[:, None], c_mask[None, :], EVEN)
            new = new + (tl.dot(a, w, sums[i]),)
        sums = new
    for i in tl.static_range(G):
        out = gates + edge[:, None] * gates_edge + (i * HIDDEN + c)[None, :]
        tl.store(out, sums[i].to(gates.dtype.element_ty), mask=mask)
    for i in tl.static_range(N0):
        tl.store(hidden_at + i * HIDDEN, sums[G + i].to(hidden.dtype.element_ty), mask=mask)

    for m in tl.static_range(1, M + 1):
        W = (L + 1 - m) * C
        start = first_row(L, m) * C
        at = weight_offset(m, L, C, HIDDEN, G * HIDDEN)
        plus = zero_tiles(L + 1 - m, BLOCK_E, BLOCK_C)
        minus = zero_tiles(L + 1 - m, BLOCK_E, BLOCK_C)
        for first in range(0, W, BLOCK_K):
            k_mask = first + k < W
            x_plus = load_tile(row_at + (start + first + k)[None, :], real[:, None], k_mask[None, :], EVEN)
            x_minus = load_tile(
                row_at + (start + W + first + k)[None, :], real[:, None], k_mask[None, :], EVEN
            )
            w_at = weights + at + c[None, :] * W + (first + k)[:, None]
            new_plus = ()
            new_minus = ()
            for i in tl.static_range(L + 1 - m):
                s_at = w_at + (L + 1 - m + i) * HIDDEN * W
                r = load_weights(w_at + i * HIDDEN * W, k_mask[:, None], c_mask[None, :], EVEN)
                s = load_weights(s_at, k_mask[:, None], c_mask[None, :], EVEN)
                p = tl.dot(x_plus, r, plus[i])
                new_plus = new_plus + (tl.dot(-x_minus, s, p),)
                q = tl.dot(x_minus, r, minus[i])
                new_minus = new_minus + (tl.dot(x_plus, s, q),)
            plus = new_plus
            minus = new_minus
        for i in tl.static_range(L + 1 - m):
            out = hidden_at + (first_row(L, m) + i) * HIDDEN
            tl.store(out, plus[i].to(hidden.dtype.element_ty), mask=mask)
            tl.store(out + (L + 1 - m) * HIDDEN, minus[i].to(hidden.dtype.element_ty), mask=mask)

    tl.debug_barrier()  # what follows was written by other threads of this program
    for step in range(0, tl.minimum(BLOCK_E, n_edges - tl.program_id(1) * BLOCK_E), STEP):
        few = tl.program_id(1).to(tl.int64) * BLOCK_E + step + tl.arange(0, STEP)
        tile_at = few[:, None] * (R * HIDDEN) + c[None, :]
        activate(
            gates + few[:, None] * gates_edge + c[None, :], hidden + tile_at, active + tile_at, to_lat, from_lat, lon,
            (few < n_edges)[:, None] & c_mask[None, :], HIDDEN, L, M, SPHERE, LAT, LON, STEP, BLOCK_C,
        )  # fmt: skip


@triton.jit
def activation_grad_kernel(
    gates,
    hidden,
    grad_active,
    to_lat,
    from_lat,
    lon,
    grad_gates,
    grad_hidden,
    n_edges,
    gates_edge,
    grad_edge,
    HIDDEN: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    SPHERE: tl.constexpr,
    LAT: tl.constexpr,
    LON: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the activation to its rows and gates, which lie side by side with row stride grad_edge."""
    R: tl.constexpr = n_rows(L, M)
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (edge < n_edges)[:, None] & (c < HIDDEN)[None, :]
    at = edge[:, None] * (R * HIDDEN) + c[None, :]
    gate_at = edge[:, None] * gates_edge + c[None, :]
    out_at = edge[:, None] * grad_edge + c[None, :]
    if SPHERE:
        ys = ()
        dz = ()
        for i in tl.static_range(R):
            ys = ys + (tl.load(hidden + at + i * HIDDEN, mask=mask, other=0.0).to(tl.float32),)
            dz = dz + (tl.load(grad_active + at + i * HIDDEN, mask=mask, other=0.0).to(tl.float32),)
        gate = tl.load(gates + gate_at, mask=mask, other=0.0).to(tl.float32)
        s = sigmoid(gate)
        dgate = dz[0] * s * (1 + gate * (1 - s))
        tl.store(grad_gates + out_at, dgate.to(grad_gates.dtype.element_ty), mask=mask)
        dy = zero_tiles(R, BLOCK_E, BLOCK_C)
        for b in range(LAT):
            waves = latitude(ys, to_lat + b * n_half(L, M), L, M, 0)
            dback = latitude(dz, from_lat + b * n_half(L, M), L, M, 1)  # l = 0 does not come from the sphere
            dwaves = zero_tiles(2 * M + 1, BLOCK_E, BLOCK_C)
            for p in range(LON):
                g = point(waves, lon + p * (2 * M + 1), M)
                s = sigmoid(g)
                dg = point(dback, lon + p * (2 * M + 1), M) * s * (1 + g * (1 - s))
                dwaves = add_point(dwaves, dg, lon + p * (2 * M + 1), M)
            dy = add_latitude(dy, dwaves, to_lat + b * n_half(L, M), L, M)
        for i in tl.static_range(R):
            tl.store(grad_hidden + out_at + i * HIDDEN, dy[i].to(grad_hidden.dtype.element_ty), mask=mask)
    else:
        for l in tl.static_range(L + 1):
            if l:
                gate = tl.load(gates + gate_at + (l - 1) * HIDDEN, mask=mask, other=0.0).to(tl.float32)
            else:
                gate = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
            s = sigmoid(gate)
            total = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
            for j in tl.static_range(2 * highest(l, M) + 1):
                row = row_of(l, j - highest(l, M), L) * HIDDEN
                y = tl.load(hidden + at + row, mask=mask, other=0.0).to(tl.float32)
                d = tl.load(grad_active + at + row, mask=mask, other=0.0).to(tl.float32)
                total += y * d
                if l:
                    tl.store(grad_hidden + out_at + row, (d * s).to(grad_hidden.dtype.element_ty), mask=mask)
                else:
                    dy = d * s * (1 + y * (1 - s))
                    tl.store(grad_hidden + out_at, dy.to(grad_hidden.dtype.element_ty), mask=mask)
            if l:
                out = (total * s * (1 - s)).to(grad_gates.dtype.element_ty)
                tl.store(grad_gates + out_at + (l - 1) * HIDDEN, out, mask=mask)


# ------------------------------------------------------------------------------------------ attention


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

    Here and in the gradient float32 is calculated in float64: the gradient of the norm's bias cancels to a tenth of its terms.
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


@triton.jit
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

    Programs take nodes in turn; partial [programs, HEADS, 3, A] (dot, norm weight, norm bias) is summed afterwards.
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


# ------------------------------------------------------------------------------------------ tiles

# Candidates of every kernel, each compiled and checked by `aot`; the first is used. Chosen by the compiler's resource
# report for sm_80 (no spill, most threads resident), not by a clock: bench/gpu.py --tune times them all.
TILES: dict[str, list[dict[str, int]]] = {
    "gather_rotate": [{"BLOCK_E": 8, "BLOCK_C": 128, "num_warps": 4}],
    "scatter": [{"BLOCK_E": 8, "BLOCK_C": 128, "num_warps": 4}],
    "value_grad": [{"BLOCK_E": 8, "BLOCK_C": 128, "num_warps": 4}],
    "product": [
        {"BLOCK_E": 128, "BLOCK_C": 16, "BLOCK_K": 32, "STEP": 16, "num_warps": 8, "num_stages": 3},
        {"BLOCK_E": 64, "BLOCK_C": 16, "BLOCK_K": 64, "STEP": 8, "num_warps": 4, "num_stages": 3},
    ],
    "activation": [{"BLOCK_E": 4, "BLOCK_C": 64, "num_warps": 4}],
    "activation_grad": [{"BLOCK_E": 2, "BLOCK_C": 64, "num_warps": 4}],
    "softmax": [{"BLOCK_E": 16, "num_warps": 4}],
    "softmax_grad": [{"BLOCK_E": 16, "num_warps": 2}],
}
FUSED = (torch.float16, torch.bfloat16)  # dtypes of the product with activation
PROGRAMS = 128  # of softmax_grad; a constant, so that sums do not depend on the device


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile(name: str, **limits: int) -> dict[str, int]:
    """The options of a kernel, blocks no larger than `limits` (rounded up to powers of two)."""
    options = dict(TILES[name][0])
    for key, limit in limits.items():
        if key in options:
            options[key] = min(options[key], power_of_two(limit))
    return options


def cells(n: int, block: int) -> int:
    return -(-n // block)


# ------------------------------------------------------------------------------------------ steps


def gather_rotate(
    a: EdgeAttention, weights: Tensor, grad_rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows [E, R, 2C]; with their gradient also the one of the radial weights [E, H·2C]."""
    n_edges, channels = len(weights), a.x.shape[2]
    rows = a.x.new_empty(n_edges, layout.n_rows(a.lmax, a.mmax), 2 * channels)
    grad_weights = None if grad_rows is None else torch.empty_like(weights)
    t = tile("gather_rotate", BLOCK_C=channels)
    launch(
        gather_rotate_kernel,
        (cells(n_edges, t["BLOCK_E"]), cells(channels, t["BLOCK_C"])),
        a.x, weights, a.wigner, a.graph.source, a.graph.target, grad_rows, rows, grad_weights, n_edges,
        C=channels, L=a.lmax, M=a.mmax, GRAD=grad_rows is not None, **t,
    )  # fmt: skip
    return rows, grad_weights


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


def product_and_activation(a: EdgeAttention, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(extra [E, heads·A + gates], hidden rows, active rows [E, R·C']).

    One kernel where FUSED; else (float32, whose exact product has no tensor cores) torch's product, then the activation.
    """
    n_edges, channels = len(rows), rows.shape[2]
    n_alpha, n_rows = a.alpha_dot.numel(), rows.shape[1]
    extra = rows.new_empty(n_edges, a.n_extra)
    hidden = rows.new_empty(n_edges, n_rows * a.hidden)
    active = torch.empty_like(hidden)
    tables = [None] * 3 if a.sphere is None else list(a.sphere)
    first = rows.flatten(1)[:, : (a.lmax + 1) * channels]
    if rows.dtype not in FUSED:
        torch.addmm(a.conv1_bias[: a.n_extra], first, a.conv1[0][: a.n_extra].T, out=extra)
        weights = [a.conv1[0][a.n_extra :], *a.conv1[1:]]
        into = hidden.view(n_edges, n_rows, a.hidden)
        product(rows, weights, a.conv1_bias[a.n_extra :], a.lmax, a.mmax, into)
        t = tile("activation", BLOCK_C=a.hidden)
        launch(
            activation_kernel,
            (cells(n_edges, t["BLOCK_E"]), cells(a.hidden, t["BLOCK_C"])),
            extra[:, n_alpha:], hidden, active, *tables, n_edges, a.n_extra,
            HIDDEN=a.hidden, L=a.lmax, M=a.mmax, **grid_of(a), **t,
        )  # fmt: skip
        return extra, hidden, active
    torch.addmm(a.conv1_bias[:n_alpha], first, a.conv1[0][:n_alpha].T, out=extra[:, :n_alpha])
    packed = torch.cat([a.conv1[0][n_alpha:].flatten(), *(w.flatten() for w in a.conv1[1:])])
    t = tile("product")
    launch(
        product_kernel,
        (cells(a.hidden, t["BLOCK_C"]), cells(n_edges, t["BLOCK_E"])),
        rows, packed, a.conv1_bias[n_alpha:], *tables, extra[:, n_alpha:], hidden, active, n_edges, a.n_extra,
        C=channels, HIDDEN=a.hidden, L=a.lmax, M=a.mmax, **grid_of(a), **t,
    )  # fmt: skip
    return extra, hidden, active


def grid_of(a: EdgeAttention) -> dict[str, int]:
    """The constants of the activation."""
    if a.sphere is None:
        return {"SPHERE": False, "LAT": 1, "LON": 1}
    return {"SPHERE": True, "LAT": len(a.sphere.to_lat), "LON": len(a.sphere.lon)}


def activation_grad(
    a: EdgeAttention, extra: Tensor, hidden: Tensor, grad_active: Tensor, out: Tensor
) -> None:
    """Fills `out` [E, n_extra + R·C'] from column heads·A on: gates, then rows."""
    n_edges, n_alpha = len(extra), a.alpha_dot.numel()
    tables = [None] * 3 if a.sphere is None else list(a.sphere)
    t = tile("activation_grad", BLOCK_C=a.hidden)
    launch(
        activation_grad_kernel,
        (cells(n_edges, t["BLOCK_E"]), cells(a.hidden, t["BLOCK_C"])),
        extra[:, n_alpha:], hidden, grad_active, *tables, out[:, n_alpha:], out[:, a.n_extra :],
        n_edges, extra.shape[1], out.shape[1],
        HIDDEN=a.hidden, L=a.lmax, M=a.mmax, **grid_of(a), **t,
    )  # fmt: skip


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


def slices(x: Tensor, lmax: int, mmax: int) -> list[Tensor]:
    """Rows [E, R, C] as one matrix per m, views [E, n_0·C], [E, 2·n_m·C]."""
    widths = [(1 if m == 0 else 2) * (lmax + 1 - m) * x.shape[2] for m in range(mmax + 1)]
    return list(x.view(len(x), sum(widths)).split(widths, dim=1))


def product(
    x: Tensor, weights: list[Tensor], bias: Tensor, lmax: int, mmax: int, out: Tensor | None = None
) -> Tensor:
    """Rows [E, R, C] -> [E, R, C'], no activation."""
    if out is None:
        out = x.new_empty(len(x), x.shape[1], len(bias) // (lmax + 1))
    for m, (into, part) in enumerate(zip(slices(out, lmax, mmax), slices(x, lmax, mmax))):
        if m == 0:
            torch.addmm(bias, part, weights[0].T, out=into)
        else:
            torch.mm(part, real_form(weights[m]).T, out=into)
    return out


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of (r; s) [2·out, in], from the one of rows [E, 2·out] and rows [E, 2·in]."""
    plus, minus = (grad.T @ x).chunk(2)
    rr, rs = plus.chunk(2, dim=1)
    sr, ss = minus.chunk(2, dim=1)
    return torch.cat([rr + ss, sr - rs])


def column_sum(x: Tensor) -> Tensor:
    """Over the edges, in float32."""
    return x.sum(0, dtype=torch.float32).to(x.dtype)


# ------------------------------------------------------------------------------------------ as an implementation


def edge_attention_forward(a: EdgeAttention, save: bool) -> tuple[Tensor, ...]:
    weights = torch.addmm(a.radial_bias, a.radial, a.radial_weight.T)
    rows, _ = gather_rotate(a, weights)
    del weights
    extra, hidden, active = product_and_activation(a, rows)
    del rows
    alpha = attention_weights(a, extra)
    values = product(rows_of(active, a), a.conv2, a.conv2_bias, a.lmax, a.mmax)
    total = rotate_back_sum_forward(
        values, alpha if a.keep is None else alpha * a.keep, a.wigner, a.graph, len(a.x), a.lmax, a.mmax
    )
    return total, extra, hidden, active, alpha


def rows_of(flat: Tensor, a: EdgeAttention) -> Tensor:
    return flat.view(len(flat), layout.n_rows(a.lmax, a.mmax), a.hidden)


def edge_attention_backward(
    grad: Tensor, a: EdgeAttention, extra: Tensor, hidden: Tensor, active: Tensor, alpha: Tensor
) -> list[Tensor]:
    lmax, mmax = a.lmax, a.mmax
    # the consumer and the second product
    z = rows_of(active, a)
    values = product(z, a.conv2, a.conv2_bias, lmax, mmax)
    weighted = alpha if a.keep is None else alpha * a.keep
    grad_values, grad_alpha = rotate_back_sum_backward(grad, values, weighted, a.wigner, a.graph, lmax, mmax)
    del values
    if a.keep is not None:
        grad_alpha *= a.keep
    grad_active = torch.empty_like(z)
    conv2 = []
    parts = zip(slices(grad_values, lmax, mmax), slices(z, lmax, mmax), slices(grad_active, lmax, mmax))
    for m, (g, part, into) in enumerate(parts):
        torch.mm(g, a.conv2[0] if m == 0 else real_form(a.conv2[m]), out=into)
        conv2.append(g.T @ part if m == 0 else weight_grad(g, part))
    conv2_bias = column_sum(slices(grad_values, lmax, mmax)[0])
    del grad_values

    # what comes out of the first product: extra and hidden rows, side by side
    out = extra.new_empty(len(extra), a.n_extra + hidden.shape[1])
    activation_grad(a, extra, hidden, grad_active, out)
    del grad_active
    attention = attention_grad(a, extra, alpha, grad_alpha, out)
    width = (lmax + 1) * a.hidden
    first = out[:, : a.n_extra + width]
    rest = [2 * (lmax + 1 - m) * a.hidden for m in range(1, mmax + 1)]
    grads = [first, *out[:, a.n_extra + width :].split(rest, dim=1)]
    channels = 2 * a.x.shape[2]
    grad_rows = a.x.new_empty(len(extra), layout.n_rows(lmax, mmax), channels)
    for m, (g, into) in enumerate(zip(grads, slices(grad_rows, lmax, mmax))):
        torch.mm(g, a.conv1[0] if m == 0 else real_form(a.conv1[m]), out=into)

    # the producer
    weights = torch.addmm(a.radial_bias, a.radial, a.radial_weight.T)
    rows, grad_weights = gather_rotate(a, weights, grad_rows)
    assert grad_weights is not None
    x = gather_rotate_nodes(a, weights, grad_rows)
    del weights, grad_rows
    conv1 = []
    for m, (g, part) in enumerate(zip(grads, slices(rows, lmax, mmax))):
        conv1.append(g.T @ part if m == 0 else weight_grad(g, part))
    return [
        x,
        grad_weights @ a.radial_weight,
        grad_weights.T @ a.radial,
        column_sum(grad_weights),
        *conv1,
        column_sum(first),
        *attention,
        *conv2,
        conv2_bias,
    ]


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
