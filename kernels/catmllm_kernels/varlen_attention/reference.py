"""The definition: softmax attention in which a token sees its own sample up to itself, and all of the sample
that its own continues, by one dense mask; and the same by torch's own products, which is what runs where no
kernel does.

The products go sample by sample and 64 queries at a time: no score of two samples or of a later token is
computed beyond the diagonal blocks, and none is kept: the backward pass makes them again. On a CPU (forward
and backward, one thread) 11 samples of 54 tokens and 5 of 173 in bf16 take 13 ms, one SDPA call a sample 25,
one dense mask over all 67; in fp32 11, 11 and 85. 64 queries beat 128, 256 and 512 at those lengths and at
150-1100 tokens of 16 heads of 128.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from catmllm_kernels.varlen_attention.layout import Attention, samples

BLOCK = 64


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    prefix: Tensor | None = None,
) -> Tensor:
    """query [T, H, D], key and value [T, K, D] with K dividing H, cu_seqlens [S+1], prefix [S] the sample
    that each one continues (-1: none) -> [T, H, D]. Needs T² memory."""
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


# --------------------------------------------------------------------------------------- as an implementation


def forward(a: Attention) -> Tensor:
    """[T, H, D] in the dtype of the query."""
    lengths, owners = samples(a)
    out = a.query.new_empty(a.query.shape)
    keys, values = a.key.split(lengths), a.value.split(lengths)
    for q, o, own, owner in zip(a.query.split(lengths), out.split(lengths), range(len(lengths)), owners):
        k, v = _seen(keys, own, owner), _seen(values, own, owner)
        before = k.shape[1] - len(q)
        for begin, end in _blocks(len(q)):
            rows = _rows(q[begin:end], len(k))
            seen = before + end
            weights = _weights(rows, k[:, :seen], before + begin, seen, a.scale).to(q.dtype)
            _put(o[begin:end], weights @ v[:, :seen])
    return out


def backward(grad: Tensor, out: Tensor, a: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; `out` is what `forward` returned."""
    lengths, owners = samples(a)
    wide = torch.promote_types(a.query.dtype, torch.float32)
    of_query = a.query.new_empty(a.query.shape)
    of_key, of_value = (x.new_zeros(x.shape, dtype=wide) for x in (a.key, a.value))
    # sum over keys of weight x its gradient, which softmax's backward subtracts
    mean = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    keys, values = a.key.split(lengths), a.value.split(lengths)
    sums = (of_key.split(lengths), of_value.split(lengths))
    parts = (x.split(lengths) for x in (a.query, grad, mean, of_query))
    for q, g, m, dq, own, owner in zip(*parts, range(len(lengths)), owners):
        k, v = _seen(keys, own, owner), _seen(values, own, owner)
        before = k.shape[1] - len(q)
        sum_k, sum_v = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
        for begin, end in _blocks(len(q)):
            seen = before + end
            rows, of_rows = _rows(q[begin:end], len(k)), _rows(g[begin:end], len(k))
            weights = _weights(rows, k[:, :seen], before + begin, seen, a.scale)
            of_weights = (of_rows @ v[:, :seen].transpose(1, 2)).to(wide)
            of_scores = of_weights.sub_(_rows(m[begin:end], len(k))).mul_(weights).mul_(a.scale).to(q.dtype)
            _put(dq[begin:end], of_scores @ k[:, :seen])
            sum_k[:, :seen] += of_scores.transpose(1, 2) @ rows
            sum_v[:, :seen] += weights.to(q.dtype).transpose(1, 2) @ of_rows
        for total, found in zip(sums, (sum_k, sum_v)):
            total[own].add_(found[:, before:].transpose(0, 1))
            if owner >= 0:
                total[owner].add_(found[:, :before].transpose(0, 1))
    return of_query, of_key.to(a.key.dtype), of_value.to(a.value.dtype)


def _seen(parts: Sequence[Tensor], own: int, owner: int) -> Tensor:
    """What a sample sees [K, n, D] of keys or values split by sample: those of its owner, then its own."""
    x = parts[own] if owner < 0 else torch.cat([parts[owner], parts[own]])
    return x.transpose(0, 1)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + BLOCK, length)) for i in range(0, length, BLOCK))


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """[n, H, D] -> [K, H/K·n, D]: the query heads that share a key head become rows of one product."""
    n, heads, width = x.shape
    return x.view(n, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3).reshape(kv_heads, -1, width)


def _put(target: Tensor, rows: Tensor) -> None:
    """Write rows [K, H/K·n, D] into target [n, H, D]."""
    n, heads, width = target.shape
    kv_heads = len(rows)
    target.view(n, kv_heads, heads // kv_heads, width).copy_(
        rows.view(kv_heads, heads // kv_heads, n, width).permute(2, 0, 1, 3)
    )


def _weights(rows: Tensor, keys: Tensor, begin: int, end: int, scale: float) -> Tensor:
    """Attention weights [K, H/K·n, end] in float32 or wider of the queries begin..end."""
    # The part of the scale that is a power of two goes on the queries, exactly,
    # so that float16 products stay finite.
    fraction, exponent = math.frexp(scale)
    scores = ((rows * 2.0**exponent) @ keys.transpose(1, 2)).to(
        torch.promote_types(rows.dtype, torch.float32)
    )
    n = end - begin
    scores.mul_(fraction).view(len(rows), -1, n, end)[..., begin:].masked_fill_(
        _later(rows.device)[:n, :n], -torch.inf
    )
    return scores.softmax(-1)


@functools.cache
def _later(device: torch.device) -> Tensor:
    """[BLOCK, BLOCK] bool: the key comes after the query."""
    return torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=device).triu_(1)
