"""The three ops on CUDA, each one pass over memory forward and one backward. Arithmetic is float32.

Nothing is added by atomics: the norm's weight gets its gradient from PROGRAMS parts, each the sum of a share
of the rows, so that equal inputs give equal bits on any device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.launch import SIZES, launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROGRAMS = 256  # of the norm's gradient; a constant, so that sums do not depend on the device
# Chosen by the compiler's report (16-byte loads, no spill), not by a clock.
TILES: dict[str, list[dict[str, int]]] = {
    "rms_norm": [{"num_warps": 8}],
    "rms_norm_grad": [{"num_warps": 8}],
    "rotate": [{"num_warps": 4}],
    "swiglu": [{"BLOCK": 1024, "num_warps": 4}],
    "swiglu_grad": [{"BLOCK": 1024, "num_warps": 4}],
}


@triton.jit
def rms_norm_kernel(x, weight, out, inverse, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row: x / sqrt(mean x² + eps) · weight, and the inverse root."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    real = c < WIDTH
    a = tl.load(x + row * WIDTH + c, mask=real, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(a * a, 0) / WIDTH + eps)
    tl.store(out + row * WIDTH + c, (a * scale * w).to(out.dtype.element_ty), mask=real)
    tl.store(inverse + row, scale)


@triton.jit(do_not_specialize=SIZES)
def rms_norm_grad_kernel(
    grad, x, weight, inverse, grad_x, partial, n_tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradient of every PROGRAMS-th row, and those rows' part [WIDTH] of the weight's gradient."""
    c = tl.arange(0, BLOCK)
    real = c < WIDTH
    w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0).to(tl.int64), n_tokens, tl.num_programs(0)):
        at = i * WIDTH + c
        scale = tl.load(inverse + i)
        g = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
        unit = tl.load(x + at, mask=real, other=0.0).to(tl.float32) * scale
        total += g * unit
        g *= w
        d = scale * (g - unit * (tl.sum(g * unit, 0) / WIDTH))
        tl.store(grad_x + at, d.to(grad_x.dtype.element_ty), mask=real)
    tl.store(partial + tl.program_id(0) * WIDTH + c, total, mask=real)


@triton.jit
def turn(
    x, out, c1, c2, s1, s2, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All heads of one token: x1·c1 - x2·s1 and x2·c2 + x1·s2 of the halves x1, x2."""
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at = head[:, None] * (2 * HALF) + d[None, :]
    real = (head < HEADS)[:, None] & (d < HALF)[None, :]
    x1 = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + HALF, mask=real, other=0.0).to(tl.float32)
    y1 = x1 * c1[None, :] - x2 * s1[None, :]
    y2 = x2 * c2[None, :] + x1 * s2[None, :]
    tl.store(out + at, y1.to(out.dtype.element_ty), mask=real)
    tl.store(out + at + HALF, y2.to(out.dtype.element_ty), mask=real)


@triton.jit
def rotate_kernel(
    query, key, cos, sin, out_query, out_key, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, query and key."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real = d < HALF
    at = token * (2 * HALF) + d
    c1 = tl.load(cos + at, mask=real, other=0.0).to(tl.float32)
    c2 = tl.load(cos + at + HALF, mask=real, other=0.0).to(tl.float32)
    s1 = tl.load(sin + at, mask=real, other=0.0).to(tl.float32)
    s2 = tl.load(sin + at + HALF, mask=real, other=0.0).to(tl.float32)
    if TRANSPOSED:
        s1, s2 = -s2, -s1
    q = token * (2 * HALF * HEADS)
    k = token * (2 * HALF * KV_HEADS)
    turn(query + q, out_query + q, c1, c2, s1, s2, HEADS, HALF, BLOCK_H, BLOCK_D)
    turn(key + k, out_key + k, c1, c2, s1, s2, KV_HEADS, HALF, BLOCK_K, BLOCK_D)


@triton.jit
def swiglu_kernel(gate, up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) · up of BLOCK values of a row."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + c
    g = tl.load(gate + at, mask=c < WIDTH, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=c < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def swiglu_grad_kernel(grad, gate, up, grad_gate, grad_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Both gradients of BLOCK values of a row."""
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + c
    d = tl.load(grad + at, mask=c < WIDTH, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=c < WIDTH, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=c < WIDTH, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    of_gate = d * u * s * (1 + g * (1 - s))
    tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), mask=c < WIDTH)
    tl.store(grad_up + at, (d * g * s).to(grad_up.dtype.element_ty), mask=c < WIDTH)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    width = len(weight)
    sizes = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)}
    launch(rms_norm_kernel, (inverse.numel(),), x, weight, out, inverse, eps, **sizes, **TILES["rms_norm"][0])
    return out, inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    width, tokens = len(weight), inverse.numel()
    of_x = torch.empty_like(x)
    partial = x.new_empty(min(PROGRAMS, tokens), width, dtype=torch.float32)
    launch(
        rms_norm_grad_kernel,
        (len(partial),),
        grad, x, weight, inverse, of_x, partial, tokens,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), **TILES["rms_norm_grad"][0],
    )  # fmt: skip
    return of_x, partial.sum(0)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query), torch.empty_like(key)
    (tokens, heads, width), kv_heads = query.shape, key.shape[1]
    launch(
        rotate_kernel,
        (tokens,),
        query, key, cos, sin, *out,
        HEADS=heads, KV_HEADS=kv_heads, HALF=width // 2, TRANSPOSED=transposed,
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_K=triton.next_power_of_2(kv_heads),
        BLOCK_D=triton.next_power_of_2(width // 2), **TILES["rotate"][0],
    )  # fmt: skip
    return out


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    grid, options = by_rows(gate, "swiglu")
    launch(swiglu_kernel, grid, gate, up, out, **options)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    grid, options = by_rows(gate, "swiglu_grad")
    launch(swiglu_grad_kernel, grid, grad, gate, up, of_gate, of_up, **options)
    return of_gate, of_up


def by_rows(x: Tensor, kernel: str) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the options of a kernel that takes x [..., WIDTH] a part of a row at a time."""
    width, t = x.shape[-1], TILES[kernel][0]
    return (x.numel() // max(width, 1), triton.cdiv(width, t["BLOCK"])), {"WIDTH": width, **t}
