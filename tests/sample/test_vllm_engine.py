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
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from catmllm.config import ConfigError, SamplingConfig, load_config
from catmllm.data.prompts import Sample
from catmllm.models.build import new_model
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.models.export import export
from catmllm.models.state import save_model
from catmllm.sample.engine import RolloutEngine
from catmllm.sample.vllm_engine import VLLMEngine, VLLMError
from catmllm.stages.grpo import GRPO, rollout_batch
from catmllm.structure.system import System
from catmllm.train.loop import train
from tests.conftest import SMALL_MODEL
from tests.contexts import MakeContext, small
from tests.sample.test_engine import GREEDY, Model, generated, left_padded, some_prompts
from tests.stages.test_rl_stages import TokenReward

PYTHON = os.environ.get("VLLM_PYTHON", "")
WIDE = [
    *SMALL_MODEL,
    "model.llm.hidden_size=128",
    "model.llm.num_attention_heads=4",
    "model.llm.num_key_value_heads=2",
]
needs_vllm = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM (make vllm)")


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


@pytest.fixture
def engine(wide_model: Model, tmp_path: Path) -> Iterator[VLLMEngine]:
    model, collate = copy.deepcopy(wide_model[0]), wide_model[1]
    engine = VLLMEngine(
        PYTHON, model, collate, GREEDY, torch.float32, tmp_path / "vllm.log", rows=16, memory=0.1
    )
    yield engine
    engine.close()
    assert not engine.folder.exists()


@pytest.fixture(scope="module")
def prompts(train_systems: list[System]) -> list[Sample]:
    return some_prompts(train_systems)[:3]


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
    with pytest.raises(ConfigError, match="need our own decoding"):
        load_config(None, ["grpo.vllm=python3"])  # the grammar is the default


@needs_vllm
@pytest.mark.slow
def test_greedy_tokens_and_log_probabilities_follow_the_weights(
    engine: VLLMEngine, prompts: list[Sample]
) -> None:
    model, collate = engine.model, engine.collate
    seen = []
    for version in (1, 2):
        engine.update()
        assert engine.version == version
        found = engine.generate(prompts, [0])
        theirs = generated(model, collate, prompts)
        for row, r in enumerate(found):
            assert r.ids.tolist() == theirs[row].tolist()[: len(r.ids)] and r.prompt == row
        batch = rollout_batch(collate, prompts, found)
        with torch.no_grad():
            forced = model(CatalyticMLLM.answer, batch).logprob
            torch.testing.assert_close(torch.cat([r.logprob for r in found]), forced, rtol=0, atol=1e-4)
            for layer in model.text.layers:
                layer.mlp.down_proj.weight.neg_()
        seen.append([r.ids.tolist() for r in found])
    assert seen[0] != seen[1]


@needs_vllm
@pytest.mark.slow
def test_samples_are_seeded_and_of_the_models_distribution(
    wide_model: Model, prompts: list[Sample], tmp_path: Path
) -> None:
    """Log-probabilities at another temperature are the model's;
    the first tokens' frequencies are its probabilities."""
    params = SamplingConfig(temperature=1.6, top_p=0.9, max_new_tokens=8)
    model, collate = wide_model
    engine = VLLMEngine(PYTHON, model, collate, params, torch.float32, tmp_path / "log", rows=64, memory=0.1)
    try:
        engine.update()
        first, again, other = (engine.generate(prompts, [seed], 4) for seed in (1, 1, 2))
        assert [r.ids.tolist() for r in first] == [r.ids.tolist() for r in again]
        assert [r.ids.tolist() for r in first] != [r.ids.tolist() for r in other]
        batch = rollout_batch(collate, prompts, first)
        with torch.no_grad():
            forced = model(CatalyticMLLM.answer, batch, temperature=1.6).logprob
        torch.testing.assert_close(torch.cat([r.logprob for r in first]), forced, rtol=0, atol=2e-4)
        engine.params = SamplingConfig(temperature=1.6, top_p=0.9, max_new_tokens=1)
        n = 600
        theirs = torch.stack([r.ids[0] for r in engine.generate(prompts[:1], [3], n)])
        ours = RolloutEngine(model, collate).generate(prompts[:1], engine.params, [3], n)
        counts = [
            t.bincount(minlength=len(collate.tokenizer))
            for t in (theirs, torch.stack([r.ids[0] for r in ours]))
        ]
        likely = counts[1].topk(5).indices
        difference = (counts[0][likely] - counts[1][likely]).abs() / n
        assert float(difference.max()) < 5 * (0.25 * 2 / n) ** 0.5
    finally:
        engine.close()


@needs_vllm
@pytest.mark.slow
def test_grpo_trains_from_its_samples(make_context: MakeContext) -> None:
    config = small()
    config.model.llm.hidden_size = 128
    config.grpo.vllm, config.grpo.vllm_memory = PYTHON, 0.1
    context = make_context(config)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}

    def make(c):  # type: ignore[no-untyped-def]
        stage = GRPO(c)
        stage.reward = TokenReward().score
        return stage

    state, stage = train(make, context)
    assert not torch.equal(state["llm.lm_head.weight"], before["llm.lm_head.weight"])
    assert stage.vllm.version == 2 and stage.vllm.process.poll() is not None  # type: ignore[attr-defined]


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
