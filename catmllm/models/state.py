"""A trained model's folder: what a stage leaves, and the next one, the commands and the evaluation read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from catmllm.config import STAGES, Config, from_dict, to_dict
from catmllm.data.batches import Collator
from catmllm.models.attention import by_part
from catmllm.models.build import assemble, build_encoder, collator, on_meta
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.energy_head import EnergyHead
from catmllm.models.qwen import llm_class, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_model(
    folder: Path,
    model: CatalyticMLLM,
    state: dict[str, torch.Tensor],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """An export that `load_model` reads: model.safetensors, catmllm.json, tokenizer,
    and the LLM's own config in llm/.

    `state` is the whole state dict of `model`, gathered from its shards; the weights file appears last,
    at once.
    """
    from safetensors.torch import save_file

    save_description(folder, model, config, tokenizer)
    temporary = folder / "model.safetensors.tmp"
    save_file({k: v.contiguous() for k, v in state.items()}, temporary)
    temporary.rename(folder / "model.safetensors")


def stage_folder(folder: str | Path) -> Path:
    """A stage's folder itself, or the last finished stage of a run's.
    Raises FileNotFoundError where there is neither."""
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return folder
    stages = [folder / s for s in STAGES if (folder / s / "model.safetensors").is_file()]
    if not stages:
        raise FileNotFoundError(f"{folder}: no trained stage there; `make run` trains one into runs/tiny")
    return stages[-1]


def load_model(folder: str | Path, attention: str | None = None) -> tuple[CatalyticMLLM, Collator, Config]:
    """Read an export: the model in float32, what makes its batches,
    and the configuration it was trained with.

    `attention`: how this one computes it (`model.llm.attention`); None: as when it was trained.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: no model.safetensors; give the folder of a finished stage")
    model, collate, config = described_model(folder, attention)
    # The file's own pages become the weights: ranks of one machine share them until they are sharded.
    state = load_file(folder / "model.safetensors")
    # an export from before there were closed forms has none
    state = {k: v for k, v in model.state_dict().items() if "prior." in k} | state
    if "energy_head.weight" in state:
        state |= _parted_head(
            state.pop("energy_head.weight"), state.pop("energy_head.bias"), model.projector.linear.in_features
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), collate, config


def save_description(
    folder: Path, model: CatalyticMLLM, config: Config, tokenizer: PreTrainedTokenizerBase
) -> None:
    """All of an export but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.llm.config.save_pretrained(folder / "llm")
    (folder / "catmllm.json").write_text(json.dumps(to_dict(config), indent=1))


def described_model(folder: Path, attention: str | None = None) -> tuple[CatalyticMLLM, Collator, Config]:
    """What `save_description` has written: the model, its parameters without storage, what makes its batches,
    and the configuration."""
    from transformers import PreTrainedTokenizerFast

    config = from_dict(json.loads((folder / "catmllm.json").read_text()), str(folder / "catmllm.json"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    qwen = read_config(folder / "llm")
    attention = attention or config.model.llm.attention
    with on_meta():
        llm = llm_class(qwen)._from_config(qwen, attn_implementation=by_part(attention))
        encoder = build_encoder(replace(config.model.encoder, checkpoint=None), config.data.cutoff)
        model = assemble(llm, encoder, config, tokenizer)
    return model, collator(model, tokenizer, config), config


def _parted_head(weight: torch.Tensor, bias: torch.Tensor, features: int) -> dict[str, torch.Tensor]:
    """The energy head of an export from before it read graph tokens:
    the one read-out serves with and without them."""
    head = EnergyHead(weight.shape[1], features)
    with torch.no_grad():
        for part in (head.text, head.correction):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        for parameter in head.graph.parameters():
            parameter.zero_()
    return {f"energy_head.{name}": tensor for name, tensor in head.state_dict().items()}
