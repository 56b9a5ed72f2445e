"""The registered cases of varlen_attention: sample lengths, heads, head width."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from catmllm_kernels.registry import Case
from catmllm_kernels.varlen_attention.op import varlen_attention
from catmllm_kernels.varlen_attention.reference import varlen_attention as reference

# A gradient is relative to its own largest entry. bfloat16 rounds scores' gradients and products to 8 bits.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}

SIZES = {
    "one sample": ([70], 2, 2, 8),
    "one token and two": ([1, 2, 1], 4, 2, 16),
    "around a block": ([63, 64, 65, 129], 6, 2, 32),
    "as the tiny model": ([54] * 5 + [173] * 2, 6, 2, 32),
}


def arguments(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(sum(lengths), h, width, generator=generator).to(device, dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return query, key, value, bounds, max(lengths)


def definition(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    return reference(query, key, value, cu_seqlens, query.shape[-1] ** -0.5)


CASES = [
    Case(
        "varlen_attention",
        name,
        "test",
        partial(arguments, *size),
        varlen_attention,
        definition,
        TOLERANCE,
    )
    for name, size in SIZES.items()
]
