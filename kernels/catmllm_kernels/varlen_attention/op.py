"""The public op: torch's FlashAttention on CUDA in half precision, csrc on a CPU,
products in blocks elsewhere.

The latter two through `torch.library`, so that compile, activation checkpointing and planning without data
see one node with a known output and FLOP count.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from catmllm_kernels.backend import implementation
from catmllm_kernels.schema import arguments_of
from catmllm_kernels.varlen_attention.layout import Attention, Prefix

OP = "varlen_attention"
ARGUMENTS = arguments_of(Attention)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Causal attention inside each of S samples laid end to end; nothing crosses from one to another.

    query [T, H, D], key and value [T, K, D] with K dividing H (grouped queries), cu_seqlens [S+1] int32 from
    0 to T, max_length: the longest sample or more. Returns [T, H, D]. Softmax and sums run in float32 or
    wider. `scale` defaults to D^-0.5. With `prefix`, a sample that continues another sees all of that one's
    tokens before its own: a prompt is then there once for all its answers. Differentiable once. Raises
    ValueError for shapes that do not fit.

    Two samples of two tokens; where all scores are equal a token gets the mean of what it sees:

    >>> value = torch.arange(4.0)[:, None, None]
    >>> bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    >>> varlen_attention(torch.zeros(4, 1, 1), torch.ones(4, 1, 1), value, bounds, 2).flatten()
    tensor([0.0000, 0.5000, 2.0000, 2.5000])
    """
    if query.ndim != 3 or key.ndim != 3 or key.shape != value.shape or query.shape[1] % key.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ValueError(f"need query [T, H, D] and key, value [T, K, D] with K dividing H, not {shapes}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if flash(query):
        from torch.nn.attention.varlen import varlen_attn  # which loads torch's compiler, 3 s of imports

        bounds, longest = cu_seqlens, max_length
        if prefix is not None:
            key, value = key[prefix.key_at], value[prefix.key_at]
            bounds, longest = prefix.cu_seqlens_k, prefix.max_length_k
        out = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            bounds,
            max_length,
            longest,
            scale=scale,
            window_size=(-1, 0),  # causal, the last query at the last key
            **grouped(varlen_attn),
        )
        assert isinstance(out, Tensor)
        return out
    owner = None if prefix is None else prefix.owner
    return torch.ops.catmllm.varlen_attention(query, key, value, cu_seqlens, max_length, scale, owner)


def flash(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes it."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def grouped(attention: Callable[..., Any]) -> dict[str, Any]:
    """How torch's function is told that several query heads share a key head:
    torch 2.11 takes them unasked."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(attention).parameters else {}


@torch.library.custom_op("catmllm::varlen_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def _forward(*inputs: Any) -> Tensor:
    a = Attention(*inputs)
    return implementation(OP, a.query).forward(a)


@_forward.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op(
    "catmllm::varlen_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad: Tensor, out: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = Attention(*inputs)
    return implementation(OP, a.query).backward(grad, out, a)


@_backward.register_fake
def _(grad: Tensor, out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a = Attention(*inputs)
    ctx.max_length, ctx.scale = a.max_length, a.scale
    ctx.save_for_backward(output, a.query, a.key, a.value, a.cu_seqlens, a.owner)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, owner = ctx.saved_tensors
    inputs = (*saved, ctx.max_length, ctx.scale, owner)
    return *torch.ops.catmllm.varlen_attention_backward(grad.contiguous(), *inputs), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _products(a: Attention, count: int) -> int:
    """FLOPs of `count` products of all queries with all keys that their samples see; the later half is not
    subtracted, as torch's counter does not for its own attention. Without data every sample is taken as the
    longest."""
    if a.cu_seqlens.device.type == "meta" or isinstance(a.cu_seqlens, torch._subclasses.FakeTensor):
        pairs = (len(a.cu_seqlens) - 1) * a.max_length**2
    else:
        length = a.cu_seqlens.long().diff()
        seen = length
        if a.owner is not None:
            seen = length + torch.where(a.owner >= 0, length[a.owner.clamp_min(0)], 0)
        pairs = int((length * seen).sum())
    return 2 * count * pairs * a.query.shape[1] * a.query.shape[2]


@register_flop_formula(torch.ops.catmllm.varlen_attention, get_raw=True)
def forward_flops(*inputs: Any, **_: Any) -> int:
    """Scores and their product with the values."""
    return _products(Attention(*inputs), 2)


@register_flop_formula(torch.ops.catmllm.varlen_attention_backward, get_raw=True)
def backward_flops(grad: Tensor, out: Tensor, *inputs: Any, **_: Any) -> int:
    """The scores once more, and four products for the gradients."""
    return _products(Attention(*inputs), 5)
