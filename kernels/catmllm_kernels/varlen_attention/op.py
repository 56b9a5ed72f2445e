"""The public op: torch's FlashAttention on CUDA in half precision, products in blocks elsewhere.

The latter through `torch.library`, so that compile, activation checkpointing and planning without data see one node
with a known output and FLOP count.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from catmllm_kernels.varlen_attention.blocked import backward, forward


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside each of S samples laid end to end; nothing crosses from one to another.

    query [T, H, D], key and value [T, K, D] with K dividing H (grouped queries), cu_seqlens [S+1] int32 from 0 to T,
    max_length: the longest sample or more. Returns [T, H, D]. Softmax and sums run in float32 or wider. `scale`
    defaults to D^-0.5. Differentiable once. Raises ValueError for shapes that do not fit.
    """
    if query.ndim != 3 or key.ndim != 3 or key.shape != value.shape or query.shape[1] % key.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ValueError(f"need query [T, H, D] and key, value [T, K, D] with K dividing H, not {shapes}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_length,
            max_length,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return out
    return torch.ops.catmllm.varlen_attention(query, key, value, cu_seqlens, max_length, scale)


@torch.library.custom_op("catmllm::varlen_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scale: float
) -> Tensor:
    return forward(query, key, value, _lengths(query, cu_seqlens), scale)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, scale: float) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("catmllm::varlen_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, query, key, value, out, _lengths(query, cu_seqlens), scale)


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _lengths(query: Tensor, cu_seqlens: Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != len(query) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {len(query)}, the number of tokens; got {bounds}")
    return lengths


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, cu_seqlens, ctx.max_length, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output, cu_seqlens)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = torch.ops.catmllm.varlen_attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.max_length, ctx.scale
    )
    return *gradients, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _products(query: Tensor, cu_seqlens: Tensor, max_length: int, count: int) -> int:
    """FLOPs of `count` products of all queries with all keys of their samples; the later half is not subtracted, as
    torch's counter does not for its own attention. Without data every sample is taken as the longest."""
    if cu_seqlens.device.type == "meta" or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        squares = (len(cu_seqlens) - 1) * max_length**2
    else:
        squares = int(cu_seqlens.long().diff().square().sum())
    return 2 * count * squares * query.shape[1] * query.shape[2]


@register_flop_formula(torch.ops.catmllm.varlen_attention, get_raw=True)
def forward_flops(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int, *_: Any, **__: Any
) -> int:
    """Scores and their product with the values."""
    return _products(query, cu_seqlens, max_length, 2)


@register_flop_formula(torch.ops.catmllm.varlen_attention_backward, get_raw=True)
def backward_flops(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *_: Any,
    **__: Any,
) -> int:
    """The scores once more, and four products for the gradients."""
    return _products(query, cu_seqlens, max_length, 5)
