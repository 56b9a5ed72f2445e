"""The definitions, in float32 or wider, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over the root of its rows' mean square, times weight [H]."""
    a, w = _wide(x, weight)
    return (w * a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query [T, H, D] and key [T, K, D] turned by the angles of each token, cos and sin [T, D]."""
    c, s = (x[:, None] for x in _wide(cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = _wide(x)[0].chunk(2, -1)
        return (torch.cat([a, b], -1) * c + torch.cat([-b, a], -1) * s).to(x.dtype)

    return turned(query), turned(key)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    g, u = _wide(gate, up)
    return (torch.nn.functional.silu(g) * u).to(gate.dtype)
