"""From the encoder's node embeddings to vectors of the LLM's width: pooling, then one linear layer."""

from __future__ import annotations

import torch
from torch import nn

from catmllm_kernels.so3_pool_project import so3_pool


class Projector(nn.Module):
    """The paper's W, in three forms (`max`, `invariant`, `atoms`); see `so3_pool` for what each keeps."""

    def __init__(self, mode: str, lmax: int, channels: int, width: int) -> None:
        super().__init__()
        features = {"max": (lmax + 1) ** 2 * channels, "invariant": (lmax + 1) * channels, "atoms": channels}
        if mode not in features:
            raise ValueError(f"unknown projector {mode!r}; choose one of {', '.join(features)}")
        self.mode = mode
        self.linear = nn.Linear(features[mode], width)

    def forward(self, x: torch.Tensor, batch: torch.Tensor, n_systems: int) -> torch.Tensor:
        """x [N, (L+1)^2, C], batch [N] sorted -> [n_systems, width], or [N, width] for `atoms`."""
        features = so3_pool(x, batch, n_systems, self.mode)
        return self.linear(features.to(self.linear.weight.dtype))
