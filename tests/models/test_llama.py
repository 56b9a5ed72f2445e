"""A Llama as the Qwen2.5 with biases of 0, held to transformers' own Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from catmllm.config import ConfigError
from catmllm.models.build import build_model, collator
from catmllm.models.export import export, save_tokenizer
from catmllm.models.qwen import read_config
from catmllm.models.state import load_model, save_model
from tests.models.test_towers import one_by_one, problem
from tests.towers import HEADS, base_tokenizer, tower_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Llama-3.2: grouped queries, scaled frequencies, a head tied to its embedding."""
    tokenizer = base_tokenizer()
    config = transformers.LlamaConfig(
        **HEADS,
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=2,
        initializer_range=0.2,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    model.save_pretrained(tmp_path / "llama")
    save_tokenizer(tokenizer, tmp_path / "llama")
    return tmp_path / "llama"


@torch.no_grad()
def test_logits_are_those_of_transformers_llama(folder: Path) -> None:
    config = tower_config(folder)
    model, tokenizer = build_model(config)
    collate = collator(model.eval(), tokenizer, config)
    own = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    rows = own.config.vocab_size
    batch, _ = problem(collate, rows)
    right = one_by_one(own, batch)
    found = (model.hidden(batch) @ model.llm.lm_head.weight.t())[:, :rows]
    assert right.std() > 0.5
    assert (found - right).abs().max() <= 1e-5
    # what is saved and exported is the same model, and needs no Llama any more
    save_model(folder.parent / "joint", model, model.state_dict(), config, collate)
    again, _, _ = load_model(folder.parent / "joint")
    assert torch.equal(again.hidden(batch), model.hidden(batch))
    export(folder.parent / "joint", "text", folder.parent / "text", "fp32")
    text = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "text").eval()
    assert (one_by_one(text, batch)[:, :rows] - right).abs().max() <= 1e-5


@pytest.mark.parametrize(("key", "value"), [("attention_bias", True), ("mlp_bias", True), ("head_dim", 20)])
def test_a_llama_that_no_qwen_is_is_refused(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"config.json has `{key}: {value}`; of a Llama"):
        read_config(folder)


def test_weights_that_are_no_llamas_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no Llama's: model\.layers\.1\.mlp\.up_proj\.weight"):
        build_model(tower_config(folder))
