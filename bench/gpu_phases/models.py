"""Models of published sizes with random weights, made on the device: nothing is read from any hub."""

from __future__ import annotations

import copy
import multiprocessing
import os
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from catmllm.config import Config, load_config
from catmllm.data.batches import Collator
from catmllm.data.open import open_data
from catmllm.models.build import assemble, build_encoder, collator, new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.qwen import random_llm
from catmllm.plan.trace import trace
from catmllm.structure.system import System

# Width, layers, heads, key heads and width of the MLP of Qwen2.5's text towers, as published.
SIZES = {
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
    "tiny": (64, 2, 4, 2, 96),
}
ROWS = 151936  # of the embedding and of the head
KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def options(size: str) -> list[str]:
    """The configuration of an LLM of this size."""
    rows = 4096 if size == "tiny" else ROWS
    return [f"model.llm.{k}={v}" for k, v in zip(KEYS, SIZES[size])] + [f"model.llm.vocab_size={rows}"]


def some_systems() -> dict[str, Sequence[System]]:
    """A few, for dry runs."""
    return {part: systems[:24] for part, systems in open_data().items()}


def planned(
    configs: Mapping[str, Config], data: Mapping[str, Sequence[System]], ranks: int, steps: int, forked: bool
) -> dict[str, float]:
    """GiB a rank that the plan foresees of each joint stage; a plan that fails is left out. In processes of
    their own: a plan's made-up process group leaves sizes in DTensor's caches that a real one would find."""
    context = multiprocessing.get_context("fork" if forked else "spawn")
    found = {}
    with ProcessPoolExecutor(min(len(configs), os.cpu_count() or 1), mp_context=context) as pool:
        asked = {name: pool.submit(peak, config, data, ranks, steps) for name, config in configs.items()}
        for name, answer in asked.items():
            try:
                found[name] = answer.result()
            except Exception:  # a run without a plan is still a run
                traceback.print_exc()
    return found


def peak(config: Config, data: Mapping[str, Sequence[System]], ranks: int, steps: int) -> float:
    alone = replace(config, data=replace(config.data, workers=0))
    return trace(alone, "joint", ranks, data=data, steps=steps).peak


class Maker:
    """Systems, by default the shipped ones, and the tokenizer learned from them, once for all models of a
    phase."""

    def __init__(self, data: Mapping[str, Sequence[System]] | None = None) -> None:
        self.data: Mapping[str, Sequence[System]] = open_data() if data is None else data
        small = load_config(None, options("tiny"))
        _, self.collate = new_model(small, self.data["train"])

    def model(self, config: Config, device: torch.device) -> tuple[CatalyticMLLM, Collator]:
        """Random weights by the configuration, the LLM's made on the device."""
        tokenizer = copy.deepcopy(self.collate.tokenizer)
        encoder: Any = build_encoder(replace(config.model.encoder, checkpoint=None), config.data.cutoff)
        with torch.device(device):
            llm = random_llm(config.model.llm, tokenizer)
        model = assemble(llm, encoder, config, tokenizer)
        return model, collator(model, tokenizer, config)
