"""Plans against what they plan: torch's FLOP counter, parameter counts, and (slow)
the allocator's view of real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from catmllm.cli.main import main
from catmllm.config import Config, ConfigError, load_config
from catmllm.config.load import SHIPPED
from catmllm.data.open import open_data
from catmllm.data.prompts import Sample, design_prompt
from catmllm.data.shards import write_shards
from catmllm.design.predict import predictor_of, question
from catmllm.evaluate.baselines import evenly_spaced
from catmllm.models import SHIPPED as SHIPPED_MODEL
from catmllm.models.build import new_model
from catmllm.plan.advise import Advice, advise, largest_micro_batch, with_micro_batch
from catmllm.plan.balance import Costs, waiting
from catmllm.plan.cards import CARDS
from catmllm.plan.evaluation import energies, reading, refit
from catmllm.plan.ledger import Ledger, backend_forced
from catmllm.plan.made_up import of_oc20s_sizes, synthetic_systems
from catmllm.plan.trace import (
    GIB,
    SAMPLING,
    Plan,
    decoding_bytes,
    predictor_bytes,
    sampling_bytes,
    staying_bytes,
    trace,
)
from catmllm.report.summary import GENERATING
from catmllm.sample import engine
from catmllm.sample.answers import Answers
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern
from catmllm.sample.rows import Rows
from catmllm.sample.vllm_weights import Weights
from catmllm.stages import STAGES
from catmllm.structure.system import System
from catmllm.study import every_run, plans, read
from catmllm.train.setup import freeze
from catmllm.train.stage import Context
from catmllm.world import DTYPES, World
from catmllm_kernels.launch import recorded
from catmllm_kernels.linear_logprob import linear_logprob, triton
from catmllm_kernels.linear_logprob.arguments import Forward
from tests.conftest import SMALL_MODEL
from tests.seeing import save_qwen, seeing_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data() -> dict[str, list[System]]:
    return {k: v[:48] for k, v in open_data().items()}


def config(*overrides: str) -> Config:
    return load_config(None, [*SMALL_MODEL, "joint.batch_size=6", *overrides])


@pytest.mark.parametrize("stage", ["joint", "instruct"])
def test_flops_equal_torchs_counter_on_a_real_pass(
    data: dict[str, list[System]], tmp_path: Path, stage: str
) -> None:
    c = config("precision=fp32", "model.llm.attention=eager")
    model, collate = new_model(c, data["train"])
    made: Any = STAGES[stage](Context(c, model, collate, data, World(0, 1, torch.device("cpu")), tmp_path))
    freeze(model, made, False)
    with FlopCounterMode(display=False) as counter:
        made.step(0).passes[0].loss().backward()
    plan = trace(c, stage, 1, data=data, cuda=False, steps=1)
    kinds = {k: v for k, v in plan.flops.items() if k != "optimizer"}
    assert sum(kinds.values()) == counter.get_total_flops() > 1e8
    assert plan.wide_flops > 0.9 * sum(kinds.values())  # nothing runs in half precision


def test_sharded_state_is_a_share_of_the_parameters(data: dict[str, list[System]], tmp_path: Path) -> None:
    """On n ranks: float32 weights and two moments of every trained parameter, an n-th each;
    what is sent follows n."""
    model, collate = new_model(config(), data["train"])
    size = sum(p.numel() for n, p in model.named_parameters() if "visual" not in n)
    STAGES["joint"](Context(config(), model, collate, data, World(0, 1, torch.device("cpu")), tmp_path))
    fitted = sum(b.nbytes for part in (model.prior, model.text_prior) for b in part.buffers())
    everything = ("precision=fp32", "joint.train_encoder=true")
    plans = {n: trace(config(*everything), "joint", n, data=data, steps=1) for n in (1, 4)}
    for n, plan in plans.items():
        # the closed forms are whole on every rank
        assert plan.parts["parameters"] * GIB == pytest.approx(4 * size / n + fitted, rel=0.05)
        assert plan.parts["optimizer states"] * GIB == pytest.approx(8 * size / n, rel=0.05)
        # gathered for forward and (but for the root) again for backward; scattered once
        assert 4 * size * (n - 1) / n <= plan.sent.get("all-gather", 0.0) <= 2.1 * 4 * size * (n - 1) / n
        assert plan.sent.get("reduce-scatter", 0.0) == pytest.approx(4 * size * (n - 1) / n, rel=0.03)
        assert sum(plan.parts.values()) == pytest.approx(plan.phases["training step"])
        assert plan.peak == max(plan.phases.values())
    copied = trace(config(*everything, "replicate=2"), "joint", 4, data=data, steps=1)
    # two copies of two shards: a ring of two sends each shard's gradients twice by half
    assert copied.sent["reduce-scatter"] == pytest.approx(4 * size / 2, rel=0.03)
    assert copied.sent["all-reduce"] == pytest.approx(2 / 2 * 4 * size / 2, rel=0.03)
    assert not dist.is_initialized()


def test_switches_save_what_they_promise(data: dict[str, list[System]]) -> None:
    def plan(*overrides: str) -> Plan:
        return trace(config("joint.batch_size=16", *overrides), "joint", 2, data=data, steps=1)

    none, selective, full = (plan(f"checkpointing={m}") for m in ("none", "selective", "full"))
    kept = [p.parts["activations"] + p.parts.get("encoder activations", 0) for p in (none, selective, full)]
    assert kept[0] > kept[1] > kept[2]
    again = [p.flops.get("recomputed", 0.0) for p in (none, selective, full)]
    assert again[0] <= again[1] < again[2]
    useful = [p.flops["forward"] + p.flops["backward"] for p in (none, selective, full)]
    assert useful[0] == useful[1] == useful[2]
    assert all(0 < p.mfu_bound <= 1 for p in (none, selective, full))


def test_a_system_costs_an_evaluation_what_torchs_counter_says(data: dict[str, list[System]]) -> None:
    """Of the real passes by which energies are measured, on a CPU."""
    c = config("precision=fp32", "model.llm.attention=eager")
    some = data["train"][:3]
    model, collate = new_model(c, data["train"])
    model.eval()
    for p in model.energy_head.parameters():
        torch.nn.init.normal_(p)  # networks that count by 0 would not run
    graph = collate.graphs(some)
    assert graph is not None
    ways = {
        "encoder": lambda: model.graph_energy(graph),
        "both": lambda: model.predict(collate([question(s) for s in some])),
        "text": lambda: model.predict(collate([question(s, "text") for s in some])),
    }
    with Ledger(cuda=False) as ledger:
        planned, outline = new_model(c, data["train"])
        found = reading(planned.eval(), outline, some, ledger)
    for name, run in ways.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        assert found[name] * len(some) == counter.get_total_flops() > 1e5, name
    assert found["both"] > found["encoder"] + found["text"]
    stages = {stage: energies(found, c, stage) + refit(found, c, stage) for stage in STAGES}
    assert stages["encoder"] < stages["align"] < stages["grpo"] == stages["ga_grpo"] < stages["joint"]


def test_ranks_wait_as_a_plain_simulation_says(data: dict[str, list[System]]) -> None:
    """Batches that are not dealt: the mean over many steps of the largest of 8 sums, over that of all, drawn
    by NumPy alone. What is dealt waits less, and packs by tokens hardly."""
    systems = of_oc20s_sizes(40)
    c = config("joint.batch_size=4", "joint.property_share=0.5", "joint.drop_graph=0.25")
    costs = Costs(systems, c)
    found = [waiting(costs, c, "joint", 8, seed) for seed in range(40)]
    rng = np.random.default_rng(5)
    shape = (20_000, 8, 4)
    i, u = rng.integers(len(systems), size=shape), rng.random(shape)
    lengths = np.stack([costs.property, costs.cif, costs.design])
    load = lengths[np.searchsorted([0.5, 0.75], u, side="right"), i].sum(2)
    expected = load.max(1).mean() / load.mean()
    # 4 standard errors, and what a ratio of means over 64 steps is off from that over all
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / len(found) ** 0.5 + 2e-3)
    assert expected > 1.1
    dealt = config("joint.batch_size=4", "joint.property_share=0.5", "joint.dealt=true")
    packed = config("joint.batch_tokens=4096", "joint.property_share=0.5")
    assert 1 <= waiting(costs, packed, "joint", 8) < 1.05 < np.mean(found)
    assert 1 <= waiting(costs, dealt, "joint", 8) < np.mean(found)
    own, together = (
        config("grpo.batch_size=4", "grpo.group_size=4", "grpo.micro_batch=4", *more)
        for more in ((), ("grpo.batch_tokens=4096",))
    )
    assert waiting(costs, together, "grpo", 8) < 1.1 < waiting(costs, own, "grpo", 8)
    assert waiting(costs, own, "grpo", 1) == 1


@pytest.fixture(scope="module")
def cuda_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A step of every stage as a GPU takes it; in a process without Triton's interpreter, as users have."""
    out = tmp_path_factory.mktemp("steps") / "steps.json"
    command = [sys.executable, "-m", "tests.plan.cuda_steps", str(out)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    plain = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_plan(cuda_steps: dict[str, Any], stage: str) -> None:
    plan = cuda_steps[stage]
    assert (plan["tokens"] > 0) == (stage != "encoder")  # which reads graphs alone
    assert plan["flops"]["forward"] > 0 and plan["flops"]["backward"] > 0
    assert ("sampling" in plan["phases"]) == (stage in SAMPLING)
    assert ("sampling, at least" in plan["step"]) == (stage in SAMPLING)
    assert ("operators" in plan["decoding"]) == (stage in SAMPLING)
    assert ("sampled CIFs" in plan["evaluation"]) == (stage in GENERATING)
    assert 1 <= plan["balance"] < 2 and plan["evaluation"]["energies"] > 0 < plan["evaluation_share"]
    update = [v for k, v in plan["step"].items() if k.startswith("update")]
    assert update[0] < update[1] and plan["useful"]["backward"] <= plan["useful"]["forward"] == 1
    assert ("reference model" in plan["parts"]) == (stage == "grpo")
    # GA-GRPO's engine stays from step to step, of which each renews the head alone
    stay = {"weights laid out for decoding", "reference head"}
    assert stay & set(plan["parts"]) == (stay if stage == "ga_grpo" else set())
    assert sum(plan["parts"].values()) == pytest.approx(plan["phases"]["training step"])
    if stage == "grpo":
        assert plan["parts"]["reference model"] == pytest.approx(plan["parts"]["parameters"], rel=0.01)


def test_a_step_on_a_gpu_starts_the_kernels_of_its_stage(cuda_steps: dict[str, Any]) -> None:
    """And each for few keys by which it is compiled: what the edge-degree embedding shares with the edge path
    has one more, for one head and m = 0 alone; the real form of a complex matrix is a key a size."""
    starts = {stage: set(plan["starts"]) for stage, plan in cuda_steps.items()}
    reads = {"gather_rotate_kernel", "product_kernel", "softmax_kernel", "scatter_kernel", "pool_kernel"}
    trains = {"value_grad_kernel", "activation_grad_kernel", "softmax_grad_kernel", "pool_grad_kernel"}
    words = {"forward_kernel", "gradient_kernel"}
    assert starts["encoder"] >= reads | trains and not starts["encoder"] & words
    assert starts["align"] >= reads and not starts["align"] & (trains | words)
    for stage in ("joint", "instruct", "grpo"):
        assert starts[stage] >= reads | words
    assert starts["ga_grpo"] >= {"two_heads_kernel", "gradient_kernel"}
    keys = {(len(of), name) for plan in cuda_steps.values() for name, of in plan["starts"].items()}
    assert max(n for n, name in keys if name != "real_form_kernel") <= 3
    assert max(n for n, name in keys if name == "real_form_kernel") <= 4


def test_what_a_step_starts_is_compiled_beforehand(cuda_steps: dict[str, Any]) -> None:
    """By `make gpu-prefill`: nothing that a stage starts is left to the minutes on a GPU."""
    assert not [key for plan in cuda_steps.values() for key in plan["not compiled beforehand"]]


@pytest.mark.parametrize("stage", STAGES)
def test_no_pass_waits_for_the_device(cuda_steps: dict[str, Any], stage: str) -> None:
    """Neither for a number nor for the size of a result; the loop reads the losses of a step at once."""
    assert not cuda_steps[stage]["waits"]


def test_answers_share_their_prompts_in_a_plan(data: dict[str, list[System]]) -> None:
    """As the trainer has them: with our attention, and not with another."""
    options = ("grpo.batch_size=2", "grpo.group_size=4", "grpo.micro_batch=4", "grpo.property_share=0")
    new = ("grpo.sampling.max_new_tokens=32", "precision=fp16")
    tokens = {}
    for attention in ("varlen", "sdpa"):
        c = config(*options, *new, f"model.llm.attention={attention}")
        tokens[attention] = trace(c, "grpo", 2, data=data).tokens
    prompts = (tokens["sdpa"] - tokens["varlen"]) / 3  # each four times, and once
    assert tokens["varlen"] == 2 * 4 * 32 + prompts > 2 * 4 * 32


@pytest.mark.parametrize(
    ("stage", "setting"),
    [("grpo", "grpo.vllm=python"), ("ga_grpo", "ga_grpo.vllm=python"), ("grpo", "grpo.rollout=service")],
)
def test_new_weights_of_a_sampler_are_those_that_are_sent(
    data: dict[str, list[System]], tmp_path: Path, stage: str, setting: str
) -> None:
    """By the counter of vLLM's transfer, and by the parameters of transformers' own model."""
    ranks, small = 2, ("grpo.batch_size=2", "grpo.group_size=2", "ga_grpo.batch_size=2", "ga_grpo.tasks=4")
    c = config(setting, *small)
    plan = trace(c, stage, ranks, data=data, steps=1)
    model, collate = new_model(c, data["train"])
    plain = config(*small)
    made: Any = STAGES[stage](
        Context(plain, model, collate, data, World(0, 1, torch.device("cpu")), tmp_path)
    )
    freeze(model, made, False)
    weights = Weights(model, torch.bfloat16, 1.0)
    for _ in weights.parts(trained=True):
        pass
    weights.close()
    if setting.endswith("service"):
        assert plan.sampler == {"moved": weights.moved, "held": weights.moved}
        return
    whole = 2 * sum(p.numel() for n, p in model.llm.named_parameters() if "visual" not in n)
    head = 2 * model.llm.lm_head.weight.numel()
    assert plan.sampler["moved"] == ranks * weights.moved == ranks * (whole if stage == "grpo" else head)
    layer = 2 * sum(p.numel() for p in model.text.layers[0].parameters())
    held = max(layer, head) if stage == "grpo" else whole + head
    assert plan.sampler["held"] == ranks * held
    assert trace(plain, stage, ranks, data=data, steps=1).sampler == {}


def test_a_plan_for_a_gpu_takes_its_attention_and_keeps_no_logits(data: dict[str, list[System]]) -> None:
    c = config("joint.batch_size=8", "precision=fp16")
    plans = {cuda: trace(c, "joint", 1, data=data, cuda=cuda, steps=1) for cuda in (True, False)}
    assert plans[True].flops.get("recomputed", 0.0) > plans[False].flops.get("recomputed", 0.0)
    assert plans[True].parts["logits"] < plans[False].parts["logits"]


def test_seconds_are_counts_by_the_data_sheet_of_the_card(data: dict[str, list[System]]) -> None:
    c = config("joint.batch_size=4", "encoder_precision=bf16")
    plans = {card: trace(c, "joint", 2, card=card, data=data, steps=1) for card in CARDS}
    one = plans["A100"]
    for name, plan in plans.items():
        card = CARDS[name]
        half = sum(plan.flops.values()) - plan.wide_flops
        assert plan.seconds["compute"] == pytest.approx(half / card.half + plan.wide_flops / card.wide)
        assert plan.seconds["NVLink"] == pytest.approx(sum(plan.sent.values()) / card.nvlink)
        attention = plan.seconds["FlashAttention-2"] * card.attention["FlashAttention-2"] * card.half
        assert 0 < attention < sum(plan.flops.values()) / 2
        assert (plan.flops, plan.moved, plan.launches) == (one.flops, one.moved, one.launches)
        assert plan.launch_bound == max(plan.seconds["compute"], plan.seconds["NVLink"]) / plan.launches
    assert "FlashAttention-3" not in one.seconds
    for name in ("H100", "H200"):
        assert plans[name].seconds["FlashAttention-3"] < plans[name].seconds["FlashAttention-2"]


def test_the_encoders_float32_products_are_by_choice(data: dict[str, list[System]]) -> None:
    """TF32 where nothing is said: 8 times the rate of float32 on an A100, and the same bytes."""

    def plan(*overrides: str) -> Plan:
        return trace(config("joint.batch_size=4", *overrides), "joint", 1, data=data, steps=1)

    default, tf32, fp32 = plan(), plan("encoder_precision=tf32"), plan("encoder_precision=fp32")
    assert default == tf32 and tf32.peak == fp32.peak and tf32.wide_flops == fp32.wide_flops > 0
    card = CARDS["A100"]
    saved = fp32.wide_flops * (1 / card.wide - 1 / card.tf32)
    assert fp32.seconds["compute"] - tf32.seconds["compute"] == pytest.approx(saved)


def test_starts_of_kernels_are_counted(data: dict[str, list[System]]) -> None:
    """A pass more or a layer more adds its own; those inside of our ops are what the compiler is given."""

    def plan(*overrides: str) -> int:
        some = ("precision=bf16", "joint.property_share=0", "joint.batch_size=4")
        return trace(config(*some, *overrides), "joint", 1, data=data, steps=1).launches

    one, twice = plan(), plan("joint.accumulate=2")
    layers = [plan(f"model.llm.num_hidden_layers={n}") for n in (1, 2, 3)]
    assert layers[2] - layers[1] == layers[1] - layers[0] > 50  # 112 operators a layer, forward and backward
    assert one < twice < 2.2 * one

    with Ledger(cuda=True) as ledger, backend_forced("triton"):
        hidden, weight = torch.zeros(8, 16), torch.zeros(64, 16)
        ledger.launches = 0
        linear_logprob(hidden, weight, torch.arange(8))
        counted = ledger.launches
    meta = torch.empty(8, 16, device="meta"), torch.empty(64, 16, device="meta")
    with recorded() as starts:
        triton.forward(Forward(*meta, torch.zeros(8, dtype=torch.int64, device="meta")))
    assert 1 <= len(starts) < counted <= len(starts) + 30  # besides them masks and the choice of results


def test_pictures_and_their_tower_are_planned(data: dict[str, list[System]], tmp_path: Path) -> None:
    """A tower that trains has gradients and moments; one that does not is whole on every rank;
    unused it takes nothing."""
    save_qwen(tmp_path, data["train"])
    options = {"off": ["data.images=false"], "frozen": [], "trained": ["model.llm.train_images=true"]}
    plans = {
        k: trace(seeing_config(tmp_path, *o), "joint", 2, data=data, steps=1) for k, o in options.items()
    }
    tower = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).model.visual.num_parameters()
    parameters = {k: p.parts["parameters"] * GIB for k, p in plans.items()}
    states = {k: p.parts["optimizer states"] * GIB for k, p in plans.items()}
    assert parameters["frozen"] - parameters["off"] == pytest.approx(2 * tower, rel=0.02)  # bf16
    assert parameters["trained"] - parameters["off"] == pytest.approx(4 * tower / 2, rel=0.05)
    assert states["trained"] - states["off"] == pytest.approx(8 * tower / 2, rel=0.05)
    assert states["frozen"] == states["off"]
    assert plans["off"].tokens < plans["frozen"].tokens == plans["trained"].tokens
    assert plans["frozen"].flops["forward"] > plans["off"].flops["forward"]


def test_a_plan_of_packed_answers_says_how_packed_ones_wait(data: dict[str, list[System]]) -> None:
    """Its own passes are of answers that are all as long as may be: 2048 tokens of 100 each."""
    words = ["grpo.batch_tokens=2048", "grpo.batch_size=4", "grpo.sampling.max_new_tokens=100"]
    c = config("model.llm.attention=varlen", *words)
    plan = trace(c, "grpo", 2, data=data, steps=1)
    costs = Costs(evenly_spaced(data["train"], 256), c)
    assert plan.micro_batch == 20 and c.grpo.batch_tokens == 2048
    assert plan.balance == np.mean([waiting(costs, c, "grpo", 2, seed) for seed in range(4)])


@pytest.mark.parametrize("grammar", [False, True])
def test_sampling_takes_what_the_engine_does(
    data: dict[str, list[System]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grammar: bool
) -> None:
    """Caches and hidden states of a steady batch, as a GPU has it, of 64 answers of 70 tokens: 96 rows of 128
    slots, and a prompt of nobody's."""
    words = [f"ga_grpo.sampling.grammar={str(grammar).lower()}", "ga_grpo.sampling.max_new_tokens=70"]
    c = config("ga_grpo.batch_size=8", "ga_grpo.group_size=8", "ga_grpo.initial=2", *words)
    model, collate = new_model(c, data["train"])
    context = Context(c, model, collate, data, World(0, 1, torch.device("cpu")), tmp_path)
    made: list[Any] = []

    def kept(kind: Any) -> Any:
        return lambda *arguments, **options: made.append(kind(*arguments, **options)) or made[-1]

    monkeypatch.setattr(engine, "Rows", kept(Rows))
    monkeypatch.setattr(engine, "Answers", kept(Answers))
    some = data["train"][:8]
    dtype = DTYPES[c.precision]
    rollouts = RolloutEngine(model, collate, dtype, steady=True).generate(
        [Sample(design_prompt(s.identity, -0.5, exemplar=True), "", s) for s in some],
        c.ga_grpo.sampling,
        [0],
        8,
        keep_hidden=True,
        patterns=[answer_pattern(s.identity, s.target, True, c.data) for s in some] if grammar else None,
    )
    answers, rows = made
    planned = decoding_bytes(STAGES["ga_grpo"](context), context, steady=True)
    assert [len(own[0]) for own in (rows.own[0], rows.prompt[0])] == [96, 9] and rows.slots == 128
    caches = (cache for pair in (*rows.prompt, *rows.own) for cache in pair)
    assert planned["KV caches"] == sum(cache.nbytes for cache in caches)
    longest = len(rollouts) * 70 * model.text.config.hidden_size * dtype.itemsize  # of what is handed over
    assert planned["hidden states kept"] == answers.hidden.nbytes + longest
    assert planned["logits"] == 3 * 4 * 96 * model.text.config.vocab_size


def test_who_samples_is_who_holds_its_memory(data: dict[str, list[System]], tmp_path: Path) -> None:
    """And GA-GRPO's predictor is a second model: the shipped one, as the search loads it; one that is not
    there yet counts as one like the model that trains."""
    c = config(f"ga_grpo.predictor={SHIPPED_MODEL}", "ga_grpo.vllm_memory=0.25", "ga_grpo.initial=8")
    model, collate = new_model(c, data["train"])
    context = Context(c, model, collate, data, World(0, 1, torch.device("cpu")), tmp_path)
    grpo, search = (STAGES[name](context) for name in SAMPLING)
    card = CARDS["A100"]
    assert sampling_bytes(grpo, context, "service", card, True) == {}
    own, vllm = (sampling_bytes(search, context, by, card, True) for by in (None, "vllm"))
    assert vllm == {"gathered weights": own["gathered weights"], "vLLM": int(0.25 * card.memory * GIB)}
    assert own["KV caches"] > 0 < own["hidden states kept"]
    found = predictor_of(c, torch.device("cpu"))
    assert found is not None
    size = sum(p.nbytes for p in found[0].parameters())
    assert predictor_bytes(context, cuda=False) == size
    laid = {"weights laid out for decoding": own["weights laid out for decoding"]}
    assert staying_bytes(search, context, None, False) == laid | {"predictor": size}
    assert staying_bytes(search, context, "vllm", False) == {"predictor": size}
    assert staying_bytes(grpo, context, None, False) == {}
    context.config = replace(c, ga_grpo=replace(c.ga_grpo, predictor=str(tmp_path / "later")))
    like = sum(p.numel() for p in model.parameters())
    assert 2 * like <= predictor_bytes(context, cuda=False) <= 4 * like


def test_the_ledger_sees_what_is_alive() -> None:
    with Ledger(cuda=True) as ledger:
        ledger.phase("one")
        a = torch.zeros(1000)
        b = a.double() + 1  # a temporary of 8000 beside a result of 8000
        del a
        ledger.phase("two")
        c = b[:10]  # a view owns nothing
        del b
        d = torch.zeros(10)
        ids = torch.arange(5)
        assert ids.sum().item() == 10  # integers are real
    peaks = ledger.peaks()
    assert peaks["one"].total == 4000 + 8000 + 8000
    assert peaks["two"].total == 8000 + 40 + 40 + 8 and len(c) == 10 and len(d) == 10


def test_the_largest_micro_batch_is_found() -> None:
    def of(size: int) -> Plan:
        peak = 10 + 1.5 * size + (2.0 if size > 20 else 0.0)  # a line with a step in it
        return Plan("joint", "A100", 8, size, 1, 0, peak, {}, {}, {}, 0.0, {}, 0.0, 0, {}, 0.0)

    assert largest_micro_batch(of(4), of, 76.0) == (42, of(42).peak)
    assert largest_micro_batch(of(300), of, 76.0) == (42, of(42).peak)
    assert largest_micro_batch(of(4), of, 11.0) == (0, of(1).peak)


def test_what_to_turn_on_is_found() -> None:
    """With a limit between what one sample needs with and without checkpointing."""
    systems = synthetic_systems(80, 24)
    data = {"train": systems, "val": systems, "test": systems}
    one = with_micro_batch(config("joint.property_share=0"), "joint", 1)
    plain = trace(one, "joint", 2, data=data, steps=1)
    saving = trace(replace(one, checkpointing="full"), "joint", 2, data=data, steps=1)
    assert saving.peak < plain.peak
    advice = advise(one, "joint", 2, (saving.peak + plain.peak) / 2, data=data, steps=1)
    assert advice.largest >= 1 and advice.turn_on[0] == "checkpointing=selective"


def test_the_command_prints_json_and_says_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("joint: {batch_size: 4}\ntensorboard: false\n")
    arguments = ["plan", str(path), *SMALL_MODEL, "--stage", "joint", "--ranks", "2", "--no-search", "--json"]
    assert main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["fits"] and row["plan"]["ranks"] == 2 and row["plan"]["parts"]["parameters"] > 0
    monkeypatch.setattr("catmllm.plan.advise.trace", lambda *_, **__: Plan(**row["plan"]))  # the same again
    assert main([*arguments[:-1], "--limit", "0.001"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(["plan", str(path), "--stage", "jiont"]) == 1
    assert "choose one of encoder" in capsys.readouterr().err


def test_a_plan_that_fits_may_go_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only what does not fit is searched, one trace of a stage that fits is enough."""
    sizes: list[int] = []

    def traced(config: Config, stage: str, ranks: int, **_: Any) -> Plan:
        sizes.append(config.joint.batch_size)
        empty = dict.fromkeys((f.name for f in fields(Plan)), 0) | {"parts": {}, "phases": {}}
        return Plan(**empty | {"peak": 2.0 * sizes[-1], "micro_batch": sizes[-1]})

    monkeypatch.setattr("catmllm.plan.advise.trace", traced)
    given = config("joint.batch_size=8")
    assert advise(given, "joint", 2, 20.0, only_unfit=True).largest == 0 and sizes == [8]
    assert advise(given, "joint", 2, 11.0, only_unfit=True).largest == 5 and len(sizes) > 2
    assert advise(given, "joint", 2, 20.0).largest == 10


def test_what_packs_by_tokens_is_searched_by_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has counted a pack's samples: the search is over passes of so many, and says so."""
    asked: list[tuple[int, int, int | None]] = []

    def traced(config: Config, stage: str, ranks: int, **_: Any) -> Plan:
        o = config.joint
        asked.append((o.batch_size, o.accumulate, o.batch_tokens))
        tokens = o.batch_tokens or 100 * o.batch_size
        empty = dict.fromkeys((f.name for f in fields(Plan)), 0) | {"parts": {}, "phases": {}}
        return Plan(**empty | {"peak": tokens / 50, "micro_batch": o.batch_size, "tokens": tokens})

    monkeypatch.setattr("catmllm.plan.advise.trace", traced)
    found = advise(config("joint.batch_size=8", "joint.batch_tokens=16384"), "joint", 2, 40.0)
    assert (found.plan.tokens, found.plan.peak) == (16384, 16384 / 50)
    assert (found.largest, found.largest_peak, found.unpacked) == (20, 40.0, True)
    assert {row[1:] for row in asked[1:]} == {(1, None)}
    assert not advise(config("joint.batch_size=8"), "joint", 2, 40.0).unpacked


def test_a_study_is_planned_by_its_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells whose steps have the same size have one plan."""
    asked: list[tuple[str, str]] = []
    plan = Plan(**dict.fromkeys((f.name for f in fields(Plan)), 0) | {"parts": {}, "phases": {}})

    def advised(config: Config, stage: str, ranks: int, limit: float, **_: Any) -> Advice:
        asked.append((stage, config.joint.mmtg_sign if stage == "joint" else config.grpo.kl))
        return Advice(plan)

    monkeypatch.setattr("catmllm.plan.table.advise", advised)
    path = tmp_path / "study.yaml"
    path.write_text(
        "ancestor: {stages: [joint]}\nseeds: [[0, 0]]\ncells:\n"
        "  a: {stages: [joint], joint.mmtg_sign: sum}\n  b: {stages: [grpo], joint.mmtg_sign: sum}\n"
        "  c: {stages: [joint, grpo], joint.batch_size: 4, grpo.kl: k1}\n"
    )
    assert main(["plan", str(path), "tensorboard=false", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["of"] for r in rows] == ["joint of ancestor; a", "grpo of b; c", "joint of c"]
    assert asked == [("joint", "+"), ("grpo", "k3"), ("joint", "+")]
    assert main(["plan", str(path), "--stage", "grpo", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


@pytest.mark.slow
def test_the_studies_on_oc20_have_plans() -> None:
    """Of every stage and size in them, with few atoms."""
    folder = SHIPPED / "studies" / "oc20"
    runs = {f"{p.stem}: {n}": c for p in sorted(folder.glob("*.yaml")) for n, c in every_run(read(p)).items()}
    jobs = plans(runs)
    assert {stage for _, _, stage in jobs} == set(STAGES)
    for _, config, stage in jobs:
        assert trace(config, stage, 8, atoms=20, steps=1).fits(76.0)


def test_a_folder_of_shards_is_planned_as_it_would_be_trained(
    data: dict[str, list[System]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The case of everybody who has run `catmllm data oc20`: `data.path` names a folder that is there."""
    write_shards(tmp_path, sorted([s for part in data.values() for s in part], key=lambda s: s.sid))
    files = [str(ROOT / "configs" / "a100x8" / name) for name in ("7b.yaml", "joint.yaml")]
    small = [
        "model.llm.pretrained=",
        "init=",
        "model.encoder.checkpoint=",
        "model.encoder.preset=",
        "data.images=false",
    ]
    arguments = ["plan", *files, *SMALL_MODEL, *small, f"data.path={tmp_path}", "joint.batch_tokens=4096"]
    assert main([*arguments, "--ranks", "2", "--no-search", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["plan"]["stage"] == "joint" and 0 < row["plan"]["tokens"] <= 2 * 4096
    assert main([*arguments[:-2], f"data.path={ROOT / 'configs'}", "--no-search"]) == 1
    assert "no dataset" in capsys.readouterr().err


def test_a_random_llm_may_have_the_rows_of_a_published_one(data: dict[str, list[System]]) -> None:
    """For costs as they will be; fewer rows than tokens are an error."""
    few, many = (
        trace(config(*rows), "joint", 1, data=data, steps=1) for rows in ((), ("model.llm.vocab_size=5000",))
    )
    model, collate = new_model(config(), data["train"])
    rows = 5000 - len(collate.tokenizer)
    more = 2 * rows * 4 * model.text.config.hidden_size  # embedding and head, float32
    assert (many.parts["parameters"] - few.parts["parameters"]) * GIB == pytest.approx(more, rel=1e-3)
    with pytest.raises(ConfigError, match="vocab_size"):
        new_model(config("model.llm.vocab_size=5"), data["train"])


def test_a_pretrained_model_of_unknown_size_is_an_error() -> None:
    c = config("model.llm.pretrained=somebody/else")
    with pytest.raises(ConfigError, match=r"config\.json"):
        trace(c, "joint", 2)
    assert not dist.is_initialized()


def test_synthetic_systems_have_the_atoms_asked_for() -> None:
    for atoms in (20, 80, 225):
        systems = synthetic_systems(atoms, 2)
        assert all(len(s) == atoms and s.adsorbate == "CO" for s in systems)
        distance = systems[0].as_ase().get_all_distances(mic=True)
        assert distance[~torch.eye(atoms, dtype=torch.bool).numpy()].min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3.40e9),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 7.62e9),
        ("meta-llama/Llama-3.2-1B", 1.236e9 + 128256 * 2048),
        ("meta-llama/Llama-3.2-3B", 3.213e9 + 128256 * 3072),
    ],
)
def test_published_sizes(name: str, parameters: float) -> None:
    """The text towers as published (7.62e9; 3.09e9 with tied embeddings, 3.40e9 with a head of its own, as
    the Llamas' 1.236e9 and 3.213e9 without it), on 8 ranks."""
    c = load_config(None, [f"model.llm.pretrained={name}", "joint.batch_size=2"])
    plan = trace(replace(c, checkpointing="full"), "joint", 8, steps=1)
    assert plan.parts["parameters"] * GIB * 8 / 4 == pytest.approx(parameters, rel=0.01)


@pytest.mark.slow
def test_planned_peaks_are_those_of_real_runs(tmp_path: Path) -> None:
    """Five CPU runs, two of 340M parameters: peak bytes of live tensors by the allocator, within 10 %."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "plan.py"), "--json", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    (claim,) = json.loads(done.stdout)
    assert len(claim["ratio"]) == 5
    for case, ratio in claim["ratio"].items():
        assert ratio["measured"] == pytest.approx(1.0, abs=0.1), case
