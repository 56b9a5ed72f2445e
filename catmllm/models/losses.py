"""The supervised losses: MMTG (paper §6.8, Appendix A.4) and symmetric InfoNCE (§7.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


def mmtg_loss(mae: torch.Tensor, ce: torch.Tensor, lam: float = 1.0, sign: str = "+") -> torch.Tensor:
    """Max-min tanh-gated loss L_max (2 ± λ tanh L_min), element by element; with the sign "sum" their sum.

    mae, ce: non-negative losses of the same samples, any equal shape; 0 < lam <= 1. The paper prints `-` in
    Eq. 56 and proves its theorems for `+`. Under `-` the smaller loss has a negative coefficient, so it is
    pushed up; `+` is monotone in both.
    """
    if sign == "sum":
        return mae + ce
    high, low = torch.maximum(mae, ce), torch.minimum(mae, ce)
    gate = lam * torch.tanh(low)
    return high * (2 + gate if sign == "+" else 2 - gate)


def info_nce(graph: torch.Tensor, text: torch.Tensor, temperature: float, key: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of paired rows, with the rows of every rank as negatives but for those of an equal
    text: nothing tells these apart.

    graph, text [B, H]; row i of one belongs to row i of the other; key [B] int64 is equal for equal texts.
    Gradients flow into the rows of this rank and, through the gathered copies, into those of the others.
    Returns the mean loss of this rank's rows.
    """
    g, t = F.normalize(graph.float(), dim=1), F.normalize(text.float(), dim=1)
    all_g, all_t = _gather(g), _gather(t)
    rank = dist.get_rank() if dist.is_initialized() else 0
    target = torch.arange(len(g), device=g.device) + rank * len(g)
    same = key[:, None] == _gather(key)
    same[torch.arange(len(g), device=g.device), target] = False
    return (
        F.cross_entropy((g @ all_t.T / temperature).masked_fill(same, -torch.inf), target)
        + F.cross_entropy((t @ all_g.T / temperature).masked_fill(same, -torch.inf), target)
    ) / 2


class _Gather(torch.autograd.Function):
    """all_gather along rows whose backward gives each rank the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def _gather(x: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)
