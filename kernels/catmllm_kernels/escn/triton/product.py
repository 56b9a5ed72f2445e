"""The first SO(2) product with the activation as its epilogue,
and torch's own products for what has none worth fusing."""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.escn.layout import EdgeAttention
from catmllm_kernels.escn.triton.activation import activate, activation_kernel, grid_of, latitudes
from catmllm_kernels.escn.triton.indices import blocks_of, first_row, n_rows, weight_offset
from catmllm_kernels.escn.triton.tiles import cells, power_of_two, tile
from catmllm_kernels.launch import SIZES, launch

FUSED = (torch.float16, torch.bfloat16)  # dtypes of the product with activation


@triton.jit
def load_masked(at, first, second, MASK_FIRST: tl.constexpr, MASK_SECOND: tl.constexpr):
    """A tile for a product. Masks that are always true would cost registers."""
    if MASK_FIRST and MASK_SECOND:
        return tl.load(at, mask=first & second, other=0.0)
    if MASK_FIRST:
        return tl.load(at, mask=first, other=0.0)
    if MASK_SECOND:
        return tl.load(at, mask=second, other=0.0)
    return tl.load(at)


@triton.jit
def multiply_order(
    rows, weights, hidden, real, c0, C: tl.constexpr, HIDDEN: tl.constexpr, L: tl.constexpr, m: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The complex product of one order m > 0; rows and hidden point to a tile's edges [BLOCK_E, 1]."""
    N: tl.constexpr = L + 1 - m
    W: tl.constexpr = N * C
    BLOCKS: tl.constexpr = blocks_of(N)
    SOME: tl.constexpr = BLOCKS != N or HIDDEN % BLOCK_C != 0
    TAIL: tl.constexpr = C % BLOCK_K != 0
    k = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCKS * BLOCK_C)
    c = c0 + j % BLOCK_C
    column = j // BLOCK_C * HIDDEN + c
    c_mask = (c < HIDDEN) & (j < N * BLOCK_C)
    plus = tl.zeros([BLOCK_E, BLOCKS * BLOCK_C], tl.float32)
    minus = tl.zeros([BLOCK_E, BLOCKS * BLOCK_C], tl.float32)
    rows += first_row(L, m) * C
    r_at = weights + column[None, :] * W + k[:, None]
    s_at = r_at + N * HIDDEN * W
    for first in range(0, W, BLOCK_K):
        k_mask = first + k < W
        at = rows + (first + k)[None, :]
        x_plus = load_masked(at, real[:, None], k_mask[None, :], True, TAIL)
        x_minus = load_masked(at + W, real[:, None], k_mask[None, :], True, TAIL)
        r = load_masked(r_at + first, c_mask[None, :], k_mask[:, None], SOME, TAIL)
        s = load_masked(s_at + first, c_mask[None, :], k_mask[:, None], SOME, TAIL)
        plus = tl.dot(x_plus, r, plus)
        minus = tl.dot(x_minus, r, minus)
        plus = tl.dot(-x_minus, s, plus)
        minus = tl.dot(x_plus, s, minus)
    out = hidden + (first_row(L, m) * HIDDEN + column)[None, :]
    mask = real[:, None] & c_mask[None, :]
    tl.store(out, plus.to(hidden.dtype.element_ty), mask=mask)
    tl.store(out + N * HIDDEN, minus.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    rows,
    weights,
    bias,
    to_lat,
    from_lat,
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
    """First SO(2) product of a tile of edges and hidden channels, all rows of it,
    then their activation STEP edges at a time. A hot loop: one kernel.

    rows [E, R, C]; weights: one matrix after the other, the gates' outputs before those of m = 0; gates [E,
    .] with row stride gates_edge; hidden and active [E, R, HIDDEN]. The channels of all rows of an order lie
    side by side in one tile of at least 64 columns, a power of two: tensor cores are fed by the width of a
    product, Hopper's run at most half as fast on 16 columns. The activation reads its tile back: in
    the layout of the product, four values a thread, input and output of all rows would not fit the registers
    (255 and 1200 bytes spilled at L4 M2, 8 KiB at L6 M3).
    """
    TAIL: tl.constexpr = C % BLOCK_K != 0  # whether the last step of a product is a part of one
    R: tl.constexpr = n_rows(L, M)
    G: tl.constexpr = 1 if SPHERE else L
    N0: tl.constexpr = L + 1
    edge = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    c0 = tl.program_id(0) * BLOCK_C
    real = edge < n_edges
    row_at = rows + edge[:, None] * (R * C)
    hidden_at = hidden + edge[:, None] * (R * HIDDEN)
    k = tl.arange(0, BLOCK_K)

    W0: tl.constexpr = N0 * C
    BLOCKS: tl.constexpr = blocks_of(G + N0)
    SOME: tl.constexpr = BLOCKS != G + N0 or HIDDEN % BLOCK_C != 0  # whether some columns are not real
    j = tl.arange(0, BLOCKS * BLOCK_C)
    c = c0 + j % BLOCK_C
    column = j // BLOCK_C * HIDDEN + c
    c_mask = (c < HIDDEN) & (j < (G + N0) * BLOCK_C)
    sums = tl.zeros([BLOCK_E, BLOCKS * BLOCK_C], tl.float32)
    sums += tl.load(bias + column, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    w_at = weights + column[None, :] * W0 + k[:, None]
    for first in range(0, W0, BLOCK_K):
        k_mask = first + k < W0
        a = load_masked(row_at + (first + k)[None, :], real[:, None], k_mask[None, :], True, TAIL)
        w = load_masked(w_at + first, c_mask[None, :], k_mask[:, None], SOME, TAIL)
        sums = tl.dot(a, w, sums)
    of_gates = (j < G * BLOCK_C) & c_mask
    out = gates + edge[:, None] * gates_edge + column[None, :]
    tl.store(out, sums.to(gates.dtype.element_ty), mask=real[:, None] & of_gates[None, :])
    of_rows = (j >= G * BLOCK_C) & c_mask
    out = hidden_at + (column - G * HIDDEN)[None, :]
    tl.store(out, sums.to(hidden.dtype.element_ty), mask=real[:, None] & of_rows[None, :])

    for m in tl.static_range(1, M + 1):
        multiply_order(
            row_at, weights + weight_offset(m, L, C, HIDDEN, G * HIDDEN), hidden_at, real, c0,
            C, HIDDEN, L, m, BLOCK_E, BLOCK_C, BLOCK_K,
        )  # fmt: skip

    tl.debug_barrier()  # what follows was written by other threads of this program
    c = c0 + tl.arange(0, BLOCK_C)
    for step in range(0, tl.minimum(BLOCK_E, n_edges - tl.program_id(1) * BLOCK_E), STEP):
        few = tl.program_id(1).to(tl.int64) * BLOCK_E + step + tl.arange(0, STEP)
        tile_at = few[:, None] * (R * HIDDEN) + c[None, :]
        activate(
            gates + few[:, None] * gates_edge + c[None, :], hidden + tile_at, active + tile_at, to_lat,
            from_lat, (few < n_edges)[:, None] & (c < HIDDEN)[None, :], HIDDEN, L, M, SPHERE, LAT, LON, STEP,
            BLOCK_C,
        )  # fmt: skip


def product_and_activation(a: EdgeAttention, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(extra [E, heads·A + gates], hidden rows, active rows [E, R·C']).

    One kernel where FUSED; else (float32, whose exact product has no tensor cores) torch's product,
    then the activation.
    """
    n_edges, channels = len(rows), rows.shape[2]
    n_alpha, n_rows = a.alpha_dot.numel(), rows.shape[1]
    extra = rows.new_empty(n_edges, a.n_extra)
    hidden = rows.new_empty(n_edges, n_rows * a.hidden)
    active = torch.empty_like(hidden)
    first = rows.flatten(1)[:, : (a.lmax + 1) * channels]
    if rows.dtype not in FUSED:
        torch.addmm(a.conv1_bias[: a.n_extra], first, a.conv1[0][: a.n_extra].T, out=extra)
        weights = real_forms([a.conv1[0][a.n_extra :], *a.conv1[1:]])
        into = hidden.view(n_edges, n_rows, a.hidden)
        product(rows, weights, a.conv1_bias[a.n_extra :], a.lmax, a.mmax, into)
        t = tile("activation", BLOCK_C=a.hidden)
        launch(
            activation_kernel,
            (cells(n_edges, t["BLOCK_E"]), cells(a.hidden, t["BLOCK_C"])),
            extra[:, n_alpha:], hidden, active, *latitudes(a), n_edges, a.n_extra,
            HIDDEN=a.hidden, L=a.lmax, M=a.mmax, **grid_of(a), **t,
        )  # fmt: skip
        return extra, hidden, active
    torch.addmm(a.conv1_bias[:n_alpha], first, a.conv1[0][:n_alpha].T, out=extra[:, :n_alpha])
    packed = torch.cat([a.conv1[0][n_alpha:].flatten(), *(w.flatten() for w in a.conv1[1:])])
    t = tile("product", BLOCK_E=512 // power_of_two(a.lmax))  # the accumulators of m = 1 are the largest
    launch(
        product_kernel,
        (cells(a.hidden, t["BLOCK_C"]), cells(n_edges, t["BLOCK_E"])),
        rows, packed, a.conv1_bias[n_alpha:], *latitudes(a), extra[:, n_alpha:], hidden, active, n_edges,
        a.n_extra, C=channels, HIDDEN=a.hidden, L=a.lmax, M=a.mmax, **grid_of(a), **t,
    )  # fmt: skip
    return extra, hidden, active


@triton.jit
def real_form_kernel(weight, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A part of one row of [[r, -s], [s, r]] from (r; s), both of ROWS rows."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    left = c < COLUMNS
    other = tl.where(row < ROWS, row + ROWS, row - ROWS)
    at = tl.where(left, row * COLUMNS + c, other * COLUMNS + c - COLUMNS)
    value = tl.load(weight + at, mask=c < 2 * COLUMNS, other=0.0).to(tl.float32)
    value = tl.where(left | (row >= ROWS), value, -value)
    tl.store(out + row * (2 * COLUMNS) + c, value.to(out.dtype.element_ty), mask=c < 2 * COLUMNS)


def real_forms(weights: list[Tensor]) -> list[Tensor]:
    """The matrix of m = 0 as it is, the others as real ones, by one launch each where torch's operators take
    four. Nothing is kept of them: FSDP2 gathers new values into the same tensors without a new version, so
    that a cache could not tell an optimizer's step."""
    forms = [weights[0]]
    for w in weights[1:]:
        rows, columns = len(w) // 2, w.shape[1]
        forms.append(w.new_empty(2 * rows, 2 * columns))
        t = tile("real_form", BLOCK=2 * columns)
        launch(
            real_form_kernel,
            (2 * rows, cells(2 * columns, t["BLOCK"])),
            w, forms[-1], ROWS=rows, COLUMNS=columns, **t,
        )  # fmt: skip
    return forms


def slices(x: Tensor, lmax: int, mmax: int) -> list[Tensor]:
    """Rows [E, R, C] as one matrix per m, views [E, n_0·C], [E, 2·n_m·C]."""
    widths = [(1 if m == 0 else 2) * (lmax + 1 - m) * x.shape[2] for m in range(mmax + 1)]
    return list(x.view(len(x), sum(widths)).split(widths, dim=1))


def product(
    x: Tensor, weights: list[Tensor], bias: Tensor, lmax: int, mmax: int, out: Tensor | None = None
) -> Tensor:
    """Rows [E, R, C] -> [E, R, C'] by `real_forms`, no activation."""
    if out is None:
        out = x.new_empty(len(x), x.shape[1], len(bias) // (lmax + 1))
    for m, (into, part) in enumerate(zip(slices(out, lmax, mmax), slices(x, lmax, mmax))):
        if m == 0:
            torch.addmm(bias, part, weights[0].T, out=into)
        else:
            torch.mm(part, weights[m].T, out=into)
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
