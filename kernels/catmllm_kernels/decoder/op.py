"""The public ops: Triton on CUDA, csrc/rows on a CPU, the definition elsewhere.

Of 2,100 tokens with H = 192 in bf16, forward and backward on one thread of a CPU, they take less than a fifth
of the time of torch's separate operators. Under a compiler, which fuses the separate operators itself, `fits`
says no, and a model does better by its own operators; so it does for tensors of several dtypes, as float16's
residual stream, which is float32, meets its norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from catmllm_kernels.backend import has_kernel, implementation

OP = "decoder"


def fits(*tensors: Tensor) -> bool:
    """Whether a kernel takes these tensors: all of one dtype on one device, float32 or bfloat16, on CUDA also
    float16.

    CATMLLM_KERNELS=reference forbids it.

    >>> fits(torch.ones(2, 4)), fits(torch.ones(2, 4), torch.ones(4, dtype=torch.bfloat16))
    (True, False)
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(first.device.type):
        return False
    if any(t.dtype != first.dtype or t.device != first.device for t in tensors):
        return False
    return has_kernel(OP, first)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] / sqrt(mean of x² over H + eps) · weight [H] -> as x. Differentiable once in x and weight.

    Raises ValueError for shapes that do not fit and for tensors of several dtypes, as the others do.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    tensor([[0.8485, 2.2627]])
    """
    if weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"need x [..., H] and weight [H], not {list(x.shape)} and {list(weight.shape)}")
    _of_one_dtype(x, weight)
    return torch.ops.catmllm.rms_norm(x.contiguous(), weight.contiguous(), eps)[0]


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding: x · cos + (-x2, x1) · sin of the halves x1, x2 of each head.

    query [T, H, D], key [T, K, D], cos and sin [T, D] -> as query, as key.
    Differentiable once in query and key.

    A quarter turn of one token:

    >>> x = torch.tensor([[[1.0, 2.0]]])
    >>> rotate(x, x, torch.zeros(1, 2), torch.ones(1, 2))[0]
    tensor([[[-2.,  1.]]])
    """
    tokens, width = cos.shape[0], cos.shape[-1]
    fit = all(x.ndim == 3 and (len(x), x.shape[2]) == (tokens, width) for x in (query, key))
    if not fit or cos.ndim != 2 or cos.shape != sin.shape or width % 2:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, cos, sin))
        raise ValueError(f"need query [T, H, D], key [T, K, D], cos and sin [T, D] with D even, not {shapes}")
    _of_one_dtype(query, key, cos, sin)
    plain = (x.contiguous() for x in (query, key, cos.detach(), sin.detach()))
    return torch.ops.catmllm.rotate(*plain, False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both of one shape -> as gate. Differentiable once in both.

    >>> swiglu(torch.tensor([0.0, 100.0]), torch.tensor([5.0, 2.0]))
    tensor([  0., 200.])
    """
    if gate.shape != up.shape:
        raise ValueError(f"need gate and up of one shape, not {list(gate.shape)} and {list(up.shape)}")
    _of_one_dtype(gate, up)
    return torch.ops.catmllm.swiglu(gate.contiguous(), up.contiguous())


def _of_one_dtype(*tensors: Tensor) -> None:
    if any((t.dtype, t.device) != (tensors[0].dtype, tensors[0].device) for t in tensors):
        kinds = ", ".join(f"{t.dtype} on {t.device.type}" for t in tensors)
        raise ValueError(f"need tensors of one dtype on one device, not {kinds}")


@torch.library.custom_op("catmllm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return implementation(OP, x).rms_norm_forward(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("catmllm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return implementation(OP, x).rms_norm_backward(grad, x, weight, inverse, eps)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(
        weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32)
    )


def _rms_norm_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, inverse = ctx.saved_tensors
    of_x, of_weight = torch.ops.catmllm.rms_norm_backward(grad.contiguous(), x, weight, inverse, ctx.eps)
    return of_x, of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_keep)


@torch.library.custom_op("catmllm::rotate", mutates_args=())
def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return implementation(OP, query).rotate(query, key, cos, sin, transposed)


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
    return implementation(OP, gate).swiglu_forward(gate, up)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("catmllm::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return implementation(OP, gate).swiglu_backward(grad, gate, up)


@_swiglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _swiglu_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.catmllm.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_keep)
