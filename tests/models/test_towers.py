"""Qwen2.5, Qwen3 and Qwen3-VL from folders that transformers wrote, held to transformers' own models."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from catmllm.config import ConfigError, LoRAConfig, SamplingConfig
from catmllm.data.batches import Batch, Collator, Encoded
from catmllm.data.open import open_data
from catmllm.data.prompts import END, Sample, cif_prompt, design_sample
from catmllm.models import decoder
from catmllm.models.build import build_model, collator, outline_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import export
from catmllm.models.half_precision import rounded
from catmllm.models.lora import adapted, add_lora, merged
from catmllm.models.state import load_model, save_model
from catmllm.plan.made_up import qwen_like_tokenizer
from catmllm.plan.trace import trace
from catmllm.sample.answers import Choices
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.sample.packed import rollout_batch
from catmllm.sample.tower import Tower
from catmllm.stages import STAGES
from catmllm.stages.grpo import frozen_outline
from catmllm.stages.joint import Joint
from catmllm.structure.system import System
from catmllm.train.loop import train
from catmllm.train.setup import freeze
from catmllm.train.stage import Context
from catmllm.train.throughput import ModelFlops
from catmllm.world import World
from tests.contexts import MakeContext
from tests.towers import KINDS, own_model, save_tower, tower_config

LENGTHS = [5, 1, 12, 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in out.items():
        save_tower(folder, kind)
    return out


def usual(*kinds: str) -> pytest.MarkDecorator:
    """All kinds, of which these in every run of the tests and the others with the slow ones."""
    every = [pytest.param(k, marks=() if k in kinds else pytest.mark.slow) for k in KINDS]
    return pytest.mark.parametrize("folder", every, indirect=True)


@pytest.fixture
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def built(folder: Path, *more: str) -> tuple[CatalyticMLLM, Collator]:
    config = tower_config(folder, *more)
    model, tokenizer = build_model(config)
    return model.eval(), collator(model, tokenizer, config)


def problem(collate: Collator, rows: int) -> tuple[Batch, torch.Tensor]:
    """Samples of the model's own words, and a gradient of their logits [T, rows]."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, rows - 1, (n,), generator=generator).tolist() for n in LENGTHS]
    batch = collate.join([Encoded(i, [], None, None) for i in ids])
    return batch, torch.randn(sum(LENGTHS), rows, generator=generator)


def one_by_one(own: Any, batch: Batch) -> torch.Tensor:
    """Logits [T, rows] of transformers' own model, which sees a sample at a time."""
    return torch.cat([own(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(LENGTHS)])


def gradients(llm: Any, rows: int) -> dict[str, torch.Tensor]:
    """By name; those of a head that is tied to its embedding are one."""
    out = {n: p.grad for n, p in llm.named_parameters() if p.grad is not None and "visual" not in n}
    for name in [n for n in out if n.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        out["words"] = out.get("words", 0) + out.pop(name)[:rows]
    return out


WAYS = {
    "csrc": (),
    "reference": (),
    "padded": ("data.packed=false",),
    "sdpa": ("model.llm.attention=sdpa",),
    "eager": ("model.llm.attention=eager",),
}


USUAL = [(kind, "csrc") for kind in KINDS] + [("qwen3", "padded"), ("qwen3_vl", "sdpa")]
EVERY = [(kind, way) for kind in KINDS for way in WAYS]


@pytest.mark.parametrize(
    ("folder", "way"),
    [pytest.param(*at, marks=() if at in USUAL else pytest.mark.slow) for at in EVERY],
    indirect=["folder"],
)
def test_packed_logits_and_gradients_are_transformers_own(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to float64 as transformers' own float32: within four times its distance, since the order of
    some sums differs."""
    if way == "reference":
        monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    (model, collate), own = built(folder, *WAYS[way]), own_model(folder)
    exact = copy.deepcopy(own).double()
    rows = own.get_input_embeddings().num_embeddings
    batch, grad = problem(collate, rows)
    assert batch.padded == (way == "padded")
    logits = [
        (model.hidden(batch) @ model.llm.lm_head.weight.t())[:, :rows],
        one_by_one(own, batch),
        one_by_one(exact, batch),
    ]
    for found, of in zip(logits, (model.llm, own, exact)):
        found.backward(grad.to(found.dtype))
        of.logits = found.detach()
    theirs, right = (gradients(of, rows) for of in (own, exact))
    found = gradients(model.llm, rows)
    assert (model.llm.logits - exact.logits).abs().max() <= 4 * (own.logits - exact.logits).abs().max()
    assert found.keys() == right.keys() and len(found) >= 2 * 11 + 2
    for name, of in right.items():
        # A key's bias moves every score of a row alike: its gradient is nothing but rounding.
        least = 4 * (theirs[name] - of).abs().max() + 1e-6 * of.abs().max()
        assert (found[name] - of).abs().max() <= max(least, 2e-5 if "k_proj.bias" in name else 0), name


@usual("qwen3_vl")
def test_the_fused_passes_are_what_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("rms_norm", "rotate", "swiglu"):
        plain = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *a, n=name, f=plain: ran.append(n) or f(*a))
    model, collate = built(folder)
    model.hidden(problem(collate, 200)[0])
    norms = 1 + 2 * (2 if folder.name.startswith("qwen2") else 4)
    assert sorted(ran) == ["rms_norm"] * norms + ["rotate"] * 2 + ["swiglu"] * 2


@usual("qwen3")
@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.float16, "eager"),
        pytest.param(torch.float16, "varlen", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "varlen", marks=pytest.mark.slow),
    ],
)
def test_half_precision(folder: Path, dtype: torch.dtype, attention: str) -> None:
    """With what keeps large values in float32 no worse than transformers' own in the same dtype;
    training's passes, and prompts that are read for decoding."""
    (model, collate), own = built(folder, f"model.llm.attention={attention}"), own_model(folder)
    batch, _ = problem(collate, own.get_input_embeddings().num_embeddings)
    states = []
    for of in (copy.deepcopy(own).double(), own):
        for p in of.parameters():
            p.data = p.data.to(dtype).to(torch.float64 if not states else dtype)
        text = getattr(of.model, "language_model", of.model)
        with torch.no_grad():
            parts = [text(input_ids=i[None], use_cache=False) for i in batch.input_ids.split(LENGTHS)]
        states.append(torch.cat([p.last_hidden_state[0] for p in parts]).double())
    exact, theirs = states
    tower = Tower(model, dtype)
    model = rounded(model, dtype, torch.float32)
    with torch.no_grad():
        found = model.hidden(batch)
        read = [tower.prefill(model.text.embed_tokens(i)[None].to(dtype))[0][0] for i in
                batch.input_ids.split(LENGTHS)]  # fmt: skip
    assert found.dtype == dtype
    for ours in (found, torch.cat(read)):
        rms = [float((x.double() - exact).square().mean().sqrt()) for x in (ours, theirs)]
        assert rms[0] <= 1.5 * rms[1]


@usual("qwen3")
def test_exports_are_read_and_continued_by_transformers(
    folder: Path, tmp_path: Path, train_systems: list[System]
) -> None:
    """What `generate` writes with the exported files is what our own engine decodes; and both layouts, and
    our own folder, hold the model."""
    config = tower_config(folder)
    model, collate = built(folder)
    save_model(tmp_path / "stage", model, model.state_dict(), config, collate)
    again, _, _ = load_model(tmp_path / "stage")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    out = export(tmp_path / "stage", "hf", tmp_path / "hf", "fp32")
    text = export(tmp_path / "stage", "text", tmp_path / "text", "fp32")
    own, served = own_model(out), transformers.AutoModelForCausalLM.from_pretrained(text)
    assert type(own).__name__ == type(own_model(folder)).__name__
    assert type(served).__name__ == f"Qwen{folder.name[4]}ForCausalLM"
    prompts = [Sample(cif_prompt(s.identity)) for s in train_systems[:40:20]]
    params = SamplingConfig(temperature=1.0, top_p=1e-6, max_new_tokens=8)
    rollouts = RolloutEngine(model, collate).generate(prompts, params, [0])
    assert len({tuple(r.ids.tolist()) for r in rollouts}) > 1
    for prompt, rollout in zip(prompts, rollouts):
        ids = torch.tensor([collate.prompt_ids(prompt)])
        for of in (own, served):
            written = of.generate(
                ids,
                do_sample=False,
                max_new_tokens=8,
                eos_token_id=collate.end_id,
                suppress_tokens=[collate.graph_id, collate.energy_id],
            )
            assert written[0, ids.shape[1] :].tolist() == rollout.ids.tolist()
    # and it is a checkpoint that training can begin from
    restarted, other = built(out)
    assert other.end_id == collate.end_id and len(other.tokenizer) == len(collate.tokenizer)
    assert all(torch.equal(v, model.llm.state_dict()[k]) for k, v in restarted.llm.state_dict().items())


@pytest.mark.slow
def test_what_sampling_reports_is_what_training_reads(
    folders: dict[str, Path], train_systems: list[System]
) -> None:
    """Log-probabilities of whole CIFs under the grammar; the prompt shows a structure, and its tokens are
    there once for all answers."""
    model, collate = built(folders["qwen3"])
    system = train_systems[0]
    sample = dataclasses.replace(design_sample(system, system), answer="")
    pattern = answer_pattern(system.identity, system.target, True)
    rollouts = RolloutEngine(model, collate).generate(
        [sample], SamplingConfig(max_new_tokens=400), [0], group_size=2, patterns=[pattern]
    )
    chosen = Choices.join(rollouts)
    batch = rollout_batch(collate, [sample], rollouts)
    assert batch.prefix is not None and chosen is not None and all(r.finished for r in rollouts)
    with torch.no_grad():
        read = model(CatalyticMLLM.answer, batch, chosen=chosen).logprob
    told = torch.cat([r.logprob for r in rollouts])[chosen[0]]
    assert told.min() < -1
    torch.testing.assert_close(read, told, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_positions_of_pictures_turn_the_frequencies_that_qwen3_vl_says(folders: dict[str, Path]) -> None:
    """Its three sections take turns, those of Qwen2.5-VL lie end to end."""
    model, _ = built(folders["qwen3_vl"])
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    own = torch.arange(9).expand(2, -1)
    mrope = torch.stack([own, own * 2 + 3, own // 2])
    with torch.no_grad():
        expected = model.text(inputs_embeds=x, position_ids=mrope, use_cache=False).last_hidden_state
        found, _ = Tower(model, torch.float32).prefill(x, mrope)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert Tower(model, torch.float32).axis.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@usual("qwen3")
def test_new_words_are_means_and_old_ones_stay(folder: Path) -> None:
    """Of a base model, whose texts end otherwise than turns do."""
    (model, collate), own = built(folder), own_model(folder)
    own_words = own.get_input_embeddings().weight
    words = model.text.embed_tokens.weight
    assert torch.equal(words[: len(own_words)], own_words)
    before = transformers.AutoTokenizer.from_pretrained(folder).encode(" 1\n")
    (new,) = collate.encode(" 1\n")
    assert len(before) == 3 and new >= len(own_words)
    torch.testing.assert_close(words[new], own_words[before].mean(0))
    assert model.llm.lm_head.weight is not words
    assert collate.tokenizer.eos_token == END and collate.encode(END) == [collate.end_id]
    assert model.llm.generation_config.eos_token_id == collate.end_id


@usual("qwen3")
def test_adapters_sit_on_the_linears_of_the_text(folder: Path) -> None:
    model, collate = built(folder)
    batch, _ = problem(collate, 200)
    names = model.state_dict().keys()
    lora = LoRAConfig(r=2)
    add_lora(model, lora, 0)
    assert len(adapted(model)) == 7 * 2
    frozen = frozen_outline(model)  # GRPO's reference
    assert all(p.is_meta for p in frozen.parameters()) and type(frozen.text) is type(model.text)
    with torch.no_grad():
        for linear in adapted(model):
            linear.lora_B["default"].weight.normal_(0, 0.1)
        expected = model.eval().hidden(batch)
        plain, _ = built(folder)
        assert not torch.allclose(plain.hidden(batch), expected)
        state = merged(model.state_dict(), lora)
        assert state.keys() == names
        plain.load_state_dict(state)
        torch.testing.assert_close(plain.hidden(batch), expected, rtol=1e-4, atol=1e-4)
        x = model.text.embed_tokens(batch.input_ids[: LENGTHS[0]])[None]
        found, _ = Tower(model, torch.float32).prefill(x)
    torch.testing.assert_close(found[0], expected[: LENGTHS[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_has_the_flops_that_torch_counts(kind: str, tmp_path: Path) -> None:
    save_tower(
        tmp_path, kind, vocab_size=4000
    )  # more words than the tokenizer of plans, as published ones have
    config = tower_config(tmp_path, "model.llm.attention=eager", "joint.batch_size=3")
    data = {k: v[:12] for k, v in open_data().items()}
    tokenizer = qwen_like_tokenizer(data["train"], config.data.decimals)
    model, collate = outline_model(config, tokenizer)  # with storage here: what a plan only outlines
    own = own_model(tmp_path)
    assert {k: v.shape for k, v in model.llm.state_dict().items() if "visual" not in k} == {
        k: v.shape for k, v in own.state_dict().items() if "visual" not in k
    }
    world = World(0, 1, torch.device("cpu"))
    stage: Any = STAGES["joint"](Context(config, model, collate, data, world, tmp_path))
    freeze(model, stage, False)
    with FlopCounterMode(display=False) as counter:
        work = stage.step(0)
        work.passes[0].loss().backward()
    plan = trace(config, "joint", 1, data=data, cuda=False, steps=1)
    assert plan.passes == len(work.passes) == 1
    assert sum(v for k, v in plan.flops.items() if k != "optimizer") == counter.get_total_flops() > 1e7
    heads = ModelFlops(model, True).attention
    assert heads == 3 * 4 * 2 * 4 * model.text.layers[0].self_attn.head_dim
    size = sum(p.numel() for n, p in model.named_parameters() if "visual" not in n)
    assert plan.parts["parameters"] >= 4 * size / 2**30
    assert plan.parts["parameters"] * 2**30 < 4 * size * 1.1 + sum(b.nbytes for b in model.buffers())


@pytest.mark.slow
def test_a_stage_shards_trains_and_resumes(make_context: MakeContext, folders: dict[str, Path]) -> None:
    """A run that breaks and goes on ends where an unbroken one does."""
    config = tower_config(folders["qwen3"], "joint.train_encoder=true", "tensorboard=false", "lora.r=2")
    config.joint.steps, config.joint.warmup, config.joint.batch_size = 4, 1, 3
    config.joint.log_every, config.joint.checkpoint_every = 1, 2

    class Broken(Joint):
        def step(self, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().step(step)

    states, losses = [], []
    for stage in (Joint, Broken):
        context = make_context(config)
        context.folder = context.folder / stage.__name__
        context.folder.mkdir()
        if stage is Broken:
            with pytest.raises(KeyboardInterrupt):
                train(Broken, context)
            folder = context.folder
            context = make_context(config)
            context.folder = folder
        state, _ = train(Joint, context)
        states.append(state)
        rows = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
        losses.append([r["loss"] for r in rows])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(".q_norm." in k for k in states[0])


def test_what_is_not_supported_is_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(
        ConfigError, match="`model_type: gemma`; supported are qwen2_5_vl, qwen3_vl, qwen2, qwen3, llama"
    ):
        build_model(tower_config(tmp_path))
    for kind, folder in folders.items():
        with pytest.raises(ConfigError, match=f"`data.images` needs .* a {kind}: set `data.images: false`"):
            build_model(tower_config(folder, "data.images=true"))
    own = json.loads((folders["qwen2"] / "config.json").read_text())
    for change, said in (
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: dynamic",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(own | change))
        with pytest.raises(ConfigError, match=said):
            build_model(tower_config(tmp_path))


@pytest.mark.slow
def test_a_longer_context_by_yarn_is_decoded_as_transformers_does(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
    save_tower(tmp_path, "qwen2", rope_parameters=rope, max_position_embeddings=32)
    model, _ = built(tmp_path)
    x = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = own_model(tmp_path).model(inputs_embeds=x, use_cache=False).last_hidden_state
        found, _ = Tower(model, torch.float32).prefill(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
