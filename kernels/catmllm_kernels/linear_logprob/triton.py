"""The op on CUDA: logits live in registers, a tile at a time.

Forward: one program takes a block of tokens and a share of the vocabulary ("split") and keeps, per token, the
running maximum, the sum of exponentials, what the entropy needs, and the target's logit; the splits are
merged in a fixed order. A second head (the reference policy) shares the load of the hidden states. Backward:
for a slice of the vocabulary one kernel recomputes the logits and writes d = dL/dlogits in the inputs' dtype
to a workspace of at most WORKSPACE values; two plain products make the gradients of it. A slice's rows of the
weight's gradient are complete when written, the hidden states' gradient is summed in float32 over slices in
order. A kernel that kept that sum itself would hold [BLOCK_T, H] accumulators (1.8 MiB for 128 x 3584) or
need atomics. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmllm_kernels.launch import SIZES, architecture, launch
from catmllm_kernels.linear_logprob.arguments import Backward, Forward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORKSPACE = 1 << 26  # values of dL/dlogits at a time: 128 MiB in half precision
SPLIT_TARGET = 512  # programs wanted in a forward launch: several waves on the A100's 108 SMs
LOWEST = tl.constexpr(-1.0e30)  # of words past the end and to start the maximum: -inf minus -inf would be NaN

# (BLOCK_T, BLOCK_V, BLOCK_H, warps, stages) by kernel and bytes of an element, chosen from the compiler's
# resource reports (no spills, at most 163 KiB shared); no GPU has timed them. HOPPER takes their place from
# compute capability 9.0 on: of 128 x 128 tiles an H100's tensor cores could use 15 TB/s, three times what its
# L2 gives; 128 x 256 want 12. Neither an A100's forward nor any gradient kernel has registers for them.
# float32 spills 16 bytes there with four warps.
BLOCKS = {
    ("forward", 2): (128, 128, 64, 8, 3),
    ("forward", 4): (64, 64, 32, 4, 3),
    ("two_heads", 2): (128, 64, 64, 8, 3),
    ("two_heads", 4): (64, 32, 32, 4, 3),
    ("gradient", 2): (128, 128, 64, 8, 3),
    ("gradient", 4): (64, 64, 32, 4, 3),
}
HOPPER = {
    ("forward", 2): (128, 256, 64, 8, 3),
    ("forward", 4): (64, 64, 32, 8, 3),
    ("two_heads", 4): (64, 32, 32, 8, 3),
}


@triton.jit
def _tile(acc, hidden, weight, rows, cols, row_ok, col_ok, width, BLOCK_H: tl.constexpr, EVEN: tl.constexpr):
    """acc [BLOCK_T, BLOCK_V] + hidden[rows] @ weight[cols].T in float32."""
    k = tl.arange(0, BLOCK_H)
    a = hidden + rows[:, None] * width + k[None, :]
    b = weight + cols[None, :] * width + k[:, None]
    for start in range(0, width, BLOCK_H):
        if EVEN:
            x = tl.load(a + start, mask=row_ok[:, None], other=0.0)
            y = tl.load(b + start, mask=col_ok[None, :], other=0.0)
        else:
            k_ok = start + k < width
            x = tl.load(a + start, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            y = tl.load(b + start, mask=col_ok[None, :] & k_ok[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    return acc


@triton.jit
def _fold(z, cols, col_ok, target, top, total, moment, own, ENTROPY: tl.constexpr):
    """Take a tile of logits into the running (max, sum e^(z-max), sum e^(z-max)(z-max), target's logit)."""
    own += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
    z = tl.where(col_ok[None, :], z, LOWEST)
    new = tl.maximum(top, tl.max(z, 1))
    shift = top - new
    shrink = tl.exp(shift)
    z -= new[:, None]
    e = tl.exp(z)
    if ENTROPY:
        moment = (moment + total * shift) * shrink + tl.sum(e * z, 1)
    total = total * shrink + tl.sum(e, 1)
    return new, total, moment, own


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    hidden,  # [T, H]
    weight,  # [V, H]
    targets,  # [T] int64
    parts,  # [4, splits, T] float32: max, sum, moment, target's logit
    n_tokens,
    n_words,
    width,
    tiles,  # of BLOCK_V words, a split
    scale,  # 1 / temperature
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_H divides width
):
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = rows < n_tokens
    target = tl.load(targets + rows, mask=row_ok, other=-1)
    top = tl.full((BLOCK_T,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    moment = tl.zeros((BLOCK_T,), tl.float32)
    own = tl.zeros((BLOCK_T,), tl.float32)
    for tile in range(tiles):
        first = (split * tiles + tile) * BLOCK_V
        if first < n_words:
            cols = first.to(tl.int64) + tl.arange(0, BLOCK_V)
            col_ok = cols < n_words
            z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            z = _tile(z, hidden, weight, rows, cols, row_ok, col_ok, width, BLOCK_H, EVEN) * scale
            top, total, moment, own = _fold(z, cols, col_ok, target, top, total, moment, own, ENTROPY)
    at = parts + split * n_tokens + rows
    step = tl.num_programs(1).to(tl.int64) * n_tokens
    tl.store(at, top, mask=row_ok)
    tl.store(at + step, total, mask=row_ok)
    tl.store(at + 2 * step, moment, mask=row_ok)
    tl.store(at + 3 * step, own, mask=row_ok)


@triton.jit(do_not_specialize=SIZES)
def two_heads_kernel(
    hidden,
    weight,
    reference,  # [V, H]
    targets,
    parts,  # [8, splits, T]: of weight, then of reference
    n_tokens,
    n_words,
    width,
    tiles,
    scale,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,
):
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = rows < n_tokens
    target = tl.load(targets + rows, mask=row_ok, other=-1)
    zero = tl.zeros((BLOCK_T,), tl.float32)
    top, total, moment, own = zero + LOWEST, zero, zero, zero
    top_r, total_r, moment_r, own_r = zero + LOWEST, zero, zero, zero
    k = tl.arange(0, BLOCK_H)
    for tile in range(tiles):
        first = (split * tiles + tile) * BLOCK_V
        if first < n_words:
            cols = first.to(tl.int64) + tl.arange(0, BLOCK_V)
            col_ok = cols < n_words
            z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            z_r = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            at_w = cols[None, :] * width + k[:, None]
            at_h = rows[:, None] * width + k[None, :]
            for start in range(0, width, BLOCK_H):
                h_ok, w_ok = row_ok[:, None], col_ok[None, :]
                if not EVEN:
                    h_ok = h_ok & (start + k < width)[None, :]
                    w_ok = w_ok & (start + k < width)[:, None]
                x = tl.load(hidden + at_h + start, mask=h_ok, other=0.0)
                y = tl.load(weight + at_w + start, mask=w_ok, other=0.0)
                z = tl.dot(x, y, z, input_precision="ieee")
                y = tl.load(reference + at_w + start, mask=w_ok, other=0.0)
                z_r = tl.dot(x, y, z_r, input_precision="ieee")
            top, total, moment, own = _fold(z * scale, cols, col_ok, target, top, total, moment, own, ENTROPY)
            top_r, total_r, moment_r, own_r = _fold(
                z_r * scale, cols, col_ok, target, top_r, total_r, moment_r, own_r, False
            )
    at = parts + split * n_tokens + rows
    step = tl.num_programs(1).to(tl.int64) * n_tokens
    tl.store(at, top, mask=row_ok)
    tl.store(at + step, total, mask=row_ok)
    tl.store(at + 2 * step, moment, mask=row_ok)
    tl.store(at + 3 * step, own, mask=row_ok)
    tl.store(at + 4 * step, top_r, mask=row_ok)
    tl.store(at + 5 * step, total_r, mask=row_ok)
    tl.store(at + 6 * step, moment_r, mask=row_ok)
    tl.store(at + 7 * step, own_r, mask=row_ok)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    hidden,
    weight,  # [n_words, H], a slice of the vocabulary
    targets,  # [T], minus the slice's first word
    lse,  # [T] float32
    entropy,  # [T] float32, read with ENTROPY
    grad,  # [T] float32 of the log-probability
    grad_entropy,  # [T] float32
    out,  # [T, n_words]
    n_tokens,
    n_words,
    width,
    scale,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ok, col_ok = rows < n_tokens, cols < n_words
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    z = _tile(z, hidden, weight, rows, cols, row_ok, col_ok, width, BLOCK_H, EVEN) * scale
    lp = z - tl.load(lse + rows, mask=row_ok, other=0.0)[:, None]
    g = tl.load(grad + rows, mask=row_ok, other=0.0)
    pull = tl.zeros((BLOCK_T, BLOCK_V), tl.float32) + g[:, None]
    if ENTROPY:
        h = tl.load(entropy + rows, mask=row_ok, other=0.0)
        g_h = tl.load(grad_entropy + rows, mask=row_ok, other=0.0)
        pull += g_h[:, None] * (lp + h[:, None])
    target = tl.load(targets + rows, mask=row_ok, other=-1)
    d = tl.where(cols[None, :] == target[:, None], g[:, None], 0.0) - tl.exp(lp) * pull
    at = out + rows[:, None] * n_words + cols[None, :]
    tl.store(at, (d * scale).to(out.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


def blocks(kernel: str, element_size: int, width: int) -> dict[str, Any]:
    """Launch options of a kernel for inputs of this element size."""
    own = HOPPER if architecture() >= 90 else {}
    t, v, h, warps, stages = own.get((kernel, element_size)) or BLOCKS[kernel, element_size]
    options = {"BLOCK_T": t, "BLOCK_V": v, "BLOCK_H": h, "EVEN": width % h == 0}
    return options | {"num_warps": warps, "num_stages": stages}


def forward(p: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(at the target, logsumexp, entropy, reference at the target), each [T] float32; [0] for what was not
    asked for. Nothing is ever kept for the backward pass: the last is [0]."""
    hidden, weight, targets, temperature, entropy, reference, _ = p
    (n, width), words = hidden.shape, weight.shape[0]
    options = blocks("forward" if reference is None else "two_heads", hidden.element_size(), width)
    row_blocks, tiles = triton.cdiv(n, options["BLOCK_T"]), triton.cdiv(words, options["BLOCK_V"])
    per_split = triton.cdiv(tiles, min(tiles, triton.cdiv(SPLIT_TARGET, max(1, row_blocks))))
    splits = triton.cdiv(tiles, per_split)
    heads = 1 if reference is None else 2
    parts = hidden.new_empty(heads, 4, splits, n, dtype=torch.float32)
    if n:
        sizes = (n, words, width, per_split, 1.0 / temperature)
        kernel = forward_kernel if reference is None else two_heads_kernel
        second = () if reference is None else (reference,)
        tensors = (hidden, weight, *second, targets, parts)
        launch(kernel, (row_blocks, splits), *tensors, *sizes, ENTROPY=entropy, **options)
    lp, lse, spread = _merge(parts[0], entropy)
    other = lp.new_empty(0) if reference is None else _merge(parts[1], False)[0]
    return lp, lse, spread, other, lp.new_empty(0)


def _merge(parts: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """parts [4, splits, T] -> (log-probability, logsumexp, entropy or [0]), splits taken in order."""
    top, total, moment, own = parts.unbind(0)
    highest = top.amax(0)
    shift = top - highest
    share = shift.exp()
    mass = (total * share).sum(0)
    log_mass = mass.log()
    lse = highest + log_mass
    spread = log_mass - ((moment + total * shift) * share).sum(0) / mass if entropy else lse.new_empty(0)
    return own.sum(0) - lse, lse, spread


def backward(p: Backward) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight); None for one not needed."""
    hidden, weight = p.hidden, p.weight
    (n, width), words = hidden.shape, weight.shape[0]
    if not n:
        return torch.zeros_like(hidden), torch.zeros_like(weight)
    options = blocks("gradient", hidden.element_size(), width)
    slice_words = slice_of(n, words)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if p.need_hidden else None
    grad_weight = torch.empty_like(weight) if p.need_weight else None
    workspace = hidden.new_empty(n * min(slice_words, words))
    asked = p.grad_entropy is not None
    for start in range(0, words, slice_words):
        part = weight[start : start + slice_words]
        d = workspace[: n * len(part)].view(n, len(part))
        grid = (triton.cdiv(n, options["BLOCK_T"]), triton.cdiv(len(part), options["BLOCK_V"]))
        launch(
            gradient_kernel,
            grid,
            hidden,
            part,
            p.targets - start,
            p.lse,
            p.entropy if asked else p.lse,
            p.grad,
            p.grad_entropy if asked else p.grad,
            d,
            n,
            len(part),
            width,
            1.0 / p.temperature,
            ENTROPY=asked,
            **options,
        )
        if grad_hidden is not None:
            grad_hidden += _product_in_float32(d, part)
        if grad_weight is not None:
            torch.mm(d.T, hidden, out=grad_weight[start : start + slice_words])
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def slice_of(tokens: int, words: int) -> int:
    """Words of a slice whose dL/dlogits stays inside WORKSPACE; a multiple of 128,
    so that its rows start aligned."""
    return min(words, max(128, WORKSPACE // max(1, tokens) // 128 * 128))


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32:
        return a @ b
    # cuBLAS can leave the float32 sum as it is; in the interpreter, which runs on a CPU, widen first.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
