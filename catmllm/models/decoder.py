"""A Qwen's norms, MLP and attention with the passes between their products fused where a kernel takes them.

Each is transformers' own module by another `__class__`: the same parameters, the same results up to rounding,
hooks as before. What no kernel takes (CUDA, float16, decoding with a cache) runs transformers' own code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from catmllm.models.attention import NAME, attend_rows
from catmllm_kernels.decoder import fits, rms_norm, rotate, swiglu
from catmllm_kernels.dense import Linear

CACHES = ("cache", "past_key_values")  # since transformers 5.24, and before


class Norm(nn.Module):
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if fits(hidden_states, self.weight):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class MLP(nn.Module):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = swiglu(gate, up) if fits(gate, up) else self.act_fn(gate) * up
        return self.down_proj(inner)


class Attention(nn.Module):
    config: Any
    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module  # of Qwen3 alone, as k_norm
    k_norm: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        """As transformers': hidden_states [B, T, H], position_embeddings cos and sin [B, T, D] -> [B, T,
        H], None.

        Everything goes on to transformers by keyword: releases differ in the
        order of its arguments and in the cache's name.
        """
        plain = attention_mask is None and all(options.get(name) is None for name in CACHES)
        ours = self.config._attn_implementation == NAME and plain and position_embeddings is not None
        if not ours or not fits(hidden_states, *position_embeddings):
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **options,
            )
        batch, tokens, _ = hidden_states.shape
        linears = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (f(hidden_states).view(batch * tokens, -1, self.head_dim) for f in linears)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = (x.expand(batch, -1, -1).flatten(0, 1) for x in position_embeddings)
        query, key = rotate(query, key, cos, sin)
        out = attend_rows(query, key, value, batch, self.scaling, **options)
        return self.o_proj(out.view(batch, tokens, -1)), None


@cache
def _fused(kind: Any) -> Any:
    """The class for modules of a class. Those of the four towers differ in the beginning of their names:
    Qwen2RMSNorm, Qwen3VLTextAttention."""
    for ours in (Norm, MLP, Attention):
        if kind.__name__.endswith("RMSNorm" if ours is Norm else ours.__name__) and not issubclass(
            kind, ours
        ):
            return type(kind.__name__, (ours, kind), {})
    return Linear if kind is nn.Linear else kind


def fuse(text: nn.Module) -> None:
    """Give the modules of a text tower, in place, the classes above and the faster float32 products."""
    for module in text.modules():
        kind: Any = type(module)
        module.__class__ = _fused(kind)
