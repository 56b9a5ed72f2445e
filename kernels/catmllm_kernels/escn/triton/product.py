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
from catmllm_kernels.escn.reference import real_form
from catmllm_kernels.escn.triton.activation import activate, activation_kernel, grid_of, zero_tiles
from catmllm_kernels.escn.triton.indices import first_row, n_rows, weight_offset
from catmllm_kernels.escn.triton.tiles import cells, tile
from catmllm_kernels.launch import SIZES, launch

FUSED = (torch.float16, torch.bfloat16)  # dtypes of the product with activation


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


@triton.jit(do_not_specialize=SIZES)
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
    """First SO(2) product of a tile of edges and hidden channels, all rows of it,
    then their activation STEP edges at a time.

    rows [E, R, C]; weights: one matrix after the other, the gates' outputs before those of m = 0; gates [E,
    .] with row stride gates_edge; hidden and active [E, R, HIDDEN]. The activation reads its tile back: in
    the layout of the product, four values a thread, input and output of all rows would not fit the registers
    (255 and 1200 bytes spilled at L4 M2, 8 KiB at L6 M3).
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
            gates + few[:, None] * gates_edge + c[None, :], hidden + tile_at, active + tile_at, to_lat,
            from_lat, lon, (few < n_edges)[:, None] & c_mask[None, :], HIDDEN, L, M, SPHERE, LAT, LON, STEP,
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
