"""The producer: gather both ends of an edge, rotate, cut to |m| <= mmax, radial scale, pack by m."""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.escn import layout
from catmllm_kernels.escn.layout import EdgeAttention
from catmllm_kernels.escn.triton.indices import half_at, highest, n_half, n_rows, row_at, wigner_offset
from catmllm_kernels.escn.triton.tiles import cells, tile
from catmllm_kernels.launch import SIZES, launch


@triton.jit
def turned(wigner, xs, mask, l: tl.constexpr):
    """One row of a rotated block: Σ_k D[k]·x[k], xs the 2l+1 rows of degree l."""
    out = tl.load(wigner, mask=mask, other=0.0)[:, None] * xs[0]
    for k in tl.static_range(1, 2 * l + 1):
        out += tl.load(wigner + k, mask=mask, other=0.0)[:, None] * xs[k]
    return out


@triton.jit
def send_row(
    xs, weight, wigner, rows, grad_rows, at, real, mask, l: tl.constexpr, GRAD: tl.constexpr
):  # fmt: skip
    """Turn and store one row of an edge; what it adds to the gradient of its radial weight."""
    z = turned(wigner, xs, real, l)
    tl.store(rows + at, (z * weight).to(rows.dtype.element_ty), mask=mask)
    if GRAD:
        z *= tl.load(grad_rows + at, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=SIZES)
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
    orders,
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
    row_to = edge[:, None] * (R * 2 * C) + c[None, :]
    weight_to = edge[:, None] * (H * 2 * C) + c[None, :]
    for end in range(2):
        node = tl.load(source + edge, mask=real & (end == 0), other=0)
        node += tl.load(target + edge, mask=real & (end == 1), other=0)
        x_at = x + node[:, None] * (S * C) + c[None, :]
        row_end = row_to + end * C
        weight_end = weight_to + end * C
        for l in tl.static_range(L + 1):
            xs = ()
            for k in tl.static_range(2 * l + 1):
                xs = xs + (tl.load(x_at + (l * l + k) * C, mask=mask, other=0.0).to(tl.float32),)
            block = wigner + wigner_offset(l, M) + highest(l, M) * (2 * l + 1)
            for m in range(tl.minimum(l, orders) + 1):
                at = weight_end + half_at(l, m, L) * (2 * C)
                plus = row_end + row_at(l, m, L) * (2 * C)
                weight = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)
                D = block + m * (2 * l + 1)
                grad = send_row(xs, weight, D, rows, grad_rows, plus, real, mask, l, GRAD)
                if m > 0:
                    minus = row_end + row_at(l, -m, L) * (2 * C)
                    D = block - m * (2 * l + 1)
                    grad += send_row(xs, weight, D, rows, grad_rows, minus, real, mask, l, GRAD)
                if GRAD:
                    tl.store(grad_weights + at, grad.to(grad_weights.dtype.element_ty), mask=mask)


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
        a.mmax,
        C=channels, L=a.lmax, M=a.mmax, GRAD=grad_rows is not None, **t,
    )  # fmt: skip
    return rows, grad_weights
