"""What vLLM's process is given, as far as it runs without vLLM: the weights, those that train alone, where
they lie, and the order of calls on a GPU."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import types
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.multiprocessing import reductions
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from catmllm.config import LoRAConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.data.prompts import Sample, cif_prompt, design_prompt
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import seeing_config
from catmllm.models.lora import add_lora, effective_weight
from catmllm.sample import vllm_weights, vllm_worker
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import Walk, answer_pattern, grammar_of
from catmllm.sample.packed import hidden_states
from catmllm.sample.vllm_engine import Steered, card_of
from catmllm.sample.vllm_weights import Weights
from catmllm.sample.vllm_worker import Model, Steering, tensors_of
from catmllm.structure.system import System
from tests.sample.test_engine import some_prompts

Small = tuple[CatalyticMLLM, Collator]


def received(weights: Weights, trained: bool) -> dict[str, torch.Tensor]:
    """What the other process reads of the parts that are sent."""
    found: dict[str, torch.Tensor] = {}
    for part in weights.parts(trained):
        found |= tensors_of(weights.fd, types.SimpleNamespace(**part.says))
    return found


def test_all_weights_arrive_as_a_qwen_has_them(small_model: Small) -> None:
    """transformers' own class loads them by name, strictly but for the image tower, and computes the same."""
    model, collate = small_model
    weights = Weights(model, torch.float32, 1.0)
    found = received(weights, trained=False)
    assert weights.moved == sum(t.nbytes for t in found.values())
    assert os.fstat(weights.fd).st_size < weights.moved / 2  # a layer at a time
    weights.close()
    config = seeing_config(model, collate.graph_id)
    llm = Qwen2_5_VLForConditionalGeneration._from_config(config)
    missing, unexpected = llm.load_state_dict(found, strict=False)
    assert not unexpected and all(name.startswith("model.visual.") for name in missing)
    ids = torch.tensor([collate.encode("CO</s>Pt9Cu3 (1 1 1)")])
    with torch.no_grad():
        ours = copy.deepcopy(model.llm)(input_ids=ids).logits
        torch.testing.assert_close(llm(input_ids=ids).logits, ours, atol=1e-4, rtol=1e-4)


def test_a_graph_token_is_an_image_whose_positions_are_those_of_text(
    small_model: Small, train_systems: list[System], tmp_path: Path
) -> None:
    """By transformers' M-RoPE: one merged token of 1 × 2 × 2 patches counts on as a word does."""
    model, collate = small_model
    seeing_config(model, collate.graph_id).save_pretrained(tmp_path)
    llm = Qwen2_5_VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(tmp_path))
    ids = torch.tensor([collate.prompt_ids(s) for s in some_prompts(train_systems)[1:2]])
    assert int((ids == collate.graph_id).sum()) == 1
    positions, delta = llm.model.get_rope_index(
        input_ids=ids,
        image_grid_thw=vllm_worker.GRID,
        mm_token_type_ids=(ids == collate.graph_id).int(),
        attention_mask=torch.ones_like(ids),
    )
    assert torch.equal(positions, torch.arange(ids.shape[1]).expand(3, 1, -1)) and int(delta) == 0


def test_only_what_trains_is_sent_again(small_model: Small) -> None:
    model = copy.deepcopy(small_model[0]).requires_grad_(False)
    model.llm.lm_head.weight.requires_grad_(True)
    weights = Weights(model, torch.bfloat16, 0.5)
    assert not weights.all_train()
    found = received(weights, trained=True)
    assert list(found) == ["lm_head.weight"]  # as in GA-GRPO
    head = model.llm.lm_head.weight.detach()
    assert torch.equal(found["lm_head.weight"], (head / 0.5).bfloat16())
    assert weights.moved == 2 * head.numel()
    weights.close()


def test_with_adapters_these_are_sent_alone(small_model: Small, tmp_path: Path) -> None:
    """In peft's layout: W + scale · B A from the files is what the model applies."""
    model = copy.deepcopy(small_model[0]).requires_grad_(False)
    base = {f"model.language_model.{n}": p.clone() for n, p in model.text.named_parameters()}
    add_lora(model, LoRAConfig(r=4, alpha=6.0), 0)
    for linear in (m for m in model.text.modules() if hasattr(m, "lora_B")):
        torch.nn.init.normal_(linear.lora_B["default"].weight)
    weights = Weights(model, torch.float32, 1.0)
    assert weights.rank() == 8  # the least that vLLM has room for
    plain = received(weights, trained=False)
    for name, value in base.items():
        assert torch.equal(plain[name], value), name
    weights.write_adapters(tmp_path)
    weights.write_adapters(tmp_path)
    folder = tmp_path / vllm_weights.ADAPTERS
    says = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        adapters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    assert len(adapters) == 2 * 7 * len(model.text.layers)
    for name, linear in weights.linears().items():
        one = f"base_model.model.model.language_model.{name}"
        a, b = adapters[f"{one}.lora_A.weight"], adapters[f"{one}.lora_B.weight"]
        merged = base[f"model.language_model.{name}.weight"] + says["lora_alpha"] / says["r"] * b @ a
        torch.testing.assert_close(merged, effective_weight(linear))
    weights.close()


def test_a_gpus_weights_go_by_one_handle(small_model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the driver: a buffer that is exported once, for all parts of an update, under the
    name of the card, as vLLM's transfer by CUDA IPC reads it."""
    exported: list[torch.Tensor] = []

    def export(buffer: torch.Tensor) -> tuple:
        exported.append(buffer)
        return reductions.rebuild_cuda_tensor, ("handle",)

    model = small_model[0]
    monkeypatch.setattr(Weights, "on_gpu", True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="card")
    )
    monkeypatch.setattr(vllm_weights, "reduce_tensor", export)
    settings: list[str] = []
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    weights, found = Weights(model, torch.float32, 1.0), {}
    for part in weights.parts(trained=False):
        assert pickle.loads(part.blocks[0]) == {"card": ("handle",)}
        size = part.says["tensor_sizes"]
        for name, t in zip(part.says["names"], exported[0][: sum(size)].split(size)):
            found[name] = t.clone()
    (buffer,) = exported
    assert settings == ["expandable_segments:False", "expandable_segments:True"]
    assert weights.moved > 2 * len(buffer) and len(found) == sum(map(len, weights.sizes(False)))
    head = model.llm.lm_head.weight
    assert torch.equal(found["lm_head.weight"].view(torch.float32).view(head.shape), head)
    weights.close()


def test_a_card_has_the_name_that_another_process_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert card_of(3) == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1f2e")
    assert [card_of(0), card_of(1)] == ["4", "GPU-1f2e"]


@pytest.mark.parametrize("level", [1, 2])
def test_memory_sleeps_between_rollouts_and_wakes_for_weights_first(
    monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """On a stand-in for vLLM: room for weights, weights, room for caches, answers, sleep. More answers by the
    same weights, as GA-GRPO asks for, wake what was kept, and are refused where it was not."""
    calls: list[Any] = []

    class LLM:
        def collective_rpc(self, method: str, args: tuple = ()) -> None:
            calls.append(method)

        def wake_up(self, tags: list[str]) -> None:
            calls.append(("wake", *tags))

        def sleep(self, level: int) -> None:
            calls.append(("sleep", level))

        def reset_prefix_cache(self) -> None:
            calls.append("forget")

        def generate(self, prompts: Any, params: Any, **options: Any) -> list[Any]:
            calls.append("generate")
            return []

    stand_in: Any = types.ModuleType("vllm")
    stand_in.SamplingParams = dict
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    model = Model("nowhere", -1, Pipe()[0])
    model.llm, model.sleeps, model.image_id = LLM(), level, 0
    asked = {"prompts": [], "grammar": None, "group_size": 1, "banned": [], "seeds": [], "max_tokens": []}
    for version in (1, 2):
        model.begin({}, [])
        model.finish({"version": version}, [])
        model.generate({**asked, "top_p": 1.0, "end_id": 0}, [])
    first = ["start_weight_update", "finish_weight_update", "forget", "generate", ("sleep", level)]
    woken = [("wake", "weights"), *first[:2], ("wake", "kv_cache"), *first[2:]]
    assert calls == first + woken
    calls.clear()
    if level == 2:
        with pytest.raises(RuntimeError, match="update before you ask again"):
            model.generate({**asked, "top_p": 1.0, "end_id": 0}, [])
        assert not calls
    else:
        model.generate({**asked, "top_p": 1.0, "end_id": 0}, [])
        assert calls == [("wake", "weights"), ("wake", "kv_cache"), *first[2:]] and model.version == 2


def test_answers_of_another_process_keep_to_their_grammar(
    small_model: Small, train_systems: list[System]
) -> None:
    """Both sides of the steering, with random logits in the place of vLLM: what is drawn parses as our own
    walk has it, sets and forced tokens included, and the shares are the masses of the allowed tokens."""
    _, collate = small_model
    grammar = grammar_of(collate.tokenizer, collate.end_id)
    systems = [train_systems[0], train_systems[0], train_systems[500]]
    patterns = [answer_pattern(s.identity, s.target, k == 2) for k, s in enumerate(systems)]
    steered = Steered(Walk(grammar, patterns, 10_000))
    ours, theirs = Pipe()

    class Link:
        """One that answers as it is asked."""

        def send_bytes(self, message: bytes) -> None:
            ours.send_bytes(json.dumps(steered.follow(json.loads(message)["drawn"])).encode())

        recv_bytes = theirs.recv_bytes

    steering: Any = Steering(Link())  # type: ignore[arg-type]
    steering.begin(**json.loads(json.dumps(steered.beginning())))
    ids: list[list[int]] = [[] for _ in systems]
    rows = {r: (i, ids[i]) for r, i in enumerate((2, 0, 1))}  # in another order
    generator, masses = torch.Generator().manual_seed(0), {}
    while rows:
        logits = torch.randn(max(rows) + 1, len(collate.tokenizer), generator=generator) * 3
        out = steering.steer(logits, rows)
        again = steering.steer(logits, rows)  # a batch whose tokens are thrown away, as vLLM's may be
        assert torch.equal(out, again)
        for r, (i, got) in list(rows.items()):
            allowed = out[r].isfinite()
            assert torch.equal(out[r, allowed], logits[r, allowed])
            masses[i, len(got)] = float(logits[r].softmax(0)[allowed].sum())
            got.append(int(torch.multinomial(out[r].softmax(0), 1, generator=generator)))
            if got[-1] == collate.end_id:
                del rows[r]
    shares = steering.shares()
    assert shares.keys() == masses.keys()
    for key, share in shares.items():
        assert share == pytest.approx(torch.tensor(masses[key]).log().item(), abs=1e-4)
    for i, got in enumerate(ids):
        walk, taken = Walk(grammar, patterns[i : i + 1], 10_000), []
        whole = steered.walk.begun[i] + got
        at, sets = [], []
        taken = list(walk.begun[0])
        while taken[-1] != collate.end_id:
            if len(found := walk.allowed(0)) > 1:
                at.append(len(taken))
                sets.append(found.tolist())
            taken += walk.take(0, whole[len(taken)])
        assert taken == whole
        choices = steered.choices(i, len(whole))
        assert choices.at.tolist() == at and [s.tolist() for s in choices.sets] == sets


@pytest.mark.parametrize("grammar", [False, True])
def test_hidden_states_of_one_packed_pass_are_those_of_decoding(
    small_model: Small, train_systems: list[System], grammar: bool
) -> None:
    """In float32 within the rounding of sums of H = 64 products through two layers: 1e-4 of their size."""
    model, collate = small_model
    a, b = train_systems[0], train_systems[500]
    prompts = [
        Sample(cif_prompt(a.identity)),
        Sample(design_prompt(b.identity, -1.0, exemplar=True), "", b),
    ]
    patterns = [answer_pattern(a.identity, a.target, False), answer_pattern(b.identity, b.target, True)]
    params = SamplingConfig(max_new_tokens=60)
    found = RolloutEngine(model, collate).generate(
        prompts, params, [0], 3, keep_hidden=True, patterns=patterns if grammar else None
    )
    again = hidden_states(model, collate, prompts, found, torch.float32)
    for r, s in zip(found, again, strict=True):
        assert r.hidden is not None and s.hidden is not None
        torch.testing.assert_close(s.hidden, r.hidden, atol=1e-4, rtol=1e-4)
        assert r.ids is s.ids
