"""Exports read back by the programs that they are for: transformers' classes, our own loader,
fairchem's layout."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from catmllm.cli.main import main
from catmllm.cli.trained import load_to_read
from catmllm.config import load_config
from catmllm.data.prompts import property_sample
from catmllm.design.domain import domain_of, load_domain
from catmllm.design.predict import MODES, predict_energies, question
from catmllm.models.build import build_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.equiformer_v2 import load_fairchem_checkpoint
from catmllm.models.export import export
from catmllm.models.state import load_model, save_model
from catmllm.structure.cif import write_cif


@pytest.fixture(scope="module")
def stage(small_model, small_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished stage."""
    model, collate = small_model
    folder = tmp_path_factory.mktemp("run") / "instruct"
    save_model(folder, model, model.state_dict(), small_config, collate)
    return folder


def test_a_loaded_export_is_the_model(stage: Path, small_model, train_systems) -> None:
    """Loaded without making random weights first; buffers of constants are there too."""
    model, collate = small_model
    loaded, _, _ = load_model(stage)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    batch = collate([property_sample(s) for s in train_systems[:3]])
    with torch.no_grad():
        a, b = model(CatalyticMLLM.answer, batch), loaded(CatalyticMLLM.answer, batch)
    torch.testing.assert_close(a, b)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_run_computes_attention_as_its_own_configuration_says(stage: Path, small_model) -> None:
    """A model that was trained with another one goes on, in a later run, with that run's."""
    assert (
        load_model(stage)[0].text.config._attn_implementation
        == small_model[0].text.config._attn_implementation
    )
    for attention in ("eager", "sdpa", "varlen"):
        assert load_model(stage, attention)[0].text.config._attn_implementation == attention


def assert_same_logits(found, expected, ids: torch.Tensor, n: int | None = None) -> None:
    """Of the first n tokens, in float64, where the order of sums leaves nothing to allow for."""
    with torch.no_grad():
        a, b = (copy.deepcopy(llm).double()(input_ids=ids).logits[..., :n] for llm in (found, expected))
    assert a.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_hf_layout_loads_in_transformers_and_as_our_pretrained_llm(
    stage: Path, small_model, small_config, tmp_path: Path
) -> None:
    model, collate = small_model
    out = export(stage, "hf", tmp_path / "hf", "fp32", shard="100KB")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    llm = Qwen2_5_VLForConditionalGeneration.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer.encode("CO</s>Pt9Cu3 (1 1 1)", add_special_tokens=False)])
    assert ids[0].tolist() == collate.encode("CO</s>Pt9Cu3 (1 1 1)")
    assert_same_logits(llm, model.llm, ids)
    graph = load_file(out / "graph.safetensors")
    whole = {f"llm.{k}": v for k, v in llm.state_dict().items()} | graph
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())
    ours, its_collate, _ = load_model(out)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in model.state_dict().items())
    assert its_collate.encode("CO</s>Pt9Cu3 (1 1 1)") == ids[0].tolist()
    config = load_config(None, [f"model.llm.pretrained={out}", "model.encoder.num_layers=1"])
    again, _ = build_model(config)
    n = len(collate.tokenizer)
    assert_same_logits(again.llm, model.llm, ids, n)


def test_an_export_in_bfloat16_says_what_the_stage_says(stage: Path, train_systems, tmp_path: Path) -> None:
    """`predict` rounds an LLM that was trained in bfloat16: not a bit is lost. What lies beside the weights
    comes along, or goes; an export is exported again, with its card."""
    domain = domain_of(train_systems[:20], "made up", "gas CO")
    domain.save(stage)
    out = tmp_path / "hub"
    assert main(["export", "hf", str(out), "--model", str(stage)]) == 0
    questions = [question(s, mode) for s in train_systems[:2] for mode in MODES]
    read = [load_to_read(folder)[:2] for folder in (stage, out)]
    weights, others = (model.state_dict() for model, _ in read)
    assert weights.keys() == others.keys() and all(
        torch.equal(w, others[name]) for name, w in weights.items()
    )
    said = [predict_energies(*each, questions) for each in read]
    # where a weight begins in memory is the file's, and the order of float32 sums goes by it
    np.testing.assert_allclose(*said, rtol=1e-6, atol=1e-6)
    assert said[0].std() > 0
    card = (out / "README.md").read_text()
    assert load_domain(out) == load_domain(stage) and "has no record" in card and "Labels: made up" in card
    (stage / "domain.json").unlink()
    (out / "README.md").write_text("mine")
    assert main(["export", "hf", str(tmp_path / "again"), "--model", str(out), "--dtype", "bf16"]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == "mine"
    assert main(["export", "hf", str(out), "--model", str(stage)]) == 0
    assert not (out / "domain.json").exists()
    with pytest.raises(ValueError, match="the model itself"):
        export(out, "hf", out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_text_tower_is_a_qwen2(
    stage: Path, small_model, train_systems, tmp_path: Path, dtype: str
) -> None:
    model, collate = small_model
    assert main(["export", "text", str(tmp_path / "text"), "--model", str(stage), "--dtype", dtype]) == 0
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["rms_norm_eps"] == model.llm.config.get_text_config().rms_norm_eps
    # As a server reads it: beside this config.json transformers would cut the text as Qwen does.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text" / "tokenizer")
    assert not (tmp_path / "text" / "tokenizer.json").exists()
    text = "Generate CO</s>Pt9Cu3 (1 1 1)\n" + write_cif(train_systems[0])
    assert tokenizer.encode(text) == collate.encode(text)
    tower = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype="auto")
    assert tower.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    ids = torch.tensor([collate.encode("CO</s>Pt9Cu3 (1 1 1)")])
    with torch.no_grad():
        expected = model.llm(input_ids=ids).logits
        if dtype == "fp32":
            assert_same_logits(tower, model.llm, ids)
        # what a server does with a graph: the prompt as embeddings
        x = model.text.embed_tokens(ids)
        served = copy.deepcopy(tower).float()(inputs_embeds=x).logits
    error = (served - expected).square().mean().sqrt() / expected.std()
    assert error < (1e-6 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "backbone."])
def test_the_encoder_goes_back_into_fairchems_layout(
    stage: Path, small_model, tmp_path: Path, prefix: str
) -> None:
    """Into a file with fairchem's constants, heads and configuration, which stay as they are."""
    encoder = copy.deepcopy(small_model[0].encoder)
    old = {prefix + k: torch.zeros_like(v) for k, v in encoder.state_dict().items()}
    table = torch.linspace(0, encoder.config.max_radius, encoder.config.num_distance_basis)
    others = {
        f"{prefix}distance_expansion.offset": table,
        f"{prefix}energy_block.so3_linear_2.bias": torch.ones(1),
        f"{prefix}blocks.0.norm_1.balance_degree_weight": torch.ones(3),
    }
    template = {
        "state_dict": old | others,
        "config": {"model": {"name": "equiformer_v2"}},
        "optimizer": {"x": 1},
    }
    torch.save(template, tmp_path / "template.pt")
    command = ["export", "fairchem", str(tmp_path / "out.pt"), "--model", str(stage)]
    assert main([*command, "--template", str(tmp_path / "template.pt")]) == 0
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert saved.keys() == {"state_dict", "config"} and saved["config"] == template["config"]
    assert saved["state_dict"].keys() == template["state_dict"].keys()
    assert all(torch.equal(saved["state_dict"][k], v) for k, v in others.items())
    for p in encoder.parameters():
        p.data.zero_()
    load_fairchem_checkpoint(tmp_path / "out.pt", encoder)
    assert all(
        torch.equal(v, encoder.state_dict()[k]) for k, v in small_model[0].encoder.state_dict().items()
    )


def test_without_a_template_the_weights_are_written_and_read(
    stage: Path, small_model, tmp_path: Path
) -> None:
    encoder = copy.deepcopy(small_model[0].encoder)
    for p in encoder.parameters():
        p.data.zero_()
    load_fairchem_checkpoint(export(stage, "fairchem", tmp_path / "encoder.pt"), encoder)
    assert all(
        torch.equal(v, encoder.state_dict()[k]) for k, v in small_model[0].encoder.state_dict().items()
    )


def test_a_template_of_another_encoder_is_refused(
    stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"module.norm.affine_weight": torch.ones(2)}}, tmp_path / "other.pt")
    command = ["export", "fairchem", str(tmp_path / "out.pt"), "--model", str(stage)]
    assert main([*command, "--template", str(tmp_path / "other.pt")]) == 1
    assert "not a file of this encoder" in capsys.readouterr().err and not (tmp_path / "out.pt").exists()
