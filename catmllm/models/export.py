"""A trained stage in the layouts of other programs: transformers, vLLM, fairchem.

`hf` is the LLM as transformers' own class with our tokenizer, and beside it graph.safetensors with the rest:
encoder, projector, energy head and the closed forms of energies. `load_model` reads it too, and with the card
that `catmllm export` adds (`report/card.py`) it is a folder for the Hub. `text` is the text tower as
Qwen2ForCausalLM or Qwen3ForCausalLM, which vLLM serves; with text alone its positions make it equal that of
the VL models. `fairchem` is the encoder as a checkpoint of fairchem 1.x.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from catmllm.config import to_dict
from catmllm.data.prompts import cif_prompt
from catmllm.data.tokenizer import cif_tokens
from catmllm.models.build import on_meta
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.equiformer_v2 import EquiformerV2
from catmllm.models.fairchem_checkpoint import without_wrapper
from catmllm.models.qwen import NO_VISION, TOKENIZER, llm_class
from catmllm.models.state import GRAPH, load_model

LAYOUTS = ("hf", "text", "fairchem")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BESIDE = ("domain.json", "ridge.json")  # what `design` and `evaluate` keep beside a stage's weights
RESTARTS = ("optimizer", "scheduler", "ema", "amp")  # of a fairchem file: what its training went on from


def export(
    source: Path, layout: str, out: Path, dtype: str = "bf16", template: str | None = None, shard: str = "5GB"
) -> Path:
    """Write the model of `source` (a stage's folder) to `out` in one of `LAYOUTS`; returns what was written.

    dtype: of the LLM's weights (`fp32`, `bf16`, `fp16`); what belongs to the encoder stays float32.
    `template`: a fairchem file of the same model, whose constant tables, heads and configuration the export
    takes over (default: the one that training began from). Raises ValueError for an unknown layout and a
    template that does not fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the model itself: give another folder")
    model, collate, config = load_model(source)
    if layout == "fairchem":
        if not isinstance(model.encoder, EquiformerV2):
            raise ValueError(
                f"{source}: fairchem's files are of EquiformerV2, and this encoder is none; take hf"
            )
        return export_encoder(model.encoder, out, template or config.model.encoder.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    if layout == "text":
        text_tower(model).to(DTYPES[dtype]).save_pretrained(out, max_shard_size=shard)
        save_tokenizer(collate.tokenizer, out)
        return out
    (out / GRAPH).unlink(missing_ok=True)  # it comes last: where it is, the export is whole
    (out / "catmllm.json").write_text(json.dumps(to_dict(config), indent=1))
    collate.templates.save(out)
    for name in BESIDE:
        (out / name).unlink(missing_ok=True)
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())
    parts = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("llm.")}
    model.llm.to(DTYPES[dtype]).save_pretrained(out, max_shard_size=shard)
    save_tokenizer(collate.tokenizer, out)
    save_file(parts, out / f"{GRAPH}.tmp")
    (out / f"{GRAPH}.tmp").rename(out / GRAPH)
    return out


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Into the model's folder; into its subfolder `tokenizer` where
    transformers would read it there as another one.

    Beside a config.json of Qwen2 transformers makes every tokenizer a Qwen2Tokenizer, with Qwen's own way of
    cutting text: right for one that was Qwen's, silently wrong for one that was not.
    """
    from transformers import AutoTokenizer

    shutil.rmtree(out / TOKENIZER, ignore_errors=True)  # of an export before: it would be read first
    tokenizer.save_pretrained(out)
    probe = cif_prompt("CO</s>Pt9Cu3 (1 1 1)") + "".join(cif_tokens())
    if AutoTokenizer.from_pretrained(out).encode(probe) != tokenizer.encode(probe):
        for file in tokenizer.save_pretrained(out / TOKENIZER):
            (out / Path(file).name).unlink(missing_ok=True)


# What the classes have in common; the default of rms_norm_eps differs.
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
OF_QWEN3 = ("head_dim", "attention_bias")


def text_config(model: CatalyticMLLM) -> Any:
    """The text tower's sizes as transformers' Qwen2Config, or Qwen3Config where heads have norms."""
    from transformers import Qwen2Config, Qwen3Config

    c = model.llm.config.get_text_config()
    normed = hasattr(model.text.layers[0].self_attn, "q_norm")
    kind: Any = Qwen3Config if normed else Qwen2Config
    return kind(
        architectures=["Qwen3ForCausalLM" if normed else "Qwen2ForCausalLM"],
        **{name: getattr(c, name, None) for name in (*SHARED, *(OF_QWEN3 if normed else ()))},
        rope_parameters={k: v for k, v in c.rope_parameters.items() if not k.startswith(("mrope", "type"))},
        tie_word_embeddings=False,
        use_sliding_window=False,
    )


def seeing_config(model: CatalyticMLLM, image_id: int) -> Any:
    """The text tower's sizes as transformers' Qwen2_5_VLConfig, or Qwen3VLConfig where heads have norms, with
    `image_id` for a token of an image and an image tower as small as can be: whoever samples with it gives
    images as vectors. Positions are those of the text tower as it is, with one or with three axes."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    c = model.llm.config.get_text_config()
    normed = hasattr(model.text.layers[0].self_attn, "q_norm")
    text: dict[str, Any] = {name: getattr(c, name, None) for name in (*SHARED, *(OF_QWEN3 if normed else ()))}
    text["rope_parameters"] = dict(c.rope_parameters)
    kind: Any = Qwen3VLConfig if normed else Qwen2_5_VLConfig
    vision = (
        NO_VISION | {"out_hidden_size": c.hidden_size} | ({"deepstack_visual_indexes": []} if normed else {})
    )
    return kind(
        architectures=["Qwen3VLForConditionalGeneration" if normed else "Qwen2_5_VLForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_id=image_id,
        tie_word_embeddings=False,
    )


def text_tower(model: CatalyticMLLM) -> Any:
    """The text tower and LM head as transformers' class for text alone, sharing the weights of `model`."""
    config = text_config(model)
    with on_meta():
        tower: Any = llm_class(config)._from_config(config)
    weights = {f"model.{k}": v for k, v in model.text.state_dict().items()}
    tower.load_state_dict(weights | {"lm_head.weight": model.llm.lm_head.weight}, strict=True, assign=True)
    return tower.eval()


def export_encoder(encoder: EquiformerV2, out: Path, template: str | Path | None) -> Path:
    """Write an encoder as fairchem 1.x's checkpoint file.

    fairchem keeps constant tables with the weights and misses them on a strict load:
    they come from `template`.
    """
    weights = {k: v.detach().clone() for k, v in encoder.state_dict().items()}
    saved: dict[str, Any] = {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
    if template is not None:
        loaded = torch.load(template, map_location="cpu", weights_only=True)
        old = loaded.get("state_dict", loaded)
        names = {key: without_wrapper(key) for key in old}
        missing = weights.keys() - set(names.values())
        wrong = [k for k, n in names.items() if n in weights and old[k].shape != weights[n].shape]
        if missing or wrong:
            raise ValueError(
                f"{template}: not a file of this encoder; it lacks {sorted(missing)[:3]}, other shapes: "
                f"{wrong[:3]}"
            )
        rest = (
            {k: v for k, v in loaded.items() if k not in (*RESTARTS, "state_dict")}
            if loaded is not old
            else {}
        )
        saved = rest | {"state_dict": {k: weights.get(names[k], v) for k, v in old.items()}}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    torch.save(saved, temporary)
    temporary.rename(out)
    return out
