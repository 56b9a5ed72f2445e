"""vLLM as the sampler: the same greedy tokens as transformers, log-probabilities of the model,
weights that follow.

`VLLM_PYTHON` names the Python of an environment with vLLM (`make vllm`);
what needs none of it runs everywhere.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from catmllm.config import ConfigError, LoRAConfig, SamplingConfig, load_config
from catmllm.data.batches import Collator
from catmllm.data.prompts import GRAPH, Sample
from catmllm.design.search import ClosedLoop
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import export
from catmllm.models.lora import add_lora
from catmllm.models.state import save_model
from catmllm.sample import vllm_weights
from catmllm.sample.answers import Choices, Rollout
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.grammar import answer_pattern, grammar_of
from catmllm.sample.packed import rollout_batch
from catmllm.sample.vllm_engine import VLLMEngine, VLLMError
from catmllm.sample.vllm_weights import Weights
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.structure.system import System
from catmllm.train.loop import train
from catmllm.train.metrics import read_log
from tests.conftest import SMALL_MODEL
from tests.contexts import MakeContext, small
from tests.sample.test_engine import GREEDY, Model, generated, left_padded, some_prompts
from tests.stages.test_rl_stages import counting_judge, token_rewarded
from tests.towers import KINDS, save_tower, tower_config

PYTHON = os.environ.get("VLLM_PYTHON", "")
WIDE = [
    *SMALL_MODEL,
    "model.llm.hidden_size=128",
    "model.llm.num_attention_heads=4",
    "model.llm.num_key_value_heads=2",
]
needs_vllm = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM (make vllm)")
Make = Callable[..., VLLMEngine]
# Both are float32; sums of 128 products through two layers, times a head that is 25 times as large.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def wide_model(train_systems: list[System]) -> Model:
    """The small model with heads of 32, the fewest that vLLM's CPU attention takes,
    and weights that tell inputs apart."""
    model, collate = new_model(load_config(None, WIDE), train_systems[::40])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith(("llm.", "projector.")):
                parameter.mul_(25 if "lm_head" in name else 4)
    return model.eval(), collate


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes every core otherwise, beside other tests."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Make]:
    """Makes engines over models, which are closed at the end and leave nothing."""
    engines: list[VLLMEngine] = []

    def make(model: CatalyticMLLM, collate: Collator, params: SamplingConfig = GREEDY) -> VLLMEngine:
        log = tmp_path / f"vllm{len(engines)}.log"
        engine = VLLMEngine(PYTHON, model, collate, params, torch.float32, log, rows=64, memory=0.1)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
        assert not engine.folder.exists() and engine.process.poll() is not None


@pytest.fixture(scope="module")
def prompts(train_systems: list[System]) -> list[Sample]:
    """Without a structure, and with one."""
    return some_prompts(train_systems)[:3]


def check_logprobs(engine: VLLMEngine, prompts: list[Sample], found: list[Rollout]) -> None:
    """What vLLM says of its tokens is what a forward pass of the model says."""
    batch = rollout_batch(engine.collate, prompts, found, shared=False)
    with torch.no_grad():
        forced = engine.model(
            CatalyticMLLM.answer, batch, engine.params.temperature, False, Choices.join(found)
        ).logprob
    told = torch.cat([r.logprob if r.choices is None else r.logprob[r.choices.at] for r in found])
    torch.testing.assert_close(told, forced, rtol=0, atol=CLOSE)


def check_greedy(engine: VLLMEngine, prompts: list[Sample]) -> list[Rollout]:
    """Greedy tokens are those of transformers' `generate`."""
    found = engine.generate(prompts, GREEDY, [0])
    theirs = generated(engine.model, engine.collate, prompts)
    for row, r in enumerate(found):
        assert r.ids.tolist() == theirs[row].tolist()[: len(r.ids)] and r.prompt == row
    check_logprobs(engine, prompts, found)
    return found


def test_a_python_that_is_not_there_is_told(small_model: Model, tmp_path: Path) -> None:
    with pytest.raises(VLLMError, match="no Python at /nowhere/python"):
        VLLMEngine("/nowhere/python", *small_model, GREEDY, torch.float32, tmp_path / "log")


def test_a_python_without_vllm_is_told_and_leaves_nothing(small_model: Model, tmp_path: Path) -> None:
    engine = VLLMEngine(sys.executable, *small_model, GREEDY, torch.float32, tmp_path / "log")
    with pytest.raises(VLLMError, match=r"has no vLLM.*must be a Python with vLLM"):
        engine.update()
    engine.close()
    assert not engine.folder.exists()


def test_what_only_our_decoding_does_is_refused() -> None:
    for stage in ("grpo", "ga_grpo"):
        with pytest.raises(ConfigError, match="needs our own decoding"):
            load_config(None, [f"{stage}.vllm=python3", f"{stage}.sampling.stop=[end]"])
        load_config(None, [f"{stage}.vllm=python3"])  # with the grammar


def test_another_temperature_than_that_of_the_weights_is_an_error(small_model: Model, tmp_path: Path) -> None:
    engine = VLLMEngine(sys.executable, *small_model, GREEDY, torch.float32, tmp_path / "log")
    with pytest.raises(ValueError, match=r"weights for temperature 1, not 0\.5"):
        engine.generate([], SamplingConfig(temperature=0.5), [0])
    engine.close()


def test_markers_without_structures_are_an_error(
    small_model: Model, train_systems: list[System], tmp_path: Path
) -> None:
    engine = VLLMEngine(sys.executable, *small_model, GREEDY, torch.float32, tmp_path / "log")
    for text in (f"{GRAPH}{GRAPH}", "no marker"):
        with pytest.raises(ValueError, match="graph markers in the text"):
            engine.generate([Sample(text, "", train_systems[0])], GREEDY, [0])
    engine.close()


@needs_vllm
@pytest.mark.slow
def test_greedy_tokens_and_log_probabilities_follow_the_weights(
    wide_model: Model, prompts: list[Sample], start: Make
) -> None:
    """With a graph token and without; where the LM head alone trains, it alone is sent."""
    model, collate = copy.deepcopy(wide_model[0]), wide_model[1]
    engine = start(model, collate)
    seen, moved = [], []
    for version in (1, 2, 3):
        before = engine.weights.moved
        engine.update()
        moved.append(engine.weights.moved - before)
        assert engine.version == version
        seen.append([r.ids.tolist() for r in check_greedy(engine, prompts)])
        with torch.no_grad():
            for layer in model.text.layers:
                layer.mlp.down_proj.weight.neg_()
            if version == 2:
                for layer in model.text.layers:
                    layer.mlp.down_proj.weight.neg_()
                model.requires_grad_(False).llm.lm_head.requires_grad_(True).weight.neg_()
    assert seen[0] != seen[1] != seen[2]
    head = model.llm.lm_head.weight
    assert moved[0] == moved[1] > moved[2] == head.numel() * 4


@needs_vllm
@pytest.mark.slow
def test_prompts_with_structures_are_read_once(
    wide_model: Model, train_systems: list[System], start: Make
) -> None:
    """vLLM's cache of prefixes knows a structure by its vector: another one is read from its marker on."""
    engine = start(*wide_model)
    engine.update()
    block = 128  # tokens, vLLM's on a CPU
    words = "site " * 150

    def cached(system: System) -> int:
        asked = [Sample(f"{words}{GRAPH}{words}", "", system)]
        assert engine.generate(asked, replace(GREEDY, max_new_tokens=1), [0])
        return engine.cached

    whole = len(engine.collate.encode(f"{words}{GRAPH}{words}"))
    at = engine.collate.encode(f"{words}{GRAPH}{words}").index(engine.collate.graph_id)
    assert cached(train_systems[0]) == 0
    assert cached(train_systems[0]) >= whole - 2 * block
    assert at - block <= cached(train_systems[500]) <= at
    engine.update()
    assert cached(train_systems[0]) == 0  # keys and values of the old weights


@needs_vllm
@pytest.mark.slow
def test_the_grammar_steers_vllm(
    wide_model: Model, train_systems: list[System], prompts: list[Sample], start: Make
) -> None:
    """Answers fit their patterns, log-probabilities are those among the allowed tokens, and greedy answers,
    the sets of their choices and their hidden states are those of our own decoding."""
    model, collate = wide_model
    a, b = train_systems[0], train_systems[500]
    asked = [prompts[0], prompts[1]]
    patterns = [answer_pattern(a.identity, a.target, False), answer_pattern(b.identity, b.target, True)]
    engine = start(model, collate, SamplingConfig(max_new_tokens=220))
    engine.update()
    found = engine.generate(asked, engine.params, [1], 3, patterns=patterns)
    grammar = grammar_of(collate.tokenizer, collate.end_id)
    for r in found:
        place, ids = patterns[r.prompt].start, r.ids.tolist()
        for token in ids[:-1]:
            place = grammar.after(patterns[r.prompt], place, token)
        assert r.finished and patterns[r.prompt].ended(place)
        assert r.choices is not None and 0 < len(r.choices.at) < len(ids)
        drawn = torch.zeros(len(ids)).index_fill(0, r.choices.at, 1.0)
        assert not r.logprob[drawn == 0].any()  # forced tokens
    check_logprobs(engine, asked, found)
    assert len({r.text for r in found}) == len(found)
    cut = engine.generate(asked, engine.params, [1], patterns=patterns, limits=[40, 90])
    assert [len(r.ids) for r in cut] == [40, 90] and not any(r.finished for r in cut)
    greedy = replace(engine.params, top_p=1e-6)
    options: dict = {"keep_hidden": True, "patterns": patterns}
    theirs = engine.generate(asked, greedy, [0], **options)
    ours = RolloutEngine(model, collate).generate(asked, greedy, [0], **options)
    for one, other in zip(theirs, ours, strict=True):
        assert one.text == other.text and one.ids.tolist() == other.ids.tolist()
        assert one.choices is not None and other.choices is not None
        assert one.choices.at.tolist() == other.choices.at.tolist()
        assert [s.tolist() for s in one.choices.sets] == [s.tolist() for s in other.choices.sets]
        torch.testing.assert_close(one.logprob, other.logprob, rtol=0, atol=CLOSE)
        assert one.hidden is not None and other.hidden is not None
        torch.testing.assert_close(one.hidden, other.hidden, rtol=CLOSE, atol=CLOSE)


@needs_vllm
@pytest.mark.slow
def test_adapters_alone_are_swapped(wide_model: Model, prompts: list[Sample], start: Make) -> None:
    model, collate = copy.deepcopy(wide_model[0]).requires_grad_(False), wide_model[1]
    add_lora(model, LoRAConfig(r=4, alpha=6.0, dropout=0.0), 0)
    engine = start(model.eval(), collate)
    seen, moved = [], []
    for _ in range(3):
        before = engine.weights.moved
        engine.update()
        moved.append(engine.weights.moved - before)
        found = engine.generate(prompts, GREEDY, [0])
        check_logprobs(engine, prompts, found)
        seen.append([r.ids.tolist() for r in found])
        for linear in engine.weights.linears().values():
            torch.nn.init.normal_(linear.lora_B["default"].weight, std=0.3)
    assert seen[0] != seen[1] != seen[2]
    adapters = sum(p.numel() * 4 for n, p in model.named_parameters() if ".lora_" in n)
    assert moved[0] > moved[1] == moved[2] == adapters


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_tower_has_room_in_a_model_that_sees(
    kind: str, train_systems: list[System], tmp_path: Path, start: Make
) -> None:
    """A tower that reads text alone, one whose heads have norms, and one whose image tower is another."""
    save_tower(tmp_path / kind, kind, head_dim=32, hidden_size=128)
    model, collate = new_model(tower_config(tmp_path / kind), train_systems[::40])
    engine = start(model.eval(), collate)
    engine.update()
    check_greedy(engine, some_prompts(train_systems)[:2])


@needs_vllm
@pytest.mark.slow
def test_samples_are_seeded_and_of_the_models_distribution(
    wide_model: Model, prompts: list[Sample], start: Make
) -> None:
    """Log-probabilities at another temperature are the model's;
    the first tokens' frequencies are its probabilities."""
    params = SamplingConfig(temperature=1.6, top_p=0.9, max_new_tokens=8)
    model, collate = wide_model
    engine = start(model, collate, params)
    engine.update()
    first, again, other = (engine.generate(prompts, params, [seed], 4) for seed in (1, 1, 2))
    assert [r.ids.tolist() for r in first] == [r.ids.tolist() for r in again]
    assert [r.ids.tolist() for r in first] != [r.ids.tolist() for r in other]
    check_logprobs(engine, prompts, first)
    params = replace(params, max_new_tokens=1)
    n = 600
    theirs = torch.stack([r.ids[0] for r in engine.generate(prompts[:1], params, [3], n)])
    ours = RolloutEngine(model, collate).generate(prompts[:1], params, [3], n)
    counts = [
        t.bincount(minlength=len(collate.tokenizer)) for t in (theirs, torch.stack([r.ids[0] for r in ours]))
    ]
    likely = counts[1].topk(5).indices
    difference = (counts[0][likely] - counts[1][likely]).abs() / n
    assert float(difference.max()) < 5 * (0.25 * 2 / n) ** 0.5


@needs_vllm
@pytest.mark.slow
def test_grpo_trains_from_its_samples(make_context: MakeContext) -> None:
    """Under the grammar too, whose answers are cut here."""
    config = small()
    config.model.llm.hidden_size = 128
    config.grpo.vllm, config.grpo.vllm_memory, config.grpo.sampling.grammar = PYTHON, 0.1, True
    config.grpo.sampling.max_new_tokens = 120
    context = make_context(config)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}

    state, stage = train(token_rewarded, context)
    assert not torch.equal(state["llm.lm_head.weight"], before["llm.lm_head.weight"])
    assert stage.vllm.version == 2 and stage.vllm.process.poll() is not None  # type: ignore[attr-defined]
    rows = read_log(context.folder / "log.jsonl")
    assert rows and all(row["mismatch"] < CLOSE for row in rows)  # of the sampler to the policy


@needs_vllm
@pytest.mark.slow
def test_ga_grpo_trains_the_head_from_its_samples(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    config.model.llm.hidden_size = 128
    config.ga_grpo.vllm, config.ga_grpo.vllm_memory, config.ga_grpo.sampling.grammar = PYTHON, 0.1, True
    config.ga_grpo.sampling.max_new_tokens = 60
    context = make_context(config)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    monkeypatch.setattr(ClosedLoop, "judge", counting_judge(context.data["train"]))
    state, stage = train(GAGRPO, context)
    moved = {k for k in state if not torch.equal(state[k], before[k])}
    assert moved == {"llm.lm_head.weight"}
    vllm = stage.vllm  # type: ignore[attr-defined]
    whole, head = sum(map(sum, vllm.weights.sizes(False))), sum(map(sum, vllm.weights.sizes(True)))
    assert vllm.version == 2 and vllm.weights.moved == whole + head


@needs_vllm
@pytest.mark.slow
def test_vllms_own_transfer_reads_what_a_gpu_would_be_sent(
    wide_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CUDA IPC engine, on a stand-in for the driver: the buffer lies in a file instead of a GPU."""
    model = wide_model[0]
    exported: list[torch.Tensor] = []

    def export(buffer: torch.Tensor) -> tuple:
        exported.append(buffer)
        return None, (0, 1, 2, 3, 4, 5, "device")

    monkeypatch.setattr(Weights, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="card"))
    monkeypatch.setattr(vllm_weights, "reduce_tensor", export)
    weights = Weights(model, torch.bfloat16, 1.0)
    sent = [(part, exported[0].clone()) for part in weights.parts(trained=False)]
    torch.save([(dict(part.says), part.blocks, buffer) for part, buffer in sent], tmp_path / "sent.pt")
    script = Path(__file__).with_name("vllm_ipc.py")
    subprocess.run([PYTHON, str(script), str(tmp_path)], check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    head = model.llm.lm_head.weight.detach().bfloat16()
    assert len(found) == sum(map(len, weights.sizes(False))) and torch.equal(found["lm_head.weight"], head)
    for name, parameter in model.text.named_parameters():
        assert torch.equal(found[f"model.language_model.{name}"], parameter.detach().bfloat16())
    weights.close()


@needs_vllm
@pytest.mark.slow
def test_the_text_export_is_served(wide_model: Model, tmp_path: Path, prompts: list[Sample]) -> None:
    """`vllm serve` on `catmllm export text`: greedy completions are transformers',
    from text and from embeddings."""
    model, collate = wide_model
    save_model(tmp_path / "stage", model, model.state_dict(), load_config(None, WIDE), collate)
    folder = export(tmp_path / "stage", "text", tmp_path / "text", "fp32")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = (
        f"--model {folder} --tokenizer {folder / 'tokenizer'} --host 127.0.0.1 --port {port} --enforce-eager "
        "--enable-prompt-embeds --dtype float32 --gpu-memory-utilization 0.1 --max-model-len 512"
    )
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(**prompt: object) -> list[int]:
        body = {"model": str(folder), "max_tokens": 12, "temperature": 0, "return_token_ids": True, **prompt}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return list(json.load(reply)["choices"][0]["token_ids"])

    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(1)
        expected = []
        for sample in prompts[:2]:
            ids = copy.deepcopy(model.llm).generate(
                **left_padded(model, collate, [sample]),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=collate.end_id,
                pad_token_id=collate.pad_id,
            )
            expected.append(ids[0].tolist())
        assert ask(prompt=prompts[0].prompt) == expected[0]
        batch = collate([prompts[1]])
        buffer = io.BytesIO()
        torch.save(model.embed(batch).detach(), buffer)
        assert ask(prompt_embeds=base64.b64encode(buffer.getvalue()).decode()) == expected[1]
    finally:
        server.terminate()
        server.wait(30)
