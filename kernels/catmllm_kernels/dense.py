"""float32 products on a CPU by oneDNN, where torch itself calls MKL.

MKL keeps AMD processors to AVX2. Of one core of an EPYC with AVX-512 (992 x 192 by 512 x 192 and the like) it
makes 95 GFLOP/s, oneDNN, which torch's build has beside it, 215. Half precision goes to oneDNN anyway;
float64 stays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

LEAST = 1 << 20  # multiplications from which oneDNN's call, 10 µs longer than MKL's, is worth it


def _wins(x: Tensor, weight: Tensor) -> bool:
    return bool(
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= LEAST
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without gradient: x [T, I], weight [O, I], bias [O] -> [T, O]."""
    if _wins(x, weight):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def summed_outer(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out [M, N] = sum over t of a[t, :] b[t, :]ᵀ, a [T, M], b [T, N], without gradient."""
    if _wins(b.t(), a.t()):
        out.copy_(_onednn(b.t(), a.t()).t())  # this way round a third faster
    else:
        torch.mm(a.t(), b, out=out)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _onednn(rows, weight.t()).view(x.shape) if of_x else None,
            _onednn(x.flatten(0, -2).t(), rows.t()).t() if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """`nn.Linear` that takes the faster product; a plain one becomes it by its `__class__`."""

    def forward(self, x: Tensor) -> Tensor:
        if _wins(x, self.weight):
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
