"""The definition: softmax attention in which a token sees its own sample up to itself, and all of the sample that its own
continues, by one dense mask."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    prefix: Tensor | None = None,
) -> Tensor:
    """query [T, H, D], key and value [T, K, D] with K dividing H, cu_seqlens [S+1], prefix [S] the sample that each one
    continues (-1: none) -> [T, H, D]. Needs T² memory."""
    tokens, group = len(query), query.shape[1] // key.shape[1]
    lengths = cu_seqlens.diff().long()
    sample = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths)
    hidden = (sample[:, None] != sample) | torch.ones(tokens, tokens, device=query.device).triu(1).bool()
    if prefix is not None:
        hidden &= prefix[sample][:, None] != sample
    wide = torch.promote_types(query.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
    scores = query.to(wide).transpose(0, 1) @ k.transpose(1, 2) * scale
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)
