"""`varlen` in transformers' attention interface: a Qwen's own layers over samples laid end to end.

The bounds of the samples come the way transformers passes them to
FlashAttention (`cu_seq_lens_q`, `max_length_q`).
"""

from __future__ import annotations

from typing import Any

import torch

from catmllm_kernels.varlen_attention import Prefix, varlen_attention

NAME = "varlen"


def by_part(attention: str) -> dict[str, str]:
    """The `attn_implementation` of an LLM: an image tower's
    attention is not causal and stays transformers'."""
    _register()
    seeing = "sdpa" if attention == NAME else attention
    return {"": attention, "text_config": attention, "vision_config": seeing}


def no_mask(text: Any) -> dict[str, None] | None:
    """The `attention_mask` of a text tower over samples end to end: none where their bounds are enough.
    transformers' own `eager` and `sdpa` need a dense mask, which the tower makes of the positions when given
    None; so would a tower for `varlen` whose positions are those of the text (Qwen3-VL takes no other)."""
    kinds = getattr(text.config, "layer_types", None)
    if text.config._attn_implementation != NAME or kinds is None:
        return None
    return dict.fromkeys(set(kinds))


def has_sections(text: Any) -> bool:
    """Whether a token has three positions (M-RoPE): that of its frame, its row and its column."""
    return hasattr(text.rotary_emb, "mrope_section")


def shares_prompts(text: Any) -> bool:
    """Whether this tower's attention lets the answers of a prompt share its tokens (`Batch.prefix`)."""
    return text.config._attn_implementation == NAME


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    prefix: Prefix | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D], causal.

    Without bounds every row is a sample; `prefix` says which samples continue which. A padding mask or a
    cache (transformers' own `generate`) goes to `sdpa`.
    """
    batch, _, tokens, _ = query.shape
    if cu_seq_lens_q is None and (attention_mask is not None or key.shape[2] != tokens):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = attend_rows(q, k, v, batch, scaling, cu_seq_lens_q, max_length_q, prefix)
    return out.unflatten(0, (batch, tokens)), None


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: int,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    prefix: Prefix | None = None,
    **_: Any,
) -> torch.Tensor:
    """query [B·T, H, D], key and value [B·T, K, D] -> [B·T, H, D], causal inside the bounds or,
    without any, inside each of the B rows."""
    if cu_seq_lens_q is None or max_length_q is None:
        tokens = len(query) // batch
        cu_seq_lens_q = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
        max_length_q = tokens
    return varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling, prefix)
