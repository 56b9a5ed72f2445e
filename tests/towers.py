"""Tiny Qwens in folders, as published: weights by transformers' own classes, heads that add up to more
than the width, and a tokenizer that knows nothing of CIFs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from catmllm.config import Config, load_config
from catmllm.data.prompts import END, START
from catmllm.models.export import save_tokenizer
from tests.conftest import SMALL_MODEL

KINDS = ("qwen2", "qwen3", "qwen3_vl")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Heads of 20 in a width of 48: as in Qwen3-0.6B, more than the width has room for.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = HEADS | {"hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2, "initializer_range": 0.2}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 48}


def base_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a chat's frame; as of a base model, a text's end is not that of a turn."""
    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, additional_special_tokens=[START, END]
    )


def own_config(kind: str, tokenizer: PreTrainedTokenizerFast, head_dim: int = 20, **more: Any) -> Any:
    """transformers' configuration; qwen3's head is tied to its embedding, as that of small models is."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "rope_parameters": ROPE, **SIZES, **ids, **more}
    if kind == "qwen2":
        return transformers.Qwen2Config(**text, tie_word_embeddings=False)
    if kind == "qwen3":
        return transformers.Qwen3Config(**text, head_dim=head_dim, tie_word_embeddings=True)
    section = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    text["rope_parameters"] = ROPE | {"mrope_section": section, "mrope_interleaved": True}
    return transformers.Qwen3VLConfig(
        text_config=text | {"head_dim": head_dim},
        vision_config=VISION
        | {"out_hidden_size": text["hidden_size"]}
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        tie_word_embeddings=False,
    )


def save_tower(folder: Path, kind: str, **more: Any) -> None:
    """A model of random weights, norms and biases too, and its tokenizer."""
    tokenizer = base_tokenizer()
    config = own_config(kind, tokenizer, **more)
    auto: Any = transformers.AutoModelForCausalLM
    if kind == "qwen3_vl":
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = auto.from_config(config)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def tower_config(folder: Path, *more: str) -> Config:
    pretrained = f"model.llm.pretrained={folder}"
    return load_config(None, [*SMALL_MODEL, pretrained, "precision=fp32", *more])


def own_model(folder: Path) -> Any:
    """The folder by the class that transformers itself takes for it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    auto: Any = transformers.AutoModelForCausalLM
    if config.model_type == "qwen3_vl":
        auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(folder, attn_implementation="eager").eval()
