"""The public ops on a CPU, each one pass over memory in csrc/rows forward and one backward.

Of 2,100 tokens with H = 192 in bf16, forward and backward on one thread, they take less than a fifth of the time of
torch's separate operators. On CUDA, under a compiler, which fuses the separate operators itself, and in float16, whose
large values want hooks between them, `fits` says no, and the model's own operators run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from catmllm_kernels import rows
from catmllm_kernels.backend import NAMES, warn_once


def fits(*tensors: Tensor) -> bool:
    """Whether csrc/rows takes these tensors, all of one dtype: on a CPU, float32 or bfloat16. CATMLLM_KERNELS=reference or
    triton forbids it."""
    forced, first = os.environ.get("CATMLLM_KERNELS", ""), tensors[0]
    if forced not in ("", *NAMES):
        raise ValueError(f"CATMLLM_KERNELS={forced!r}; choose one of {', '.join(NAMES)}")
    if forced in ("triton", "reference") or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if any(t.dtype != first.dtype or t.device.type != "cpu" for t in tensors):
        return False
    if first.dtype not in (torch.float32, torch.bfloat16):
        return False
    if why := rows.unfit(first):
        warn_once("decoder", why)
        return False
    return True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] / sqrt(mean of x² over H + eps) · weight [H] -> as x. Differentiable once in x and weight.

    Raises ValueError for shapes that do not fit and for tensors that `fits` refuses, as the others do.
    """
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"need x [..., H] and weight [H], not {list(x.shape)} and {list(weight.shape)}")
    _must_fit(x, weight)
    return torch.ops.catmllm.rms_norm(x.contiguous(), weight.contiguous(), eps)[0]


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding: x · cos + (-x2, x1) · sin of the halves x1, x2 of each head.

    query [T, H, D], key [T, K, D], cos and sin [T, D] -> as query, as key. Differentiable once in query and key.
    """
    tokens, width = cos.shape[0], cos.shape[-1]
    fit = all(x.ndim == 3 and (len(x), x.shape[2]) == (tokens, width) for x in (query, key))
    if not fit or cos.ndim != 2 or cos.shape != sin.shape or width % 2:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, cos, sin))
        raise ValueError(f"need query [T, H, D], key [T, K, D], cos and sin [T, D] with D even, not {shapes}")
    _must_fit(query, key, cos, sin)
    plain = (x.contiguous() for x in (query, key, cos.detach(), sin.detach()))
    return torch.ops.catmllm.rotate(*plain, False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both of one shape -> as gate. Differentiable once in both."""
    if gate.shape != up.shape:
        raise ValueError(f"need gate and up of one shape, not {list(gate.shape)} and {list(up.shape)}")
    _must_fit(gate, up)
    return torch.ops.catmllm.swiglu(gate.contiguous(), up.contiguous())


def _must_fit(*tensors: Tensor) -> None:
    if not fits(*tensors):
        kinds = ", ".join(f"{t.dtype} on {t.device.type}" for t in tensors)
        raise ValueError(
            f"need float32 or bfloat16 on a CPU, of one dtype, csrc/rows built and not forbidden, not {kinds}"
        )


@torch.library.custom_op("catmllm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows.call("rms_norm", x.dtype, inverse.numel(), len(weight), eps, x, weight, out, inverse)
    return out, inverse


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("catmllm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)
    sizes = inverse.numel(), len(weight)
    rows.call("rms_norm_gradient", x.dtype, *sizes, x, weight, inverse, grad, of_x, of_weight)
    return of_x, of_weight


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def _rms_norm_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, inverse = ctx.saved_tensors
    of_x, of_weight = torch.ops.catmllm.rms_norm_backward(grad.contiguous(), x, weight, inverse)
    return of_x, of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_keep)


@torch.library.custom_op("catmllm::rotate", mutates_args=())
def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query), torch.empty_like(key)
    for x, y in zip((query, key), out):
        rows.call("rotate", x.dtype, *x.shape, x, cos, sin, int(transposed), y)
    return out


@_rotate.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _rotate_keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.transposed = inputs[4]


def _rotate_gradient(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    turned = torch.ops.catmllm.rotate(
        of_query.contiguous(), of_key.contiguous(), cos, sin, not ctx.transposed
    )
    return *turned, None, None, None


_rotate.register_autograd(_rotate_gradient, setup_context=_rotate_keep)


@torch.library.custom_op("catmllm::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    rows.call("swiglu", gate.dtype, gate.numel(), gate, up, out)
    return out


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("catmllm::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    rows.call("swiglu_gradient", gate.dtype, gate.numel(), gate, up, grad, of_gate, of_up)
    return of_gate, of_up


@_swiglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _swiglu_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.catmllm.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_keep)
