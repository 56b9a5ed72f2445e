"""From the encoder's pooled node embeddings to vectors of the LLM's width: one linear layer.

The encoder pools, as its final norm is part of that one pass (`catmllm_kernels.so3_pool_project`).
"""

from __future__ import annotations

import torch
from torch import nn


class Projector(nn.Module):
    """The paper's W, in three forms (`max`, `invariant`, `atoms`); see `so3_pool` for what each keeps."""

    def __init__(self, mode: str, lmax: int, channels: int, width: int) -> None:
        super().__init__()
        features = {"max": (lmax + 1) ** 2 * channels, "invariant": (lmax + 1) * channels, "atoms": channels}
        if mode not in features:
            raise ValueError(f"unknown projector {mode!r}; choose one of {', '.join(features)}")
        self.mode = mode
        self.linear = nn.Linear(features[mode], width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """What the encoder pools (`pool=projector.mode`): [n_systems, F] -> [n_systems, width], or [N,
        F] for `atoms`."""
        return self.linear(features.to(self.linear.weight.dtype))
