"""The text tower's weights laid out for decoding: one product for q, k and v,
one for the two halves of the MLP.

Of text the three rotary sections of M-RoPE coincide, so plain rotary embedding is exact;
only a prompt with a picture has three positions a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from catmllm.models.attention import has_sections
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.half_precision import MLP_SCALE
from catmllm.models.lora import effective_weight
from catmllm_kernels.dense import product

Linear = Callable[..., torch.Tensor]  # x, weight, bias


@dataclass
class Layer:
    """The weights of one block, biases of q, k and v joined as their weights are;
    None for what the tower does not have: Qwen3 has norms of a head's query and key, Qwen2.5 has biases."""

    norm1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    norm2: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Tower:
    """The text tower's weights in the layout of decoding; a snapshot, taken while they are whole."""

    def __init__(self, model: CatalyticMLLM, dtype: torch.dtype) -> None:
        def cast(*tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat([t.detach() for t in tensors]).to(dtype)

        def bias(*linears: Any) -> torch.Tensor | None:
            return None if linears[0].bias is None else cast(*(l.bias for l in linears))

        def head_norm(attention: Any, name: str) -> torch.Tensor | None:
            return cast(getattr(attention, name).weight) if hasattr(attention, name) else None

        text = model.text
        c = text.config
        self.eps, self.heads, self.kv_heads = c.rms_norm_eps, c.num_attention_heads, c.num_key_value_heads
        self.dim = text.layers[0].self_attn.head_dim
        self.dtype = dtype
        # float16 cannot hold the residual stream (see models.half_precision)
        self.wide = torch.float32 if dtype == torch.float16 else dtype
        self.embedding = cast(text.embed_tokens.weight)
        self.norm, self.lm_head = cast(text.norm.weight), cast(model.llm.lm_head.weight)
        self.inv_freq = text.rotary_emb.inv_freq.detach().float()
        self.rotary_scale = text.rotary_emb.attention_scaling  # 1, but for YaRN
        self.axis = _axes(text) if has_sections(text) else None
        self.layers = [
            Layer(
                cast(l.input_layernorm.weight),
                cast(*map(effective_weight, (l.self_attn.q_proj, l.self_attn.k_proj, l.self_attn.v_proj))),
                bias(l.self_attn.q_proj, l.self_attn.k_proj, l.self_attn.v_proj),
                head_norm(l.self_attn, "q_norm"),
                head_norm(l.self_attn, "k_norm"),
                cast(effective_weight(l.self_attn.o_proj)),
                bias(l.self_attn.o_proj),
                cast(l.post_attention_layernorm.weight),
                cast(effective_weight(l.mlp.gate_proj), effective_weight(l.mlp.up_proj)),
                cast(effective_weight(l.mlp.down_proj)),
            )
            for l in text.layers
        ]

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., dim] of positions [..., 1],
        or [..., dim/2] where frequencies have positions of their own."""
        angle = positions.float() * self.inv_freq
        angle = torch.cat([angle, angle], -1)
        cos, sin = angle.cos() * self.rotary_scale, angle.sin() * self.rotary_scale
        return cos.to(self.dtype), sin.to(self.dtype)

    def qkv(
        self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, linear: Linear = F.linear
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, of x [..., H]: [..., heads, dim] each."""
        h = self.normed(x, layer.norm1)
        parts = linear(h, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, self.dim))
        turned, v = parts.split([self.heads + self.kv_heads, self.kv_heads], -2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = turned.split([self.heads, self.kv_heads], -2)
            turned = torch.cat([self.normed(q, layer.q_norm), self.normed(k, layer.k_norm)], -2)
        first, second = turned.chunk(2, -1)
        turned = turned * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]
        q, k = turned.split([self.heads, self.kv_heads], -2)
        return q, k, v

    def rest(
        self, layer: Layer, x: torch.Tensor, attended: torch.Tensor, linear: Linear = F.linear
    ) -> torch.Tensor:
        """What follows attention in a layer: output projection and MLP, with their residuals."""
        x = x.to(self.wide) + linear(attended, layer.out, layer.out_bias)
        gate, up = linear(self.normed(x, layer.norm2), layer.gate_up).chunk(2, -1)
        if self.wide == self.dtype:
            return x + linear(F.silu(gate) * up, layer.down)
        return x + linear(F.silu(gate) * (up * MLP_SCALE), layer.down).float() / MLP_SCALE

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of the residual stream or of heads, rounded to the dtype of the products."""
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), self.eps).to(self.dtype)

    def prefill(
        self, x: torch.Tensor, mrope: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Right-padded prompts x [B, T, H], positions mrope [3, B, T] where some show pictures: final hidden
        states [B, T, H], keys and values [B, kv, T, dim] a layer."""
        text = torch.arange(x.shape[1], device=x.device)[:, None]
        cos, sin = self.rotary(text if mrope is None else mrope.movedim(0, -1)[..., self.axis])
        cache = []
        for layer in self.layers:
            q, k, v = (p.transpose(1, 2) for p in self.qkv(layer, x, cos, sin, product))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self.rest(layer, x, attended.transpose(1, 2).flatten(2), product)
            cache.append((k, v))
        return self.normed(x, self.norm), cache


def _axes(text: Any) -> torch.Tensor:
    """Which of frame, row and column turns each frequency, [dim/2]. The sections lie end to end (Qwen2.5-VL)
    or take turns (Qwen3-VL): the tower's own embedding says it of three tokens, each away from zero on one
    axis alone."""
    at = torch.eye(3, device=text.rotary_emb.inv_freq.device)[:, None]
    _, sin = text.rotary_emb(at, at.long())
    return sin[0, :, : sin.shape[-1] // 2].abs().argmax(0)
