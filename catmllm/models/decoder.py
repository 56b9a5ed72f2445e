"""Qwen2.5's norm, MLP and attention with the passes between their products fused where a kernel takes them.

Each is transformers' own module by another `__class__`: the same parameters, the same results up to rounding,
hooks as before. What no kernel takes (CUDA, float16, decoding with a cache) runs transformers' own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLRMSNorm,
    Qwen2MLP,
)

from catmllm.models.attention import NAME, attend_rows
from catmllm_kernels.decoder import fits, rms_norm, rotate, swiglu
from catmllm_kernels.dense import Linear

CACHES = ("cache", "past_key_values")  # since transformers 5.24, and before


class Norm(Qwen2_5_VLRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if fits(hidden_states, self.weight):
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class MLP(Qwen2MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = swiglu(gate, up) if fits(gate, up) else self.act_fn(gate) * up
        return self.down_proj(inner)


class Attention(Qwen2_5_VLAttention):
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
        cos, sin = (x.expand(batch, -1, -1).flatten(0, 1) for x in position_embeddings)
        query, key = rotate(query, key, cos, sin)
        out = attend_rows(query, key, value, batch, self.scaling, **options)
        return self.o_proj(out.view(batch, tokens, -1)), None


_CLASSES: dict[type, Any] = {
    nn.Linear: Linear,
    Qwen2_5_VLRMSNorm: Norm,
    Qwen2MLP: MLP,
    Qwen2_5_VLAttention: Attention,
}


def fuse(text: nn.Module) -> None:
    """Give the modules of a text tower, in place, the classes above and the faster float32 products."""
    for module in text.modules():
        module.__class__ = _CLASSES.get(type(module), type(module))
