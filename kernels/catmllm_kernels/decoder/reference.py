"""The definitions, in float32 or wider, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from catmllm_kernels.backend import autograd_again


def wide(dtype: torch.dtype) -> torch.dtype:
    """What it is calculated in."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over the root of its rows' mean square, times weight [H]."""
    a, w = (t.to(wide(t.dtype)) for t in (x, weight))
    return (w * a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """query [T, H, D] and key [T, K, D] turned by the angles of each token, cos and sin [T, D];
    `transposed`: the gradient's way."""
    c, s = (t[:, None].to(wide(t.dtype)) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        y = x.to(c.dtype)
        if transposed:
            first, second = (y * s).chunk(2, -1)
            return (y * c + torch.cat([second, -first], -1)).to(x.dtype)
        first, second = y.chunk(2, -1)
        return (y * c + torch.cat([-second, first], -1) * s).to(x.dtype)

    return turned(query), turned(key)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    g, u = (t.to(wide(t.dtype)) for t in (gate, up))
    return (torch.nn.functional.silu(g) * u).to(gate.dtype)


# --------------------------------------------------------------------------------------- as an implementation


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(result, zeros): the backward pass below does not need the inverse roots,
    the op promises their shape."""
    with torch.no_grad():
        return rms_norm(x, weight, eps), x.new_zeros(x.shape[:-1], dtype=torch.float32)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """By autograd through the definition, run once more; the weight's in float32 or wider,
    as `cpu` gives it."""
    a, w = x.detach().requires_grad_(), weight.detach().to(wide(weight.dtype)).requires_grad_()
    with autograd_again():
        of_x, of_weight = torch.autograd.grad(rms_norm(a, w, eps), (a, w), grad)
    return of_x, of_weight


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    with torch.no_grad():
        return swiglu(gate, up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """By autograd through the definition, run once more."""
    g, u = (t.detach().requires_grad_() for t in (gate, up))
    with autograd_again():
        of_gate, of_up = torch.autograd.grad(swiglu(g, u), (g, u), grad)
    return of_gate, of_up
