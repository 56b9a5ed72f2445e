"""The definition: EquiformerV2's edge path in plain torch, differentiable, in any floating dtype.
Layouts: `layout.py`.

A message is: both end nodes turned into the frame of the edge, cut to |m| <= mmax and scaled by radial
weights; one complex matrix per m (eSCN, arXiv 2302.03655); a nonlinearity; a second matrix per m; attention
over the edges of a target; back to the common frame; summed. Names and conventions are fairchem 1.10's. Half
precision: products in the inputs' dtype (their accumulation is float32), softmax, norms and the sum over
edges in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from catmllm_kernels.backend import autograd_again
from catmllm_kernels.escn.layout import (
    EdgeAttention,
    EdgeGraph,
    Sphere,
    first_row,
    gradients_of,
    half_of,
    kept,
    lost_order_scale,
    n_rows,
    row_of,
    rows_of,
    wave_of,
    wigner_offset,
    with_learned,
)


def edge_attention(a: EdgeAttention) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum [N, S, V], extra [E, heads·A + gates], hidden before [E, R·C'] and
    after [E, R·C'] the activation, alpha [E, heads])."""
    lmax, mmax, n_alpha = a.lmax, a.mmax, a.alpha_dot.numel()
    weights = F.linear(a.radial, a.radial_weight, a.radial_bias)
    rows = gather_rotate(a.x, weights, a.wigner, a.graph, lmax, mmax)
    extra, hidden, active = product_and_activation(a, rows)
    alpha = attention_weights(extra[:, :n_alpha], a.alpha_norm, a.alpha_dot, a.graph, len(a.x))
    _, values = so2_product(active, a.conv2, a.conv2_bias, 0, lmax, mmax)
    weighted = alpha if a.keep is None else alpha * a.keep
    total = rotate_back_sum(values, weighted, a.wigner, a.graph, len(a.x), lmax, mmax)
    return total, extra, hidden.flatten(1), active.flatten(1), alpha


def product_and_activation(a: EdgeAttention, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [E, R, 2C] through the first product: (extra [E, heads·A + gates], hidden [E, R, C'] before and
    after the activation)."""
    extra, hidden = so2_product(rows, a.conv1, a.conv1_bias, a.n_extra, a.lmax, a.mmax)
    gates = extra[:, a.alpha_dot.numel() :]
    if a.sphere is None:
        return extra, hidden, gate_activation(hidden, gates, a.lmax, a.mmax)
    return extra, hidden, sphere_activation(hidden, gates, a.sphere, a.lmax, a.mmax)


def gather_rotate(
    x: Tensor, weights: Tensor, wigner: Tensor, graph: EdgeGraph, lmax: int, mmax: int
) -> Tensor:
    """Nodes [N, S, C], radial weights [E, H·2C] -> rows [E, R, 2C],
    channels of the source before the target's."""
    pair = torch.cat([x.index_select(0, graph.source), x.index_select(0, graph.target)], dim=2)
    blocks = [
        block.to(x.dtype) @ pair[:, l * l : (l + 1) ** 2]
        for l, block in enumerate(wigner_blocks(wigner, lmax, mmax))
    ]
    rows = torch.cat(blocks, dim=1).index_select(1, index_of("by m", lmax, mmax, x.device))
    weights = weights.unflatten(1, (-1, pair.shape[2]))
    return rows * weights.index_select(1, index_of("radial", lmax, mmax, x.device))


def so2_product(
    rows: Tensor, weights: Sequence[Tensor], bias: Tensor, n_extra: int, lmax: int, mmax: int
) -> tuple[Tensor, Tensor]:
    """Rows [E, R, C] -> (extra [E, n_extra], rows [E, R, C']): y₊ + i·y₋ = (r + i·s)(x₊ + i·x₋),
    weights[m] = (r; s).

    weights[0] [n_extra + n_0·C', n_0·C] with `bias` of its length; weights[m] [2·n_m·C', n_m·C].
    """
    first = by_degree(rows[:, : lmax + 1], weights[0], bias)
    extra, out = first.split([n_extra, first.shape[1] - n_extra], dim=1)
    parts = [out]
    for m in range(1, mmax + 1):
        start, n = first_row(lmax, m), lmax + 1 - m
        plus, minus = rows[:, start : start + 2 * n].split(n, dim=1)
        r, s = weights[m].chunk(2)
        parts += [by_degree(plus, r) - by_degree(minus, s), by_degree(minus, r) + by_degree(plus, s)]
    return extra, torch.cat(parts, dim=1).unflatten(1, (n_rows(lmax, mmax), -1))


def by_degree(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [E, n, C] times weight [out, n·C], plus bias: [E, out].

    A degree at a time: float32 sums over C terms and then n err by three quarters of what one over n·C does.
    In half precision, where a part would be rounded, it is one product.
    """
    if rows.dtype in (torch.float16, torch.bfloat16):
        return F.linear(rows.flatten(1), weight, bias)
    first, *rest = zip(rows.unbind(1), weight.unflatten(1, rows.shape[1:]).unbind(1), strict=True)
    out = F.linear(*first, bias)
    for row, part in rest:
        out = torch.addmm(out, row, part.T)
    return out


def real_form(weight: Tensor) -> Tensor:
    """(r; s) [2·out, in] -> [[r, -s], [s, r]] [2·out, 2·in], which acts on (x₊, x₋)."""
    r, s = weight.chunk(2)
    return torch.cat([torch.cat([r, -s], dim=1), torch.cat([s, r], dim=1)])


def gate_activation(rows: Tensor, gates: Tensor, lmax: int, mmax: int) -> Tensor:
    """SiLU on l = 0 (its own gate, as SiLU(x) = x·σ(x)), every degree l > 0 times σ(gates [E, lmax·C'])."""
    all_gates = torch.cat([rows[:, :1], gates.unflatten(1, (lmax, rows.shape[2]))], dim=1)
    return rows * torch.sigmoid(all_gates).index_select(1, index_of("degree", lmax, mmax, rows.device))


def sphere_activation(rows: Tensor, gates: Tensor, sphere: Sphere, lmax: int, mmax: int) -> Tensor:
    """SiLU at every point of the sphere grid; the l = 0 row is SiLU(gates [E, C']) instead ("separable").

    Latitudes and longitudes in turn: 18 terms a sum, where the matrix [324, R] of
    the whole grid had 324 and float32 three times the error.
    """
    radial, order = (index_of(name, lmax, mmax, rows.device) for name in ("radial", "order"))
    to_lat, from_lat, lon = (table.to(rows.dtype) for table in sphere)
    pick = F.one_hot(order, 2 * mmax + 1).to(rows.dtype)  # [R, 2M+1] which wave a row belongs to
    waves = (to_lat[:, None, radial] * pick.T).flatten(0, 1) @ rows  # [E, latitudes·(2M+1), C']
    points = F.silu(lon @ waves.unflatten(1, (-1, lon.shape[1])))  # [E, latitudes, longitudes, C']
    waves = (lon.T @ points).flatten(1, 2)
    back = (from_lat[:, None, radial] * pick.T).flatten(0, 1).T[1:] @ waves
    return torch.cat([F.silu(gates)[:, None], back], dim=1)


def attention_weights(
    logits: Tensor, norm: tuple[Tensor, Tensor] | None, dot: Tensor, graph: EdgeGraph, n_nodes: int
) -> Tensor:
    """Softmax over the edges of each target: [E, heads·A] -> [E, heads], in at least float32. dot [heads, A].

    float32 is calculated in float64, where there is such a type: the gradient of the norm's bias is a sum
    over edges that cancels to a tenth of its terms.
    """
    narrow = logits.dtype in (torch.float16, torch.bfloat16) or logits.device.type == "mps"
    wide = torch.float32 if narrow else torch.float64
    x = logits.to(wide).unflatten(1, dot.shape)
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm[0].to(wide), norm[1].to(wide), 1e-5)
    x = 0.2 * x + 0.8 * F.silu(x)  # fairchem's SmoothLeakyReLU, multiplied out
    x = (x * dot.to(wide)).sum(2)
    top = x.new_zeros(n_nodes, x.shape[1]).scatter_reduce(
        0, graph.target[:, None].expand_as(x), x.detach(), "amax", include_self=False
    )
    weight = torch.exp(x - top.index_select(0, graph.target))
    total = weight.new_zeros(n_nodes, x.shape[1]).index_add(0, graph.target, weight)
    alpha = weight / total.index_select(0, graph.target)
    return alpha.to(torch.promote_types(logits.dtype, torch.float32))


def rotate_back_sum(
    values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, n_nodes: int, lmax: int, mmax: int
) -> Tensor:
    """Values [E, R', V] times alpha [E, heads] (V/heads channels each), rotated back and summed: [N, S, V].

    R' is R, or lmax+1 where a message has m = 0 alone; mmax is the one
    of `wigner` (and of the scale of cut rows).
    """
    n, width = len(values), values.shape[2]
    only_zero = values.shape[1] == lmax + 1
    weighted = values.unflatten(2, (alpha.shape[1], -1)) * alpha.to(values.dtype)[:, None, :, None]
    weighted = weighted.flatten(2)
    if not only_zero:
        weighted = weighted.index_select(1, index_of("by l", lmax, mmax, values.device))
    blocks, row = [], 0
    for l, block in enumerate(wigner_blocks(wigner, lmax, mmax)):
        k = min(l, mmax)
        size = 1 if only_zero else 2 * k + 1
        block = (block[:, k : k + 1] if only_zero else block) * lost_order_scale(l, mmax)
        blocks.append(block.to(values.dtype).transpose(1, 2) @ weighted[:, row : row + size])
        row += size
    message = torch.cat(blocks, dim=1)
    wide = torch.promote_types(message.dtype, torch.float32)
    total = message.new_zeros(n_nodes, message.shape[1] if n else (lmax + 1) ** 2, width, dtype=wide)
    return total.index_add(0, graph.target, message.to(wide)).to(values.dtype)


def wigner_blocks(wigner: Tensor, lmax: int, mmax: int) -> list[Tensor]:
    """The packed matrices as views [E, 2·min(l, M)+1, 2l+1] for l = 0 … L."""
    return [
        wigner[:, wigner_offset(l, mmax) : wigner_offset(l + 1, mmax)].unflatten(1, (-1, 2 * l + 1))
        for l in range(lmax + 1)
    ]


@lru_cache
def index_of(what: str, lmax: int, mmax: int, device: torch.device) -> Tensor:
    """Constant row indices. "by m": rows of the blocks in m-primary order, "by l": its inverse, "degree": l,
    "radial": the row m >= 0 that shares weights, "order": the column of `Sphere.lon`."""
    rows, blocks = rows_of(lmax, mmax), kept(lmax, mmax)
    index = {
        "by m": lambda: [blocks.index(lm) for lm in rows],
        "by l": lambda: [row_of(l, m, lmax) for l, m in blocks],
        "degree": lambda: [l for l, _ in rows],
        "radial": lambda: [half_of(l, m, lmax) for l, m in rows],
        "order": lambda: [wave_of(abs(m), m < 0) for _, m in rows],
    }[what]()
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return torch.tensor(index, device=device)


# --------------------------------------------------------------------------------------- as an implementation


def edge_attention_forward(a: EdgeAttention, save: bool) -> tuple[Tensor, ...]:
    with torch.no_grad():
        total, extra, *rest = edge_attention(a)
        return total, extra.contiguous(), *rest


def edge_attention_backward(
    grad: Tensor, a: EdgeAttention, extra: Tensor, hidden: Tensor, active: Tensor, alpha: Tensor
) -> list[Tensor]:
    """By autograd through the definition, run once more."""
    leaves = [t.detach().requires_grad_() for t in gradients_of(a)]
    with autograd_again():
        total = edge_attention(with_learned(a, leaves))[0]
        return list(torch.autograd.grad(total, leaves, grad))


def rotate_back_sum_forward(*inputs: Any) -> Tensor:
    with torch.no_grad():
        return rotate_back_sum(*inputs)


def rotate_back_sum_backward(
    grad: Tensor, values: Tensor, alpha: Tensor, wigner: Tensor, graph: EdgeGraph, lmax: int, mmax: int
) -> tuple[Tensor, Tensor]:
    values, alpha = values.detach().requires_grad_(), alpha.detach().requires_grad_()
    with autograd_again():
        total = rotate_back_sum(values, alpha, wigner, graph, len(grad), lmax, mmax)
        grad_values, grad_alpha = torch.autograd.grad(total, (values, alpha), grad)
    return grad_values, grad_alpha
