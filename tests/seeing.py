"""A tiny Qwen2.5-VL in a folder, as one is published: with an image tower,
and a tokenizer that knows pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from catmllm.config import Config, load_config
from catmllm.data.images import IMAGE_PAD, VISION_END, VISION_START
from catmllm.data.prompts import property_sample
from catmllm.data.tokenizer import tiny_tokenizer
from catmllm.structure.system import System
from tests.conftest import SMALL_MODEL


def save_qwen(folder: Path, systems: list[System]) -> None:
    """A Qwen2.5-VL of random weights, large enough for a picture to matter, and its tokenizer,
    as a published folder."""
    tokenizer = tiny_tokenizer(property_sample(s).prompt for s in systems)
    tokenizer.add_tokens([VISION_START, IMAGE_PAD, VISION_END], special_tokens=True)
    words = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 112},
        image_token_id=words[IMAGE_PAD],
        vision_start_token_id=words[VISION_START],
        vision_end_token_id=words[VISION_END],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def seeing_config(folder: Path, *more: str) -> Config:
    pretrained = f"model.llm.pretrained={folder}"
    return load_config(None, [*SMALL_MODEL, pretrained, "data.images=true", "precision=fp32", *more])
