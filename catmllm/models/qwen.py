"""The LLM by a configuration: random and small, pretrained with our tokens added,
or an outline of published sizes.

A pretrained one is a Qwen2.5-VL, a Qwen3-VL (whose image tower sees nothing), a Qwen2.5, a Qwen3 or a Llama,
by the `model_type` of its config.json; a random one is a Qwen2.5-VL. A Llama is read as the Qwen2.5 that it
is where the biases of query, key and value are 0; they train as any Qwen2.5's.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from catmllm.config import ConfigError, DataConfig, LLMConfig
from catmllm.data.prompts import END
from catmllm.data.tokenizer import extend_tokenizer
from catmllm.models.attention import by_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers' class of each `model_type` that is read
KINDS = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LLAMA = "llama"
BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
# What a Llama has besides `FITTING`: no bias, and heads that fill the width.
OF_LLAMA = {"attention_bias": False, "mlp_bias": False}
# Where our export puts a tokenizer that transformers would misread beside the model.
TOKENIZER = "tokenizer"
SEES = "qwen2_5_vl"  # whose image tower reads our pictures
# What a text tower may have: our attention has no window and no dropout, our MLP one activation, and decoding
# takes the frequencies as they are at first.
FITTING = {
    "layer_types": ("full_attention",),
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "rope_type": ("default", "linear", "llama3", "yarn"),
}

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

# Llama-3.2's; its heads fill the width.
LLAMA3_2: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
}
LLAMA3_2_BOTH: dict[str, Any] = {
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
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


HARMONICS = 16
NORM = 0.6  # of a coordinate's harmonics, about what a trained vector has


def random_llm(config: LLMConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Random weights of the configuration's sizes. Raises ConfigError for fewer rows than tokens."""
    from transformers import Qwen2_5_VLConfig

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
    vision = NO_VISION | {"out_hidden_size": config.hidden_size}
    llm = _made(Qwen2_5_VLConfig(text_config=text, vision_config=vision), tokenizer, config.attention)
    _coordinates_on_circles(llm, tokenizer)
    return llm


def _coordinates_on_circles(llm: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the vectors of coordinates, ` 0.000` to ` 0.999`, begin with the first harmonics of their values.
    Near values are alike, 0.999 is near 0.000, and to add to a value is to turn its vector, a linear map. As
    random vectors a thousand words have all this to learn, each from the systems that it is in."""
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[f" 0.{i:03d}"] for i in range(1000)]
    weights = llm.get_input_embeddings().weight, llm.lm_head.weight
    waves = min(HARMONICS, weights[0].shape[1] // 8)
    angle = 2 * torch.pi * torch.outer(torch.arange(1000) / 1000, torch.arange(1, waves + 1))
    circles = torch.cat([angle.cos(), angle.sin()], 1) * (NORM / waves**0.5)
    with torch.no_grad():
        for weight in weights:
            weight[ids, : 2 * waves] = circles.to(weight)


def outline_llm(config: LLMConfig, tokenizer: PreTrainedTokenizerBase, images: bool) -> Any:
    """The shapes of `config.pretrained`, its head untied: of a local folder's config.json, or by the size in
    a published name. To be made where tensors have no storage.

    Without `images` the image tower is as small as it can be: a run leaves the real one on the CPU.
    Raises ConfigError for a name of unknown size.
    """
    llm_config = _published(str(config.pretrained))
    seeing = getattr(llm_config, "vision_config", None)
    if seeing is not None and not images:
        width = llm_config.get_text_config().hidden_size
        llm_config.vision_config = type(seeing)(
            **NO_VISION, out_hidden_size=width, deepstack_visual_indexes=[]
        )
    # flash-attn may be missing where shapes are all that is asked for;
    # torch's fused attention keeps the same: the output and a row of sums.
    attention = "sdpa" if config.attention == "flash_attention_2" else config.attention
    llm = _made(llm_config, tokenizer, attention)
    if seeing is not None:
        llm.model.visual.to(torch.bfloat16)  # as published
    return llm


def _published(name: str) -> Any:
    """The configuration of a folder here, or by the size in a published name."""
    from transformers import LlamaConfig, Qwen2_5_VLConfig

    if (Path(name) / "config.json").is_file():
        return read_config(name)
    if found := re.search(r"Qwen2\.5-VL-(3B|7B)", name):
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text: dict[str, Any] = QWEN[found[1]] | {
            "rope_parameters": rope,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
        }
        vision = QWEN_VISION | {"out_hidden_size": text["hidden_size"]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    if found := re.search(r"Llama-3\.2-(1B|3B)", name):
        return _as_qwen(LlamaConfig(**LLAMA3_2[found[1]], **LLAMA3_2_BOTH), name)
    raise ConfigError(
        f"`model.llm.pretrained: {name}` is no folder here, and its sizes are not known; a plan knows "
        f"Qwen2.5-VL-{' and Qwen2.5-VL-'.join(QWEN)}, Llama-3.2-{' and Llama-3.2-'.join(LLAMA3_2)}, or "
        "reads the config.json of a downloaded model"
    )


def _made(config: Any, tokenizer: PreTrainedTokenizerBase, attention: str) -> Any:
    """An LLM of random weights, its head untied."""
    text = config.get_text_config()
    text.bos_token_id, text.eos_token_id = None, tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    config.tie_word_embeddings = text.tie_word_embeddings = False
    return llm_class(config)._from_config(config, attn_implementation=by_part(attention))


def _kind(folder: str | Path) -> str | None:
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(folder)[0].get("model_type")


def read_config(folder: str | Path) -> Any:
    """transformers' configuration of an LLM's folder or hub id.

    Raises ConfigError for a `model_type` that is none of `KINDS` and for a text tower that our parts would
    compute wrongly.
    """
    from transformers import AutoConfig

    kind = _kind(folder)
    if kind not in (*KINDS, LLAMA):
        raise ConfigError(
            f"`model.llm.pretrained: {folder}`: its config.json has `model_type: {kind}`; supported are "
            + ", ".join((*KINDS, LLAMA))
        )
    config: Any = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in FITTING}
    found["layer_types"] = found["layer_types"] or ["full_attention"]
    found["rope_type"] = text.rope_parameters["rope_type"]
    for name, value in found.items():
        if not {*(value if isinstance(value, list) else [value])} <= {*FITTING[name]}:
            raise ConfigError(
                f"`model.llm.pretrained: {folder}`: its config.json has `{name}: {value}`; supported are "
                + ", ".join(map(str, FITTING[name]))
            )
    return _as_qwen(config, folder) if kind == LLAMA else config


def _as_qwen(llama: Any, folder: str | Path) -> Any:
    """The configuration of the Qwen2.5 that computes what this Llama does. Raises ConfigError for biases and
    for heads that do not fill the width."""
    from transformers import Qwen2Config

    found = {name: getattr(llama, name) for name in OF_LLAMA} | {
        "head_dim": llama.head_dim or llama.hidden_size // llama.num_attention_heads
    }
    fits = OF_LLAMA | {"head_dim": llama.hidden_size // llama.num_attention_heads}
    for name, value in found.items():
        if value != fits[name]:
            raise ConfigError(
                f"`model.llm.pretrained: {folder}`: its config.json has `{name}: {value}`; of a Llama "
                f"supported is {fits[name]}"
            )
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "rope_parameters", "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id",
        "pad_token_id", "dtype",
    )  # fmt: skip
    return Qwen2Config(**{name: getattr(llama, name) for name in same}, use_sliding_window=False)


def _load_llama(name: str, config: Any, attention: str) -> Any:
    """A Llama of a folder or hub id as a Qwen2.5, its biases 0, in the dtype of its files. Raises ConfigError
    for weights that are not those of a Llama."""
    llm, said = llm_class(config).from_pretrained(
        name,
        config=config,
        attn_implementation=by_part(attention),
        dtype="auto",
        output_loading_info=True,
    )
    missing = {key for key in said["missing_keys"] if not key.endswith(BIASES)}
    if missing or said["unexpected_keys"]:
        wrong = sorted({*missing, *said["unexpected_keys"]})
        raise ConfigError(
            f"`model.llm.pretrained: {name}`: its weights are no Llama's: {', '.join(wrong[:3])}"
        )
    with torch.no_grad():
        for key, parameter in llm.named_parameters():
            if key.endswith(BIASES):
                parameter.zero_()
    return llm


def llm_class(config: Any) -> Any:
    """transformers' class of an LLM with a language model's head."""
    import transformers

    return getattr(transformers, KINDS[config.model_type])


def sees(config: Any, data: DataConfig) -> None:
    """Raises ConfigError where `data` has pictures and an LLM of this configuration reads none of ours."""
    if data.images and config.model_type != SEES:
        raise ConfigError(
            "`data.images` needs the image tower of a pretrained Qwen2.5-VL; this LLM is a "
            f"{config.model_type}: set `data.images: false`, or another `model.llm.pretrained`"
        )


def pretrained_llm(config: LLMConfig, data: DataConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """The LLM of `config.pretrained` with its own tokenizer, extended by our markers and the tokens of
    CIFs. Raises ConfigError for an LLM that does not fit."""
    from transformers import AutoTokenizer

    name = str(config.pretrained)
    kind = read_config(name)
    sees(kind, data)
    own = Path(name) / TOKENIZER
    tokenizer = AutoTokenizer.from_pretrained(own if own.is_dir() else name)
    # In the dtype of the files, read through the page cache: sharding makes float32 of it, a block at a time.
    if _kind(name) == LLAMA:
        llm = _load_llama(name, kind, config.attention)
    else:
        llm = llm_class(kind).from_pretrained(
            name, attn_implementation=by_part(config.attention), dtype="auto"
        )
    extend(llm, tokenizer, data.decimals)
    return llm, tokenizer


def extend(llm: Any, tokenizer: PreTrainedTokenizerBase, decimals: int) -> None:
    """Add our tokens to a pretrained LLM and its tokenizer, in place; the LM head gets weights of its own."""
    added = extend_tokenizer(tokenizer, decimals, elements=False)
    if tokenizer.eos_token != END:  # a base model's own ends documents, ours ends answers
        tokenizer.eos_token = END
        llm.generation_config.eos_token_id = tokenizer.eos_token_id
        llm.config.get_text_config().eos_token_id = tokenizer.eos_token_id
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
