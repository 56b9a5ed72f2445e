"""The public ops: EquiformerV2's edge path as one differentiable operation, and its last step alone.

    edge_attention    gather, rotate, scale -> SO(2) product + activation -> SO(2) product -> attention,
                      rotate back, sum
    rotate_back_sum   the last step, for the edge-degree embedding

Registered with torch.library (`catmllm::edge_attention`, …): compile, FSDP2, activation checkpointing and
FakeTensor see one op with known shapes. First derivatives with respect to everything but the geometry
(wigner, graph, sphere).

Memory: per edge and layer autograd keeps `extra`, the hidden rows before and after the activation, `alpha`
and the radial function's last hidden layer. Rows and radial weights, 4 times as much, are made again in
backward: a gather and one product with 128 columns.

Autocast: x, radial and all weights are cast to autocast's dtype, the geometry is not, and the op runs outside
autocast. Softmax, norms and the sums over edges are in float32 whatever the dtype.

An implementation (`triton`, `cpu`, `reference`; see backend.py) is a module with

    edge_attention_forward(inputs: EdgeAttention, save: bool) -> (sum, extra, hidden, active, alpha)
    edge_attention_backward(grad, inputs, extra, hidden, active, alpha) -> list of gradients,
        in the order of `gradients_of`
    rotate_back_sum_forward(values, alpha, wigner, graph, n_nodes, lmax, mmax) -> sum [N, S, V]
    rotate_back_sum_backward(grad, values, alpha, wigner, graph, lmax, mmax) -> (grad_values, grad_alpha)

without autograd of their own, whose outputs own their memory.
Without `save` the last four of the forward are not needed and may be anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from catmllm_kernels.backend import implementation
from catmllm_kernels.escn.layout import (
    LEARNED,
    EdgeAttention,
    EdgeGraph,
    Sphere,
    gradients_of,
    n_rows,
    wigner_offset,
)
from catmllm_kernels.schema import arguments_of

OP = "escn"
ARGUMENTS = arguments_of(EdgeAttention)
PRODUCTS = [name for name in LEARNED if not name.startswith("alpha_")]  # of one dtype, which autocast chooses


def edge_attention(a: EdgeAttention) -> Tensor:
    """Nodes [N, S, C] -> sum over the edges of each target [N, S, V], before the output projection.

    Shapes and dtypes: `EdgeAttention`; layouts: layout.py; meaning: reference.py. Source: fairchem 1.10's
    SO2EquivariantGraphAttention. Raises TypeError where dtypes differ and ValueError where shapes do not fit.

    One edge from node 0 to node 1 at lmax 1, mmax 0, with every weight one:

    >>> from catmllm_kernels.escn import EdgeAttention, edge_attention, edge_graph
    >>> ones = torch.ones
    >>> out = edge_attention(EdgeAttention(
    ...     x=ones(2, 4, 1), radial=ones(1, 1), radial_weight=ones(4, 1), radial_bias=torch.zeros(4),
    ...     wigner=torch.tensor([[1.0, 0.0, 1.0, 0.0]]), graph=edge_graph(torch.tensor([[0], [1]]), 2),
    ...     conv1=[ones(1 + 1 + 2, 4)], conv1_bias=torch.zeros(4), alpha_norm=None, alpha_dot=ones(1, 1),
    ...     conv2=[ones(2, 2)], conv2_bias=torch.zeros(2), sphere=None, lmax=1, mmax=0,
    ... ))
    >>> out.shape, out[1, :, 0]
    (torch.Size([2, 4, 1]), tensor([ 7.8561,  0.0000, 13.6072,  0.0000]))
    """
    device = a.x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        a = a._replace(**{n: tree_map(lambda t: t.to(dtype), getattr(a, n)) for n in PRODUCTS})
    dtypes = [t.dtype for name in PRODUCTS for t in tree_flatten(getattr(a, name))[0]]
    if len(set(dtypes)) > 1:
        raise TypeError(f"nodes, radial and weights must share one dtype, not {dtypes}")
    n_edges, s, p = len(a.graph.source), (a.lmax + 1) ** 2, wigner_offset(a.lmax + 1, a.mmax)
    if a.x.shape[1] != s or a.wigner.shape != (n_edges, p):
        raise ValueError(
            f"lmax {a.lmax}, mmax {a.mmax} and {n_edges} edges want nodes [N, {s}, C] and wigner [{n_edges}, "
            f"{p}], not {list(a.x.shape)} and {list(a.wigner.shape)}"
        )
    save = torch.is_grad_enabled() and any(t.requires_grad for t in gradients_of(a))
    with torch.autocast(device, enabled=False):
        return _attention(*to_op(a), save)[0]


def to_op(a: EdgeAttention) -> list[Any]:
    """The arguments of the registered op: contiguous, what holds several tensors as a list."""
    parts = [list(p) if isinstance(p, tuple) else p for p in a]
    parts = [[] if p is None and name != "keep" else p for name, p in zip(a._fields, parts, strict=True)]
    return tree_map(lambda t: t.contiguous() if isinstance(t, Tensor) else t, parts)


def from_op(inputs: Sequence[Any]) -> EdgeAttention:
    """The inverse of `to_op`."""
    a = EdgeAttention(*inputs)
    norm = (a.alpha_norm[0], a.alpha_norm[1]) if a.alpha_norm else None
    sphere = Sphere(*a.sphere) if a.sphere else None
    return a._replace(graph=EdgeGraph(*a.graph), alpha_norm=norm, sphere=sphere)


@torch.library.custom_op(
    "catmllm::edge_attention",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, save = inputs
    a = from_op(arguments)
    total, *kept = implementation(OP, a.x).edge_attention_forward(a, save)
    return total, *(kept if save else (a.x.new_empty(0) for _ in range(4)))


@_attention.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, save = inputs
    a = from_op(arguments)
    total = a.x.new_empty(a.x.shape[0], a.x.shape[1], a.width)
    if not save:
        return total, *(a.x.new_empty(0) for _ in range(4))
    n, hidden = a.radial.shape[0], n_rows(a.lmax, a.mmax) * a.hidden
    alpha = a.x.new_empty(n, a.alpha_dot.shape[0], dtype=torch.promote_types(a.x.dtype, torch.float32))
    return total, a.x.new_empty(n, a.n_extra), a.x.new_empty(n, hidden), a.x.new_empty(n, hidden), alpha


@torch.library.custom_op(
    "catmllm::edge_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] kept, {ARGUMENTS}) -> Tensor[]",
)
def _attention_backward(grad: Tensor, kept: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
    a = from_op(inputs)
    return implementation(OP, a.x).edge_attention_backward(grad.contiguous(), a, *kept)


@_attention_backward.register_fake
def _(grad: Tensor, kept: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in gradients_of(from_op(inputs))]


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    leaves, ctx.structure = tree_flatten(list(inputs[:-1]))
    ctx.plain = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    ctx.save_for_backward(*output[1:], *(leaf for leaf in leaves if isinstance(leaf, Tensor)))


def _attention_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)  # to be asked for once
    kept = [next(saved) for _ in range(4)]
    leaves = [plain[0] if plain else next(saved) for plain in ctx.plain]
    inputs = tree_unflatten(leaves, ctx.structure)
    found = iter([] if grad is None else _attention_backward(grad, kept, *inputs))

    def gradient(name: str, part: Any) -> Any:
        learned = name in LEARNED and grad is not None
        return tree_map(lambda _: next(found) if learned else None, part)

    return *(gradient(name, p) for name, p in zip(EdgeAttention._fields, inputs, strict=True)), None


_attention.register_autograd(_attention_gradient, setup_context=_attention_context)


def rotate_back_sum(
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, n_nodes: int, lmax: int, mmax: int
) -> Tensor:
    """Values [E, R', V] times alpha [E, heads], rotated back, summed over the edges of each target:
    [N, S, V].

    R' is R, or lmax+1 for messages of m = 0 alone. alpha in float32 (float64 for float64 values).

    Two edges into node 0 whose values have l = 0 alone, which nothing turns:

    >>> from catmllm_kernels.escn import edge_graph
    >>> graph = edge_graph(torch.tensor([[0, 1], [0, 0]]), n_nodes=2)
    >>> values, alpha = torch.tensor([[[1.0], [0.0]], [[2.0], [0.0]]]), torch.tensor([[0.25], [0.75]])
    >>> wigner = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).repeat(2, 1)
    >>> rotate_back_sum(values, alpha, wigner, graph, n_nodes=2, lmax=1, mmax=0)[:, 0]
    tensor([[1.7500],
            [0.0000]])
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
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: Any, n_nodes: int, lmax: int, mmax: int
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
