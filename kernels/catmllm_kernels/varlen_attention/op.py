"""The public op: torch's FlashAttention on CUDA in half precision, csrc on a CPU, products in blocks elsewhere.

The latter two through `torch.library`, so that compile, activation checkpointing and planning without data see one node
with a known output and FLOP count.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import catmllm_kernels.varlen_attention.blocked as blocked
import catmllm_kernels.varlen_attention.cpu as cpu
from catmllm_kernels.backend import NAMES, warn_once


@dataclass(frozen=True)
class Prefix:
    """Which sample each one continues; make it by `continued`, once a batch.

    owner [S] int64: the sample whose tokens come before this one's, -1 for none. key_at [N] int64 and cu_seqlens_k [S+1]
    int32: the tokens that each sample sees, end to end; max_length_k: the most that one sees.
    """

    owner: Tensor
    key_at: Tensor
    cu_seqlens_k: Tensor
    max_length_k: int


def continued(cu_seqlens: Tensor, owner: Tensor) -> Prefix:
    """The `Prefix` of samples [S+1] with these owners [S] (-1: none), on their device; waits for it once.

    An owner continues nothing itself, and those that continue it follow it directly.
    """
    begin, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    place = owner.clamp_min(0)
    before = torch.where(owner >= 0, length[place], 0)
    seen = before + length
    bounds = torch.nn.functional.pad(seen.cumsum(0), (1, 0))
    total, longest = torch.stack([bounds[-1], seen.max()]).tolist() if len(seen) else (0, 0)
    sample = torch.arange(len(owner), device=owner.device).repeat_interleave(seen, output_size=total)
    at = torch.arange(total, device=owner.device) - bounds[sample]
    own = at >= before[sample]
    key_at = torch.where(own, begin[sample] + at - before[sample], begin[place][sample] + at)
    return Prefix(owner, key_at, bounds.int(), longest)


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

    query [T, H, D], key and value [T, K, D] with K dividing H (grouped queries), cu_seqlens [S+1] int32 from 0 to T,
    max_length: the longest sample or more. Returns [T, H, D]. Softmax and sums run in float32 or wider. `scale`
    defaults to D^-0.5. With `prefix`, a sample that continues another sees all of that one's tokens before its own: a
    prompt is then there once for all its answers. Differentiable once. Raises ValueError for shapes that do not fit.
    """
    if query.ndim != 3 or key.ndim != 3 or key.shape != value.shape or query.shape[1] % key.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ValueError(f"need query [T, H, D] and key, value [T, K, D] with K dividing H, not {shapes}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if flash(query):
        from torch.nn.attention.varlen import varlen_attn

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
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return out
    owner = None if prefix is None else prefix.owner
    return torch.ops.catmllm.varlen_attention(query, key, value, cu_seqlens, max_length, scale, owner)


def flash(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes it."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _path(query: Tensor) -> ModuleType:
    """csrc where it can, torch's products elsewhere. CATMLLM_KERNELS forces one; `triton` and `reference` are the products."""
    forced = os.environ.get("CATMLLM_KERNELS", "")
    if forced not in ("", *NAMES):
        raise ValueError(f"CATMLLM_KERNELS={forced!r}; choose one of {', '.join(NAMES)}")
    if query.device.type != "cpu" or forced in ("triton", "reference") or query.dtype == torch.float64:
        return blocked
    if why := cpu.unfit(query):
        warn_once("varlen_attention", why)
        return blocked
    return cpu


@torch.library.custom_op("catmllm::varlen_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    owner: Tensor | None = None,
) -> Tensor:
    return _path(query).forward(query, key, value, *_samples(query, cu_seqlens, owner), scale)


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    owner: Tensor | None = None,
) -> Tensor:
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
    owner: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _path(query).backward(grad, query, key, value, out, *_samples(query, cu_seqlens, owner), scale)


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
    owner: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _samples(query: Tensor, cu_seqlens: Tensor, owner: Tensor | None) -> tuple[list[int], list[int]]:
    """Lengths and owners of the samples."""
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != len(query) or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {len(query)}, the number of tokens; got {bounds}")
    if owner is None:
        return lengths, [-1] * len(lengths)
    owners, last = owner.tolist(), -1
    if len(owners) != len(lengths):
        raise ValueError(f"{len(owners)} owners for {len(lengths)} samples")
    for i, o in enumerate(owners):
        last = i if o < 0 else last
        if o >= 0 and o != last:
            raise ValueError(
                f"sample {i} continues {o}: it must follow it directly, with at most others that continue it between"
            )
    return lengths, owners


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, cu_seqlens, ctx.max_length, ctx.scale, owner = inputs
    ctx.save_for_backward(query, key, value, output, cu_seqlens, owner)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *saved, owner = ctx.saved_tensors
    gradients = torch.ops.catmllm.varlen_attention_backward(
        grad.contiguous(), *saved, ctx.max_length, ctx.scale, owner
    )
    return *gradients, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _products(query: Tensor, cu_seqlens: Tensor, max_length: int, owner: Tensor | None, count: int) -> int:
    """FLOPs of `count` products of all queries with all keys that their samples see; the later half is not subtracted,
    as torch's counter does not for its own attention. Without data every sample is taken as the longest."""
    if cu_seqlens.device.type == "meta" or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        pairs = (len(cu_seqlens) - 1) * max_length**2
    else:
        length = cu_seqlens.long().diff()
        seen = length if owner is None else length + torch.where(owner >= 0, length[owner.clamp_min(0)], 0)
        pairs = int((length * seen).sum())
    return 2 * count * pairs * query.shape[1] * query.shape[2]


@register_flop_formula(torch.ops.catmllm.varlen_attention, get_raw=True)
def forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    owner: Tensor | None = None,
    **_: Any,
) -> int:
    """Scores and their product with the values."""
    return _products(query, cu_seqlens, max_length, owner, 2)


@register_flop_formula(torch.ops.catmllm.varlen_attention_backward, get_raw=True)
def backward_flops(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    owner: Tensor | None = None,
    **_: Any,
) -> int:
    """The scores once more, and four products for the gradients."""
    return _products(query, cu_seqlens, max_length, owner, 5)
