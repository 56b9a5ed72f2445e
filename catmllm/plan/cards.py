"""GPUs as their makers' data sheets have them: what a plan divides its counts by. Nothing here was timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from catmllm.train.throughput import PEAKS


@dataclass(frozen=True)
class Card:
    """FLOP/s without sparsity, bytes/s. `memory`: GiB that the card gives; `limit`: those for tensors, less
    the CUDA context, NCCL's buffers and some fragmentation."""

    name: str
    half: float  # of tensor cores in fp16 and bf16
    tf32: float
    wide: float  # float32 without tensor cores
    hbm: float
    nvlink: float  # in one direction
    memory: float
    limit: float
    # Share of `half` that attention reached where its authors measured it at its best: a head of 128, 16k
    # tokens, forward. Dao 2023 (arXiv 2307.08691) on an A100; Shah et al. 2024 (arXiv 2407.08608) has both on
    # an H100.
    attention: Mapping[str, float]


# MFU that others have published of whole training steps, lowest and highest; a plan that needs more is not to
# be believed. Supervised: torchtitan on 8 H100s, Llama-3.1-8B at 8k tokens. RL: prime-rl on 8 H100s, Qwen3-4B
# at 16k and at 65k tokens.
PUBLISHED = {"supervised": (0.33, 0.39), "rl": (0.139, 0.354)}
_HOPPER = {"FlashAttention-2": 0.35, "FlashAttention-3": 0.75}
CARDS = {
    card.name: card
    for card in (
        Card("A100", PEAKS["A100"], 156e12, 19.5e12, 2.0e12, 300e9, 79.2, 76.0, {"FlashAttention-2": 0.73}),
        Card("H100", PEAKS["H100"], 494e12, 67e12, 3.35e12, 450e9, 79.2, 76.0, _HOPPER),
        # sold as 141 GB, of which NVML says 140.4 GiB
        Card("H200", PEAKS["H200"], 494e12, 67e12, 4.8e12, 450e9, 139.0, 135.8, _HOPPER),
    )
}
