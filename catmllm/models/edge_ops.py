"""The three steps of a message that are bound by memory, each as one differentiable operation.

A message is: gather, rotate and scale -> SO(2) product -> activation -> SO(2) product -> weight, rotate back and sum.
The products are plain matrix products; the steps around them move every row of every edge through memory several times. Here
they run a chunk of edges at a time, so that intermediates stay in a CPU's cache, and save only their inputs: the
backward pass recomputes the rest (at no cost in time: a rotation is as cheap as reading its result back). On an accelerator there is
one chunk. Best of 9 at 4160 edges, lmax 2, 32 channels, one thread: the activation of a 42-point grid takes 3.9 ms
instead of 10.7, of a 324-point grid 27 instead of 224. Saved per edge by an attention layer at lmax 4, mmax 2, 128 channels,
float32: 117 KiB instead of 226.

`parts` are an edge's rows by order: [E, n₀·C] for m = 0, then [E, 2·nₘ·C] = (+m, -m), nₘ = lmax+1-m. Gradients of the
tables (wigner, grids) are not taken, as in fairchem. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHE = 2**21  # bytes of the largest intermediate of a chunk; 1 to 4 MiB are equal within noise


def chunks(n_edges: int, like: Tensor, per_edge: int) -> Iterator[slice]:
    """Slices over the edges, each with `per_edge` values an edge near the size of a cache; one if not on a CPU."""
    size = n_edges if like.device.type != "cpu" else max(1, _CACHE // (like.element_size() * per_edge))
    return (slice(i, min(i + size, n_edges)) for i in range(0, n_edges, max(size, 1)))


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums over edges run in at least float32."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def rotate_and_scale(
    x: Tensor, weights: Tensor, wigner: Tensor, source: Tensor, target: Tensor, widths: Sequence[int]
) -> list[Tensor]:
    """Both ends of every edge, in its frame, times its radial weights.

    x [N, S, C], weights [E, Σ nₘ·2C] (+m and -m share theirs), wigner [E, M, S], widths [nₘ·2C] -> parts of 2C channels
    (source, then target).
    """
    return list(_RotateAndScale.apply(x, weights, wigner, source, target, tuple(widths)))


class _RotateAndScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        wigner: Tensor,
        source: Tensor,
        target: Tensor,
        widths: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        parts = tuple(weights.new_empty(len(source), w if m == 0 else 2 * w) for m, w in enumerate(widths))
        for c in chunks(len(source), x, 2 * wigner.shape[1] * x.shape[2]):
            rows = split_rows(rotated_pair(x, wigner[c], source[c], target[c]), widths)
            for part, row, w in zip(parts, rows, weights[c].split(widths, dim=1)):
                torch.mul(row, w[:, None], out=part[c].view(row.shape))
        ctx.save_for_backward(x, weights, wigner, source, target)
        ctx.widths = widths
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_parts: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, wigner, source, target = ctx.saved_tensors
        n_channels = x.shape[2]
        grad_x, grad_weights = torch.zeros_like(x, dtype=sum_dtype(x)), torch.empty_like(weights)
        for c in chunks(len(source), x, 2 * wigner.shape[1] * n_channels):
            z = rotated_pair(x, wigner[c], source[c], target[c])
            grad_z = torch.empty_like(z)
            rows, grad_rows = split_rows(z, ctx.widths), split_rows(grad_z, ctx.widths)
            split = zip(weights[c].split(ctx.widths, dim=1), grad_weights[c].split(ctx.widths, dim=1))
            for grad_part, row, grad_row, (w, grad_w) in zip(grad_parts, rows, grad_rows, split):
                g = grad_part[c].view(row.shape)
                torch.mul(g, w[:, None], out=grad_row)
                torch.mul(g[:, 0], row[:, 0], out=grad_w)
                if row.shape[1] == 2:
                    grad_w.addcmul_(g[:, 1], row[:, 1])
            pair = torch.bmm(wigner[c].transpose(1, 2), grad_z)
            for end, half in zip((source, target), pair.split(n_channels, dim=2)):
                grad_x.index_add_(0, end[c], half.contiguous().to(grad_x.dtype))
        return grad_x.to(x.dtype), grad_weights, None, None, None, None


def rotated_pair(x: Tensor, wigner: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """[E, M, 2C]: source and target nodes side by side in the frame of their edge."""
    return torch.bmm(wigner, torch.cat([x.index_select(0, source), x.index_select(0, target)], dim=2))


def split_rows(x: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Views of x [E, M, C] by order: [E, 1, n₀·C], then [E, 2, nₘ·C] for (+m, -m)."""
    sizes = [w if m == 0 else 2 * w for m, w in enumerate(widths)]
    return [part.unflatten(1, (-1, w)) for part, w in zip(x.flatten(1).split(sizes, dim=1), widths)]


def sphere_silu(gates: Tensor, parts: Sequence[Tensor], to_grid: Tensor, from_grid: Tensor) -> list[Tensor]:
    """Separable S2 activation: SiLU at every grid point for the rows l > 0, SiLU(gates) in place of l = 0.

    gates [E, H], parts of H channels, to_grid [P, M], from_grid [M, P] -> parts of H channels.
    """
    return list(_SphereSiLU.apply(to_grid, from_grid[1:], gates, *parts))


class _SphereSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, to_grid: Tensor, from_grid: Tensor, gates: Tensor, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        hidden = gates.shape[1]
        out = tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parts)
        for c in chunks(len(gates), gates, len(to_grid) * hidden):
            rows = torch.cat([p[c] for p in parts], dim=1).unflatten(1, (-1, hidden))
            rows = (from_grid @ F.silu(to_grid @ rows)).flatten(1)
            rows = torch.cat([F.silu(gates[c]), rows], dim=1)
            for o, row in zip(out, rows.split([p.shape[1] for p in parts], dim=1)):
                o[c] = row
        ctx.save_for_backward(to_grid, from_grid, gates, *parts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_out: Tensor) -> tuple[Tensor | None, ...]:
        to_grid, from_grid, gates, *parts = ctx.saved_tensors
        hidden = gates.shape[1]
        grad_parts = tuple(torch.empty_like(p, memory_format=torch.contiguous_format) for p in parts)
        for c in chunks(len(gates), gates, len(to_grid) * hidden):
            rows = torch.cat([p[c] for p in parts], dim=1).unflatten(1, (-1, hidden))
            grad = torch.cat([g[c] for g in grad_out], dim=1).unflatten(1, (-1, hidden))[:, 1:]
            grad = torch.ops.aten.silu_backward(from_grid.T @ grad, to_grid @ rows)
            grad = (to_grid.T @ grad).flatten(1)
            for o, row in zip(grad_parts, grad.split([p.shape[1] for p in parts], dim=1)):
                o[c] = row
        grad_gates = torch.ops.aten.silu_backward(grad_out[0][:, :hidden], gates)
        return None, None, grad_gates, *grad_parts


def rotate_back_and_sum(
    parts: Sequence[Tensor], alpha: Tensor, wigner_back: Tensor, target: Tensor, n_nodes: int
) -> Tensor:
    """Values times attention, back in the common frame, summed over the edges of each target: [N, S, V].

    parts of V channels, alpha [E, heads] (each head weights V/heads channels), wigner_back [E, S, M].
    """
    return _RotateBackAndSum.apply(alpha, wigner_back, target, n_nodes, *parts)


class _RotateBackAndSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, wigner_back: Tensor, target: Tensor, n_nodes: int, *parts: Tensor
    ) -> Tensor:
        n_rows = wigner_back.shape[2]
        width = sum(p.shape[1] for p in parts) // n_rows
        total = alpha.new_zeros(n_nodes, wigner_back.shape[1], width, dtype=sum_dtype(alpha))
        for c in chunks(len(target), alpha, n_rows * width):
            value = torch.cat([p[c] for p in parts], dim=1).view(-1, n_rows, width)
            message = torch.bmm(wigner_back[c], value * per_channel(alpha[c], width))
            total.index_add_(0, target[c], message.to(total.dtype))
        ctx.save_for_backward(alpha, wigner_back, target, *parts)
        return total.to(alpha.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        alpha, wigner_back, target, *parts = ctx.saved_tensors
        n_rows, (n_edges, heads) = wigner_back.shape[2], alpha.shape
        width = grad_total.shape[2]
        grad_alpha = torch.empty_like(alpha)
        grad_parts = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parts]
        for c in chunks(n_edges, alpha, n_rows * width):
            grad = torch.bmm(wigner_back[c].transpose(1, 2), grad_total.index_select(0, target[c]))
            value = torch.cat([p[c] for p in parts], dim=1).view(-1, n_rows, width)
            by_channel = (grad * value).sum(1)
            torch.sum(by_channel.unflatten(1, (heads, -1)), dim=2, out=grad_alpha[c])
            grad = (grad * per_channel(alpha[c], width)).flatten(1)
            for o, row in zip(grad_parts, grad.split([p.shape[1] for p in parts], dim=1)):
                o[c] = row
        return grad_alpha, None, None, None, *grad_parts


def per_channel(alpha: Tensor, width: int) -> Tensor:
    """[E, heads] -> [E, 1, width]; a product over an inner dimension of width/heads = 8 is 6 times slower."""
    return alpha.repeat_interleave(width // alpha.shape[1], dim=1)[:, None]
