"""The public ops: EquiformerV2's edge path as one differentiable operation, and its last step alone.

    edge_attention    gather, rotate, scale -> SO(2) product + activation -> SO(2) product -> attention, rotate back, sum
    rotate_back_sum   the last step, for the edge-degree embedding

Registered with torch.library (`catmllm::edge_attention`, …): compile, FSDP2, activation checkpointing and FakeTensor see
one op with known shapes. First derivatives with respect to everything but the geometry (wigner, graph, sphere).

Memory: per edge and layer autograd keeps `extra`, the hidden rows before and after the activation, `alpha` and the radial
function's last hidden layer. Rows and radial weights, 4 times as much, are made again in backward: a
gather and one product with 128 columns.

Autocast: x, radial and all weights are cast to autocast's dtype, the geometry is not, and the op runs outside autocast.
Softmax, norms and the sums over edges are in float32 whatever the dtype.

An implementation (`triton`, `cpu`, `reference`; see backend.py) is a module with

    edge_attention_forward(inputs: EdgeAttention, save: bool) -> (sum, extra, hidden, active, alpha)
    edge_attention_backward(grad, inputs, extra, hidden, active, alpha) -> list of gradients, in order of `gradients_of`
    rotate_back_sum_forward(values, alpha, wigner, graph, n_nodes, lmax, mmax) -> sum [N, S, V]
    rotate_back_sum_backward(grad, values, alpha, wigner, graph, lmax, mmax) -> (grad_values, grad_alpha)

without autograd of their own, whose outputs own their memory. Without `save` the last four of the forward are not needed
and may be anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from catmllm_kernels.backend import implementation
from catmllm_kernels.escn.layout import (
    EdgeAttention,
    EdgeGraph,
    Sphere,
    gradients_of,
    n_rows,
    wigner_offset,
)

OP = "escn"


def edge_attention(
    x: Tensor,
    radial: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    wigner: Tensor,
    graph: EdgeGraph,
    conv1: Sequence[Tensor],
    conv1_bias: Tensor,
    alpha_norm: tuple[Tensor, Tensor] | None,
    alpha_dot: Tensor,
    conv2: Sequence[Tensor],
    conv2_bias: Tensor,
    sphere: Sphere | None,
    lmax: int,
    mmax: int,
    keep: Tensor | None = None,
) -> Tensor:
    """Nodes [N, S, C] -> sum over the edges of each target [N, S, V], before the output projection.

    Shapes and dtypes: `EdgeAttention`; layouts: layout.py; meaning: reference.py. Source: fairchem 1.10's
    SO2EquivariantGraphAttention. Raises TypeError where dtypes differ and ValueError where shapes do not fit.
    """
    device = x.device.type
    dot, norm = alpha_dot, list(alpha_norm or ())
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, radial, radial_weight, radial_bias, conv1_bias, conv2_bias = (
            t.to(dtype) for t in (x, radial, radial_weight, radial_bias, conv1_bias, conv2_bias)
        )
        conv1, conv2 = [w.to(dtype) for w in conv1], [w.to(dtype) for w in conv2]
    learned = [x, radial, radial_weight, radial_bias, *conv1, conv1_bias, *conv2, conv2_bias]
    if len({t.dtype for t in learned}) > 1:
        raise TypeError(f"nodes, radial and weights must share one dtype, not {[t.dtype for t in learned]}")
    n_edges, s = len(graph.source), (lmax + 1) ** 2
    if x.shape[1] != s or wigner.shape != (n_edges, wigner_offset(lmax + 1, mmax)):
        raise ValueError(
            f"lmax {lmax}, mmax {mmax} and {n_edges} edges want nodes [N, {s}, C] and wigner "
            f"[{n_edges}, {wigner_offset(lmax + 1, mmax)}], not {list(x.shape)} and {list(wigner.shape)}"
        )
    save = torch.is_grad_enabled() and any(t.requires_grad for t in [*learned, dot, *norm])
    with torch.autocast(device, enabled=False):
        return _attention(
            x.contiguous(),
            radial.contiguous(),
            radial_weight.contiguous(),
            radial_bias.contiguous(),
            wigner.contiguous(),
            list(graph),
            [w.contiguous() for w in conv1],
            conv1_bias.contiguous(),
            [w.contiguous() for w in norm],
            dot.contiguous(),
            [w.contiguous() for w in conv2],
            conv2_bias.contiguous(),
            list(sphere or ()),
            lmax,
            mmax,
            keep,
            save,
        )[0]


def _unflatten(
    x: Tensor,
    radial: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    wigner: Tensor,
    graph: Sequence[Tensor],
    conv1: Sequence[Tensor],
    conv1_bias: Tensor,
    alpha_norm: Sequence[Tensor],
    alpha_dot: Tensor,
    conv2: Sequence[Tensor],
    conv2_bias: Tensor,
    sphere: Sequence[Tensor],
    lmax: int,
    mmax: int,
    keep: Tensor | None,
) -> EdgeAttention:
    norm = (alpha_norm[0], alpha_norm[1]) if alpha_norm else None
    return EdgeAttention(
        x,
        radial,
        radial_weight,
        radial_bias,
        wigner,
        EdgeGraph(*graph),
        list(conv1),
        conv1_bias,
        norm,
        alpha_dot,
        list(conv2),
        conv2_bias,
        Sphere(*sphere) if sphere else None,
        lmax,
        mmax,
        keep,
    )


@torch.library.custom_op("catmllm::edge_attention", mutates_args=())
def _attention(
    x: Tensor,
    radial: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    wigner: Tensor,
    graph: Sequence[Tensor],
    conv1: Sequence[Tensor],
    conv1_bias: Tensor,
    alpha_norm: Sequence[Tensor],
    alpha_dot: Tensor,
    conv2: Sequence[Tensor],
    conv2_bias: Tensor,
    sphere: Sequence[Tensor],
    lmax: int,
    mmax: int,
    keep: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a = _unflatten(x, radial, radial_weight, radial_bias, wigner, graph, conv1, conv1_bias, alpha_norm,
                   alpha_dot, conv2, conv2_bias, sphere, lmax, mmax, keep)  # fmt: skip
    total, *kept = implementation(OP, x).edge_attention_forward(a, save)
    extra, hidden, active, alpha = kept if save else (x.new_empty(0) for _ in range(4))
    return total, extra, hidden, active, alpha


@_attention.register_fake
def _(x: Tensor, radial: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a = _unflatten(x, radial, *rest[:-1])
    total = x.new_empty(x.shape[0], x.shape[1], a.width)
    if not rest[-1]:
        return total, x.new_empty(0), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    n = radial.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    hidden = n_rows(a.lmax, a.mmax) * a.hidden
    return (
        total,
        x.new_empty(n, a.n_extra),
        x.new_empty(n, hidden),
        x.new_empty(n, hidden),
        x.new_empty(n, a.alpha_dot.shape[0], dtype=wide),
    )


@torch.library.custom_op("catmllm::edge_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    kept: Sequence[Tensor],
    x: Tensor,
    radial: Tensor,
    radial_weight: Tensor,
    radial_bias: Tensor,
    wigner: Tensor,
    graph: Sequence[Tensor],
    conv1: Sequence[Tensor],
    conv1_bias: Tensor,
    alpha_norm: Sequence[Tensor],
    alpha_dot: Tensor,
    conv2: Sequence[Tensor],
    conv2_bias: Tensor,
    sphere: Sequence[Tensor],
    lmax: int,
    mmax: int,
    keep: Tensor | None,
) -> list[Tensor]:
    a = _unflatten(x, radial, radial_weight, radial_bias, wigner, graph, conv1, conv1_bias, alpha_norm,
                   alpha_dot, conv2, conv2_bias, sphere, lmax, mmax, keep)  # fmt: skip
    return implementation(OP, x).edge_attention_backward(grad.contiguous(), a, *kept)


@_attention_backward.register_fake
def _(grad: Tensor, kept: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in gradients_of(_unflatten(*inputs))]


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.counts = [len(part) if isinstance(part, list | tuple) else -1 for part in inputs[:13]]
    flat = [t for part in inputs[:13] for t in (part if isinstance(part, list | tuple) else [part])]
    ctx.sizes = inputs[13:15]
    ctx.has_keep = inputs[15] is not None
    ctx.save_for_backward(*output[1:], *flat, *([inputs[15]] if ctx.has_keep else []))


def _attention_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    kept, tensors = tensors[:4], tensors[4:]
    parts: list[Any] = []
    for count in ctx.counts:
        parts.append(tensors[0] if count < 0 else tensors[:count])
        tensors = tensors[max(count, 1) if count < 0 else count :]
    if grad is None:
        return (*([None] * len(p) if isinstance(p, list) else None for p in parts), None, None, None, None)
    inputs = (*parts, *ctx.sizes, tensors[0] if ctx.has_keep else None)
    out = iter(_attention_backward(grad, kept, *inputs))
    n_conv, n_norm = len(parts[6]), len(parts[8])
    x, radial, weight, bias = (next(out) for _ in range(4))
    conv1, conv1_bias = [next(out) for _ in range(n_conv)], next(out)
    norm, dot = [next(out) for _ in range(n_norm)], next(out)
    conv2, conv2_bias = [next(out) for _ in range(n_conv)], next(out)
    no_graph, no_sphere = [None] * len(parts[5]), [None] * len(parts[12])
    return (x, radial, weight, bias, None, no_graph, conv1, conv1_bias, norm, dot, conv2, conv2_bias,
            no_sphere, None, None, None, None)  # fmt: skip


_attention.register_autograd(_attention_gradient, setup_context=_attention_context)


def rotate_back_sum(
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, n_nodes: int, lmax: int, mmax: int
) -> Tensor:
    """Values [E, R', V] times alpha [E, heads], rotated back, summed over the edges of each target: [N, S, V].

    R' is R, or lmax+1 for messages of m = 0 alone. alpha in float32 (float64 for float64 values).
    """
    return _rotate_back_sum(
        values.contiguous(), alpha.contiguous(), wigner.contiguous(), list(graph), n_nodes, lmax, mmax
    )


@torch.library.custom_op("catmllm::rotate_back_sum", mutates_args=())
def _rotate_back_sum(
    values: Tensor,
    alpha: Tensor,
    wigner: Tensor,
    graph: Sequence[Tensor],
    n_nodes: int,
    lmax: int,
    mmax: int,
) -> Tensor:
    return implementation(OP, values).rotate_back_sum_forward(
        values, alpha, wigner, EdgeGraph(*graph), n_nodes, lmax, mmax
    )


@_rotate_back_sum.register_fake
def _(
    values: Tensor,
    alpha: Tensor,
    wigner: Tensor,
    graph: Sequence[Tensor],
    n_nodes: int,
    lmax: int,
    mmax: int,
) -> Tensor:
    return values.new_empty(n_nodes, (lmax + 1) ** 2, values.shape[2])


@torch.library.custom_op("catmllm::rotate_back_sum_backward", mutates_args=())
def _rotate_back_sum_backward(
    grad: Tensor,
    values: Tensor,
    alpha: Tensor,
    wigner: Tensor,
    graph: Sequence[Tensor],
    lmax: int,
    mmax: int,
) -> tuple[Tensor, Tensor]:
    return implementation(OP, values).rotate_back_sum_backward(
        grad.contiguous(), values, alpha, wigner, EdgeGraph(*graph), lmax, mmax
    )


@_rotate_back_sum_backward.register_fake
def _(grad: Tensor, values: Tensor, alpha: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(alpha)


def _rotate_back_sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, alpha, wigner, graph, _, *ctx.sizes = inputs
    ctx.save_for_backward(values, alpha, wigner, *graph)


def _rotate_back_sum_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    values, alpha, wigner, *graph = ctx.saved_tensors
    grads = _rotate_back_sum_backward(grad, values, alpha, wigner, graph, *ctx.sizes)
    return (*grads, None, [None] * len(graph), None, None, None)


_rotate_back_sum.register_autograd(_rotate_back_sum_gradient, setup_context=_rotate_back_sum_context)
