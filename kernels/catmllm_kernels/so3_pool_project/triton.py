"""Norm and pooling in Triton: three numbers an atom, then maxima over
the atoms of a system straight from the embeddings.

stats      mean and 1/deviation of l = 0, 1/RMS of the rows l > 0 (or of all, `joint`), one atom a program
pool       the largest normalised value (or degree norm) of a system and the first atom that has it
pool_grad  the gradient goes to that atom alone; the norm's backward in the same pass, its parameters' share
           a program
"""

# mypy: disable-error-code="assignment, misc, union-attr"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.launch import SIZES, launch
from catmllm_kernels.so3_pool_project.reference import EPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES: dict[str, list[dict[str, int]]] = {
    "stats": [{"num_warps": 4}],
    "pool": [{"BLOCK_A": 16, "num_warps": 4}],
    "pool_grad": [{"num_warps": 8}],
}
PROGRAMS = 128  # of pool_grad; a constant, so that sums do not depend on the device


@triton.jit
def load_rows(x, row, S: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """One atom's rows, and its offsets and mask."""
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    mask = (s < S)[:, None] & (c < C)[None, :]
    at = s[:, None] * C + c[None, :]
    return tl.load(x + row * (S * C) + at, mask=mask, other=0.0).to(tl.float32), at, mask


@triton.jit
def degree_of(s):
    """l of row s."""
    return tl.sqrt(s.to(tl.float32) + 0.5).to(tl.int32)


@triton.jit
def share_of(s, L: tl.constexpr, JOINT: tl.constexpr):
    """The weight of a row's mean square in the RMS."""
    per_degree = 1.0 / ((L + JOINT) * (2 * degree_of(s) + 1).to(tl.float32))
    return per_degree if JOINT else tl.where(s > 0, per_degree, 0.0)


@triton.jit
def stats_kernel(
    x, stats, eps, L: tl.constexpr, C: tl.constexpr, JOINT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr
):  # fmt: skip
    """stats [N, 3] of one atom: mean of l = 0, its factor, the factor of the rest."""
    atom = tl.program_id(0).to(tl.int64)
    v, _, mask = load_rows(x, atom, (L + 1) * (L + 1), C, BLOCK_S, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    zero = (s == 0)[:, None]
    mean = tl.sum(tl.sum(tl.where(zero, v, 0.0), 1), 0) / C
    v = tl.where(zero & mask, v - mean, v)
    square = tl.sum(v * v, 1) / C
    rest = 1.0 / tl.sqrt(tl.sum(square * share_of(s, L, JOINT), 0) + eps)
    first = rest if JOINT else 1.0 / tl.sqrt(tl.sum(tl.where(s == 0, square, 0.0), 0) + eps)
    tl.store(stats + atom * 3, mean)
    tl.store(stats + atom * 3 + 1, first)
    tl.store(stats + atom * 3 + 2, rest)


@triton.jit
def pool_kernel(
    x,
    stats,
    scale,
    bias,
    ptr,
    features,
    arg,
    L: tl.constexpr,
    C: tl.constexpr,
    INVARIANT: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The maximum over the atoms of a system of one row (or one degree's norm), all channels.
    A hot loop: one kernel."""
    S: tl.constexpr = (L + 1) * (L + 1)
    system, unit = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    c_mask = c < C
    l = unit if INVARIANT else degree_of(unit)
    begin, end = tl.load(ptr + system), tl.load(ptr + system + 1)
    if NORM:
        factor = tl.load(scale + l * C + c, mask=c_mask, other=0.0).to(tl.float32)
        shift = tl.where(l == 0, tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32), 0.0)
    best = tl.full([BLOCK_C], -float("inf"), tl.float32)
    who = tl.full([BLOCK_C], 2147483647, tl.int32)
    broken = tl.full([BLOCK_C], 2147483647, tl.int32)  # the first atom whose value is NaN
    first_row = l * l if INVARIANT else unit
    n_rows = 2 * l + 1 if INVARIANT else 1
    for start in range(begin, end, BLOCK_A):
        atom = (start + tl.arange(0, BLOCK_A)).to(tl.int64)
        real = atom < end
        mask = real[:, None] & c_mask[None, :]
        if NORM:
            r = tl.load(stats + atom * 3 + tl.where(l == 0, 1, 2), mask=real, other=0.0)
            mean = tl.where(l == 0, tl.load(stats + atom * 3, mask=real, other=0.0), 0.0)
        value = tl.zeros([BLOCK_A, BLOCK_C], tl.float32)
        for i in range(0, n_rows):
            at = atom[:, None] * (S * C) + (first_row + i) * C + c[None, :]
            v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            if NORM:
                v = (v - mean[:, None]) * r[:, None] * factor[None, :] + shift[None, :]
                v = v.to(x.dtype.element_ty).to(tl.float32)
            if INVARIANT:
                value += tl.where(l == 0, v, v * v)
            else:
                value = v
        if INVARIANT:
            value = tl.where(l == 0, value, tl.sqrt(value / n_rows.to(tl.float32) + 1e-12))
            value = value.to(x.dtype.element_ty).to(tl.float32)
        index = (atom.to(tl.int32))[:, None] + tl.zeros([BLOCK_A, BLOCK_C], tl.int32)
        nan = (value != value) & mask
        broken = tl.minimum(broken, tl.min(tl.where(nan, index, 2147483647), 0))
        value = tl.where(mask & (value == value), value, -float("inf"))
        top = tl.max(value, 0)
        here = tl.min(tl.where((value == top[None, :]) & real[:, None], index, 2147483647), 0)
        better = (top > best) | (who == 2147483647)
        who = tl.where(better, here, who)
        best = tl.where(better, top, best)
    best = tl.where(broken < 2147483647, float("nan"), best)
    who = tl.minimum(tl.where(broken < 2147483647, broken, who), broken)
    out = (system * tl.num_programs(1) + unit) * C + c
    tl.store(features + out, best.to(features.dtype.element_ty), mask=c_mask)
    tl.store(arg + out, who, mask=c_mask)


@triton.jit(do_not_specialize=SIZES)
def pool_grad_kernel(
    x,
    stats,
    scale,
    batch,
    features,
    arg,
    grad,
    grad_x,
    partial,
    partial_bias,
    n_atoms,
    L: tl.constexpr,
    C: tl.constexpr,
    INVARIANT: tl.constexpr,
    NORM: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x [N, S, C] of the program's atoms in turn; partial [programs, S, C] of the scales, by row,
    and of the bias. A hot loop: one kernel."""
    S: tl.constexpr = (L + 1) * (L + 1)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    l = degree_of(s)
    zero = (s == 0)[:, None]
    c_mask = c < C
    row_mask = (s < S)[:, None] & c_mask[None, :]
    unit = l if INVARIANT else s
    n_units = L + 1 if INVARIANT else S
    if NORM:
        factor = tl.load(scale + l[:, None] * C + c[None, :], mask=row_mask, other=0.0).to(tl.float32)
        share = share_of(s, L, JOINT)[:, None]
        if not JOINT:
            share = tl.where(zero, 1.0, share)
    sum_scale = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    for atom in range(tl.program_id(0), n_atoms, tl.num_programs(0)):
        v, at, mask = load_rows(x, atom, S, C, BLOCK_S, BLOCK_C)
        system = tl.load(batch + atom)
        pooled = (system * n_units + unit[:, None]) * C + c[None, :]
        mine = tl.load(arg + pooled, mask=mask, other=-1) == atom
        d = tl.where(mine, tl.load(grad + pooled, mask=mask, other=0.0).to(tl.float32), 0.0)
        z = v
        y = v
        if NORM:
            mean, r0, r = (
                tl.load(stats + atom * 3),
                tl.load(stats + atom * 3 + 1),
                tl.load(stats + atom * 3 + 2),
            )
            v = tl.where(zero & mask, v - mean, v)
            rs = tl.where(zero, r0, r)
            z = v * rs
            y = z * factor
        if INVARIANT:
            f = tl.load(features + pooled, mask=mask & mine & (s > 0)[:, None], other=1.0).to(tl.float32)
            d = tl.where(zero, d, d * y / (f * (2 * l[:, None] + 1).to(tl.float32)))
        if NORM:
            sum_scale += d * z
            sum_bias += tl.sum(tl.where(zero, d, 0.0), 0)
            d = d * factor
            by_row = tl.sum(d * v, 1)
            all_rows = tl.sum(by_row, 0)
            if JOINT:
                inner = all_rows
            else:
                only = tl.sum(tl.where(s == 0, by_row, 0.0), 0)
                inner = tl.where(zero, only, all_rows - only)
            d = rs * d - rs * rs * rs * share * v * (inner / C)
            centre = tl.sum(tl.sum(tl.where(zero & mask, d, 0.0), 1), 0) / C
            d = tl.where(zero, d - centre, d)
        tl.store(grad_x + atom * (S * C) + at, d.to(grad_x.dtype.element_ty), mask=mask)
    if NORM:
        program = tl.program_id(0)
        at = s[:, None] * C + c[None, :]
        tl.store(partial + program * (S * C) + at, sum_scale, mask=row_mask)
        tl.store(partial_bias + program * C + c, sum_bias, mask=c_mask)


def blocks(x: Tensor) -> dict[str, int]:
    rows, channels = x.shape[1:]
    return {"BLOCK_S": 1 << (rows - 1).bit_length(), "BLOCK_C": 1 << (channels - 1).bit_length()}


def pool_forward(
    x: Tensor, batch: Tensor, n_systems: int, mode: str, norm: tuple[Tensor, Tensor, bool] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(features, first atom of each maximum int32, stats [N, 3] float32)"""
    n_atoms, rows, channels = x.shape
    lmax = int(rows**0.5) - 1
    stats = x.new_empty(n_atoms, 3, dtype=torch.float32)
    if norm is not None:
        launch(
            stats_kernel, (n_atoms,), x, stats, EPS,
            L=lmax, C=channels, JOINT=norm[2], **blocks(x), **TILES["stats"][0],
        )  # fmt: skip
    units = lmax + 1 if mode == "invariant" else rows
    features = x.new_empty(n_systems, units * channels)
    arg = x.new_empty(n_systems, units * channels, dtype=torch.int32)
    ptr = torch.searchsorted(batch, torch.arange(n_systems + 1, device=batch.device))
    launch(
        pool_kernel, (n_systems, units), x, stats, *(norm or (None, None))[:2], ptr, features, arg,
        L=lmax, C=channels, INVARIANT=mode == "invariant", NORM=norm is not None,
        BLOCK_C=blocks(x)["BLOCK_C"], **TILES["pool"][0],
    )  # fmt: skip
    return features, arg, stats


def pool_backward(
    grad: Tensor, x: Tensor, batch: Tensor, n_systems: int, mode: str,
    norm: tuple[Tensor, Tensor, bool] | None, features: Tensor, arg: Tensor, stats: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and, with a norm, of its scale and bias."""
    n_atoms, rows, channels = x.shape
    lmax = int(rows**0.5) - 1
    grad_x = torch.empty_like(x)
    programs = min(PROGRAMS, n_atoms)
    partial = x.new_empty(programs, rows, channels, dtype=torch.float32)
    partial_bias = x.new_empty(programs, channels, dtype=torch.float32)
    launch(
        pool_grad_kernel, (programs,), x, stats, None if norm is None else norm[0], batch, features, arg,
        grad, grad_x, partial, partial_bias, n_atoms,
        L=lmax, C=channels, INVARIANT=mode == "invariant", NORM=norm is not None,
        JOINT=norm is not None and norm[2], **blocks(x), **TILES["pool_grad"][0],
    )  # fmt: skip
    if norm is None:
        return [grad_x]
    by_row = partial.sum(0)
    first = [l * l for l in range(lmax + 1)]
    scale = torch.stack([by_row[i : i + 2 * l + 1].sum(0) for l, i in enumerate(first)])
    return [grad_x, scale.to(norm[0].dtype), partial_bias.sum(0).to(norm[1].dtype)]
