"""A trained model's folder: what a stage leaves, and the next one, the commands and the evaluation read.

A stage writes every tensor to model.safetensors. An export of the layout `hf` (`export.py`) has the LLM as
transformers writes it, and the rest in graph.safetensors. Both are read here. The model that comes with the
package is such an export.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from catmllm.config import STAGES, Config, from_dict, to_dict
from catmllm.data.batches import Collator
from catmllm.models.attention import by_part
from catmllm.models.build import assemble, build_encoder, collator, on_meta
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.energy_head import EnergyHead
from catmllm.models.qwen import TOKENIZER, llm_class, read_config
from catmllm.structure.templates import Templates

GRAPH = "graph.safetensors"  # of an export: all but the LLM


def save_model(
    folder: Path,
    model: CatalyticMLLM,
    state: dict[str, torch.Tensor],
    config: Config,
    collate: Collator,
) -> None:
    """An export that `load_model` reads: model.safetensors, catmllm.json, tokenizer, the templates of slabs,
    and the LLM's own config in llm/.

    `state` is the whole state dict of `model`, gathered from its shards; the weights file appears last,
    at once.
    """
    from safetensors.torch import save_file

    save_description(folder, model, config, collate)
    temporary = folder / "model.safetensors.tmp"
    save_file({k: v.contiguous() for k, v in state.items()}, temporary)
    temporary.rename(folder / "model.safetensors")


def holds_model(folder: Path) -> bool:
    """Whether a folder is a finished stage's or an export's: both write their weights last."""
    return (folder / "model.safetensors").is_file() or (folder / GRAPH).is_file()


def stage_folder(folder: str | Path) -> Path:
    """A stage's or an export's folder itself, or the last finished stage of a run's.
    Raises FileNotFoundError where there is neither."""
    folder = Path(folder)
    if holds_model(folder):
        return folder
    stages = [folder / s for s in STAGES if (folder / s / "model.safetensors").is_file()]
    if not stages:
        raise FileNotFoundError(f"{folder}: no trained stage there; `make run` trains one into runs/tiny")
    return stages[-1]


def load_model(folder: str | Path, attention: str | None = None) -> tuple[CatalyticMLLM, Collator, Config]:
    """Read a stage's folder or an export of the layout `hf`: the model in float32, what makes its batches,
    and the configuration it was trained with.

    `attention`: how this one computes it (`model.llm.attention`); None: as when it was trained.
    """
    folder = Path(folder)
    if not holds_model(folder):
        raise FileNotFoundError(f"{folder}: no model.safetensors; give the folder of a finished stage")
    model, collate, config = described_model(folder, attention)
    state = _weights(folder)
    # an export from before there were closed forms has none
    state = {k: v for k, v in model.state_dict().items() if "prior." in k} | state
    if "energy_head.weight" in state:
        state |= _parted_head(
            state.pop("energy_head.weight"), state.pop("energy_head.bias"), model.projector.linear.in_features
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval(), collate, config


def save_description(folder: Path, model: CatalyticMLLM, config: Config, collate: Collator) -> None:
    """All of an export but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    collate.tokenizer.save_pretrained(folder)
    collate.templates.save(folder)
    model.llm.config.save_pretrained(folder / "llm")
    (folder / "catmllm.json").write_text(json.dumps(to_dict(config), indent=1))


def trained_config(folder: Path) -> Config:
    """The configuration that a stage or an export was trained with."""
    path = folder / "catmllm.json"
    return from_dict(json.loads(path.read_text()), str(path))


def described_model(folder: Path, attention: str | None = None) -> tuple[CatalyticMLLM, Collator, Config]:
    """What `save_description` has written, or an export of the layout `hf`: the model, its parameters without
    storage, what makes its batches, and the configuration."""
    from transformers import PreTrainedTokenizerFast

    config = trained_config(folder)
    own = folder / TOKENIZER
    tokenizer = PreTrainedTokenizerFast.from_pretrained(own if own.is_dir() else folder)
    qwen = read_config(folder if (folder / GRAPH).is_file() else folder / "llm")
    attention = attention or config.model.llm.attention
    with on_meta():
        llm = llm_class(qwen)._from_config(qwen, attn_implementation=by_part(attention), dtype=torch.float32)
        encoder = build_encoder(replace(config.model.encoder, checkpoint=None), config.data.cutoff)
        model = assemble(llm, encoder, config, tokenizer)
    return model, collator(model, tokenizer, config, Templates.load(folder)), config


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its name in the model. A stage's are the file's own pages: ranks of one
    machine share them until they are sharded. An export's LLM has transformers' names and becomes float32."""
    from safetensors.torch import load_file

    if not (folder / GRAPH).is_file():
        return load_file(folder / "model.safetensors")
    llm = llm_class(read_config(folder)).from_pretrained(folder, dtype=torch.float32)
    return load_file(folder / GRAPH) | {f"llm.{k}": v for k, v in llm.state_dict().items()}


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
