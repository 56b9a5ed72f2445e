"""The activation between the two products, on the sphere or by gates, and its gradient.

On the sphere in two stages: to latitudes by sums over l, to longitudes by sums over m, and both back.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tiles grow in kernels)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.escn.layout import EdgeAttention
from catmllm_kernels.escn.triton.indices import (
    abs_order,
    at_least,
    half_of,
    highest,
    longitude,
    n_half,
    n_rows,
    row_of,
    wave_of,
    wave_order,
)
from catmllm_kernels.escn.triton.tiles import cells, tile
from catmllm_kernels.launch import SIZES, launch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # no assembly there: the definition
SIGMOID = tl.constexpr("""{
    .reg .f32 t;
    mul.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 $0, t;
}""")  # -log2 e, 1


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), in float32 by the special-function units: four instructions, where Triton's own
    exponential and division take fifteen (they mind subnormal results, which mean nothing beside 1).

    Relative error at most (1 - s)·(1.25·|x|·2⁻²⁴ + 2⁻²²) + 2⁻²⁴ + 2⁻²³: of -x·log2 e with its constant, ex2
    (two units in the last place), the sum, rcp (one), by the PTX manual's table. Absolute: below 2⁻²².
    """
    if INTERPRETED or x.dtype != tl.float32:
        s = 1.0 / (1.0 + tl.exp(-x))
    else:
        s = tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return s


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
def point(waves, p: tl.constexpr, LON: tl.constexpr, M: tl.constexpr):
    """The value at longitude p. Its harmonics are numbers of the instructions: loaded, 18 times 2M of them
    would fill the registers of a thread."""
    g = waves[0]
    for i in tl.static_range(1, 2 * M + 1):
        g += longitude(i, p, LON) * waves[i]
    return g


@triton.jit
def add_point(waves, g, p: tl.constexpr, LON: tl.constexpr, M: tl.constexpr):
    """The transpose."""
    new = (waves[0] + g,)
    for i in tl.static_range(1, 2 * M + 1):
        new = new + (waves[i] + longitude(i, p, LON) * g,)
    return new


@triton.jit
def zero_tiles(N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros([BLOCK_E, BLOCK_C], tl.float32),)
    return tiles


@triton.jit
def activate(
    gates, hidden, active, to_lat, from_lat, mask, HIDDEN: tl.constexpr, L: tl.constexpr,
    M: tl.constexpr, SPHERE: tl.constexpr, LAT: tl.constexpr, LON: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
            for p in tl.static_range(LON):
                g = point(waves, p, LON, M)
                back = add_point(back, g * sigmoid(g), p, LON, M)
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


@triton.jit(do_not_specialize=SIZES)
def activation_kernel(
    gates,
    hidden,
    active,
    to_lat,
    from_lat,
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
        gates + edge[:, None] * gates_edge + c[None, :], hidden + at, active + at, to_lat, from_lat,
        (edge < n_edges)[:, None] & (c < HIDDEN)[None, :], HIDDEN, L, M, SPHERE, LAT, LON, BLOCK_E, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def activation_grad_kernel(
    gates,
    hidden,
    grad_active,
    to_lat,
    from_lat,
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
    """Gradients of the activation to its rows and gates, which lie side by side with row stride grad_edge.
    A hot loop: one kernel."""
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
            for p in tl.static_range(LON):
                g = point(waves, p, LON, M)
                s = sigmoid(g)
                dg = point(dback, p, LON, M) * s * (1 + g * (1 - s))
                dwaves = add_point(dwaves, dg, p, LON, M)
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


def grid_of(a: EdgeAttention) -> dict[str, int]:
    """The constants of the activation."""
    if a.sphere is None:
        return {"SPHERE": False, "LAT": 1, "LON": 1}
    return {"SPHERE": True, "LAT": len(a.sphere.to_lat), "LON": len(a.sphere.lon)}


def latitudes(a: EdgeAttention) -> tuple[Tensor | None, Tensor | None]:
    """The tables that the kernels read; longitudes are known when they are compiled."""
    return (None, None) if a.sphere is None else (a.sphere.to_lat, a.sphere.from_lat)


def activation_grad(
    a: EdgeAttention, extra: Tensor, hidden: Tensor, grad_active: Tensor, out: Tensor
) -> None:
    """Fills `out` [E, n_extra + R·C'] from column heads·A on: gates, then rows."""
    n_edges, n_alpha = len(extra), a.alpha_dot.numel()
    t = tile("activation_grad", BLOCK_C=a.hidden)
    launch(
        activation_grad_kernel,
        (cells(n_edges, t["BLOCK_E"]), cells(a.hidden, t["BLOCK_C"])),
        extra[:, n_alpha:], hidden, grad_active, *latitudes(a), out[:, n_alpha:], out[:, a.n_extra :],
        n_edges, extra.shape[1], out.shape[1],
        HIDDEN=a.hidden, L=a.lmax, M=a.mmax, **grid_of(a), **t,
    )  # fmt: skip
