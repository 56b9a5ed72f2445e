"""The arguments of the two passes, as every implementation gets them; their schemas are read from here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """Of T tokens of width H and V words."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [T] int64
    temperature: float = 1.0
    entropy: bool = False  # is asked for
    reference: Tensor | None = None  # [V, H], a second head
    keep: bool = False  # what the backward pass can use, where an implementation has such a thing


class Backward(NamedTuple):
    """Sums in float32 or wider."""

    grad: Tensor  # [T] of the log-probability
    grad_entropy: Tensor | None  # [T]
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    lse: Tensor  # [T] logsumexp of the logits, by the forward pass
    entropy: Tensor  # [T], or [0] where it was not asked for
    temperature: float
    need_hidden: bool
    need_weight: bool
    kept: Tensor | None = None  # by the forward pass
