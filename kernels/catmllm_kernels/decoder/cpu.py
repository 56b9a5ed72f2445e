"""The three ops by csrc/rows, each one pass over memory forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from catmllm_kernels import rows

DTYPES = (torch.float32, torch.bfloat16)
unfit = rows.unfit


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows.call("rms_norm", x.dtype, inverse.numel(), len(weight), eps, x, weight, out, inverse)
    return out, inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
    sizes = inverse.numel(), len(weight)
    rows.call("rms_norm_gradient", x.dtype, *sizes, x, weight, inverse, grad, of_x, of_weight)
    return of_x, of_weight


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query), torch.empty_like(key)
    for x, y in zip((query, key), out):
        rows.call("rotate", x.dtype, *x.shape, x, cos, sin, int(transposed), y)
    return out


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    rows.call("swiglu", gate.dtype, gate.numel(), gate, up, out)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    rows.call("swiglu_gradient", gate.dtype, gate.numel(), gate, up, grad, of_gate, of_up)
    return of_gate, of_up
