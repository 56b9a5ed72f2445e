"""Qwen2.5-VL by a configuration: random and small, pretrained with our tokens added,
or an outline of published sizes."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from catmllm.config import ConfigError, LLMConfig
from catmllm.data.tokenizer import extend_tokenizer
from catmllm.models.attention import by_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The published text towers, so that a plan needs neither the hub nor the weights.
QWEN = {
    "3B": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
}


QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
}

# The image tower comes with the architecture; where no picture is shown it is as small as can be.
NO_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 1,
    "fullatt_block_indexes": [0],
}


def random_llm(config: LLMConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Random weights of the configuration's sizes. Raises ConfigError for fewer rows than tokens."""
    rows = len(tokenizer) if config.vocab_size is None else config.vocab_size
    if rows < len(tokenizer):
        raise ConfigError(f"`model.llm.vocab_size`: {rows} rows for a tokenizer of {len(tokenizer)} tokens")
    head = config.hidden_size // config.num_attention_heads
    section = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    text: dict[str, Any] = asdict(config)
    for key in ("pretrained", "attention", "train_images"):
        del text[key]
    text |= {
        "vocab_size": rows,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section},
    }
    return _made(text, NO_VISION | {"out_hidden_size": config.hidden_size}, tokenizer, config.attention)


def outline_llm(config: LLMConfig, tokenizer: PreTrainedTokenizerBase, images: bool) -> Any:
    """The shapes of `config.pretrained`, its head untied: of a local folder's config.json, or by the size in
    a published name. To be made where tensors have no storage.

    Without `images` the image tower is as small as it can be: a run leaves the real one on the CPU.
    Raises ConfigError for a name of unknown size.
    """
    text, vision = _published(str(config.pretrained))
    if not images:
        vision = NO_VISION | {"out_hidden_size": text["hidden_size"]}
    # flash-attn may be missing where shapes are all that is asked for;
    # torch's fused attention keeps the same: the output and a row of sums.
    attention = "sdpa" if config.attention == "flash_attention_2" else config.attention
    llm = _made(text, vision, tokenizer, attention)
    llm.model.visual.to(torch.bfloat16)  # as published
    return llm


def _published(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes of the text and of the image tower."""
    from transformers import Qwen2_5_VLConfig

    if (Path(name) / "config.json").is_file():
        read: Any = Qwen2_5_VLConfig.from_pretrained(name, local_files_only=True)
        return read.get_text_config().to_dict(), read.vision_config.to_dict()
    if found := re.search(r"Qwen2\.5-VL-(3B|7B)", name):
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text: dict[str, Any] = QWEN[found[1]] | {
            "rope_parameters": rope,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
        }
        return text, QWEN_VISION | {"out_hidden_size": text["hidden_size"]}
    raise ConfigError(
        f"`model.llm.pretrained: {name}` is no folder here, and its sizes are not known; a plan knows "
        f"Qwen2.5-VL-{' and Qwen2.5-VL-'.join(QWEN)}, or reads the config.json of a downloaded model"
    )


def _made(
    text: dict[str, Any], vision: dict[str, Any], tokenizer: PreTrainedTokenizerBase, attention: str
) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    qwen = Qwen2_5_VLConfig(
        text_config=text | ids | {"tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(qwen, attn_implementation=by_part(attention))


def pretrained_llm(config: LLMConfig, decimals: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """The LLM of `config.pretrained` with its own tokenizer, extended by our markers and the tokens of
    CIFs."""
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    name = str(config.pretrained)
    kind = AutoConfig.from_pretrained(name).model_type
    if kind != Qwen2_5_VLConfig.model_type:
        raise ConfigError(f"`model.llm.pretrained: {name}` is a {kind}, not a Qwen2.5-VL")
    tokenizer = AutoTokenizer.from_pretrained(name)
    # In the dtype of the files, read through the page cache: sharding makes float32 of it, a block at a time.
    llm: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        name, attn_implementation=by_part(config.attention), dtype="auto"
    )
    extend(llm, tokenizer, decimals)
    return llm, tokenizer


def extend(llm: Any, tokenizer: PreTrainedTokenizerBase, decimals: int) -> None:
    """Add our tokens to a pretrained LLM and its tokenizer, in place; the LM head gets weights of its own."""
    added = extend_tokenizer(tokenizer, decimals, elements=False)
    untie(llm)
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # a new token starts as the mean of those that it replaces
        for weight in (llm.get_input_embeddings().weight, llm.lm_head.weight):
            for new, old in added.items():
                if old:
                    weight[new] = weight[old].mean(0)


def untie(llm: Any) -> None:
    """Give the LM head weights of its own, equal to the embedding's, where the two were one."""
    if llm.lm_head.weight is llm.get_input_embeddings().weight:
        llm.lm_head.weight = nn.Parameter(llm.lm_head.weight.detach().clone())
    llm.config.tie_word_embeddings = llm.config.get_text_config().tie_word_embeddings = False
