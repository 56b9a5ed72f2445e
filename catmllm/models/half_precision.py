"""What float16 cannot hold stays float32: the residual streams of LLM and encoder,
and the large products inside.

float16 ends at 65504. Qwen2.5's residual stream and its MLP's inner products pass that, and so may node
embeddings. The matrix products stay in float16; hooks keep what runs between them in float32. Power-of-two
scales around the MLP's product cost no bit: a value that float16 held before is held after, down to 4e-3 with
full precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.equiformer_v2 import EquiformerV2

MLP_SCALE = 2.0**-4  # the MLP's inner product and its result may then reach 1e6


def keep_large_values(model: CatalyticMLLM, llm: torch.dtype, encoder: torch.dtype) -> None:
    """Install the hooks on the parts that compute in float16; `llm`, `encoder`: compute dtypes.
    Call once a model."""
    if llm == torch.float16:
        _llm(model.text, llm)
    if encoder == torch.float16 and isinstance(model.encoder, EquiformerV2):  # SchNet keeps its sums wide
        _encoder(model.encoder, encoder)


def rounded(model: CatalyticMLLM, llm: torch.dtype, encoder: torch.dtype) -> CatalyticMLLM:
    """The model, to be read only, with the weights that training's passes have: parameters rounded in place,
    those of encoder, projector and energy head to `encoder`; buffers, such as the radial basis, as they are.
    Call once a model."""
    keep_large_values(model, llm, encoder)
    graph = {id(p) for part in (model.encoder, model.projector, model.energy_head) for p in part.parameters()}
    for p in model.parameters():
        p.data = p.data.to(encoder if id(p) in graph else llm)
    return model


def _llm(text: Any, half: torch.dtype) -> None:
    text.embed_tokens.register_forward_hook(_to(torch.float32))
    text.rotary_emb.register_forward_hook(lambda module, args, out: tuple(x.to(half) for x in out))
    text.norm.register_forward_hook(_to(half))
    for layer in text.layers:
        layer.input_layernorm.register_forward_hook(_to(half))
        layer.post_attention_layernorm.register_forward_hook(_to(half))
        layer.mlp.up_proj.register_forward_hook(lambda module, args, out: out * MLP_SCALE)
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: out.float() / MLP_SCALE)
        if text.config._attn_implementation == "eager":
            # Fused attention keeps its scores in float32. The eager one multiplies first and scales after:
            # large key biases overflow there, so that the scale goes on the queries, behind any norm.
            attention, scale = layer.self_attn, layer.self_attn.scaling
            query = getattr(attention, "q_norm", attention.q_proj)
            query.register_forward_hook(lambda module, args, out, scale=scale: out * scale)
            attention.scaling = 1.0


def _encoder(encoder: nn.Module, half: torch.dtype) -> None:
    blocks: Any = encoder.blocks
    blocks[0].register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    for block in blocks:
        block.norm_1.register_forward_hook(_to(half))
        block.norm_2.register_forward_hook(_to(half))


def _to(dtype: torch.dtype) -> Any:
    return lambda module, args, out: out.to(dtype)
