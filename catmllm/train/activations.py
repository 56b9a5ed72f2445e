"""What a block keeps for its backward pass, and whether it is compiled.

A block is a decoder layer of the LLM or a block of the encoder: the same pieces that FSDP2 shards. Its
`forward` is wrapped on the instance: parameter names stay what they are, and FSDP's hooks, which gather and
free the weights, stay outside of what is recomputed or compiled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from catmllm.config import Config
from catmllm.models.catalytic_mllm import CatalyticMLLM

# bmm is left out: eager attention's scores are a bmm, and quadratic in tokens
_PRODUCTS = frozenset({"mm", "addmm", "_linear_pointwise"})
_ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "varlen_att", "efficient_attention")


def _policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """`selective`: keep matrix products and fused attention,
    nearly all of a block's time and a part of its memory.

    Norms, rotary embedding, SiLU, casts and copies cost little to do again.
    """
    name = getattr(getattr(operator, "overloadpacket", operator), "__name__", str(operator))
    kept = name in _PRODUCTS or any(part in name for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def prepare_blocks(model: CatalyticMLLM, config: Config) -> None:
    """Apply `checkpointing` and `compile` of the configuration to every block of encoder and LLM.

    checkpointing `none` keeps every intermediate; `selective` keeps matrix products and attention and
    recomputes the rest; `full` keeps a block's input alone. Losses and gradients are the same up to rounding.
    Call it once a model.
    """
    for block in (*model.encoder.blocks, *model.text.layers):
        forward: Any = block.forward
        if config.checkpointing == "full":
            forward = partial(checkpoint, forward, use_reentrant=False)
        elif config.checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
        if config.compile:
            forward = torch.compile(forward)
        block.forward = forward
