"""How samples lie in memory: end to end, one after the other, in [T, heads, width].
Every implementation reads this page.

cu_seqlens [S+1] are the bounds of S samples. With owners [S] a sample continues another one (-1: none): its
tokens see all of that sample's before their own, so that a prompt is there once for all its answers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """The arguments of `varlen_attention`, as implementations get them."""

    query: Tensor  # [T, H, D]
    key: Tensor  # [T, K, D], K divides H
    value: Tensor  # [T, K, D]
    cu_seqlens: Tensor  # [S+1] int32, from 0 to T
    max_length: int  # of the longest sample, or more
    scale: float
    owner: Tensor | None = None  # [S] int64, see `Prefix`


@dataclass(frozen=True)
class Prefix:
    """Which sample each one continues; make it by `continued`, once a batch.

    owner [S] int64: the sample whose tokens come before this one's, -1 for none. key_at [N] int64 and
    cu_seqlens_k [S+1] int32: the tokens that each sample sees, end to end; max_length_k: the most that one
    sees.
    """

    owner: Tensor
    key_at: Tensor
    cu_seqlens_k: Tensor
    max_length_k: int


def continued(cu_seqlens: Tensor, owner: Tensor) -> Prefix:
    """The `Prefix` of samples [S+1] with these owners [S] (-1: none), on their device; waits for it once.

    An owner continues nothing itself, and those that continue it follow it directly.

    A prompt of two tokens with answers of one and three:

    >>> prefix = continued(torch.tensor([0, 2, 3, 6]), torch.tensor([-1, 0, 0]))
    >>> prefix.key_at.tolist(), prefix.cu_seqlens_k.tolist()
    ([0, 1, 0, 1, 2, 0, 1, 3, 4, 5], [0, 2, 5, 10])
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


def samples(a: Attention) -> tuple[list[int], list[int]]:
    """Lengths and owners of the samples. Raises ValueError for bounds or owners that cannot be."""
    tokens, bounds = len(a.query), a.cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, the number of tokens; got {bounds}")
    if a.owner is None:
        return lengths, [-1] * len(lengths)
    owners, last = a.owner.tolist(), -1
    if len(owners) != len(lengths):
        raise ValueError(f"{len(owners)} owners for {len(lengths)} samples")
    for i, o in enumerate(owners):
        last = i if o < 0 else last
        if o >= 0 and o != last:
            raise ValueError(
                f"sample {i} continues {o}: it must follow it directly, "
                "with at most others that continue it between"
            )
    return lengths, owners
