"""The RL stages in one process with a made-up reward: weights move, the right ones, on the very tokens that were scored.

A model of a few steps writes nothing that parses, so that every group would be degenerate; the reward here counts
tokens instead.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from catmllm.config import Config
from catmllm.data.slabs import load_slabs, split
from catmllm.rl.exemplar_pool import Candidate
from catmllm.rl.search import ClosedLoop
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.structure.cif import write_cif
from catmllm.trainer import distributed
from catmllm.trainer.loop import Context, train
from catmllm.trainer.pipeline import new_model


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Context]:
    config = Config(tensorboard=False, precision="fp32")
    config.model.llm = dataclasses.replace(
        config.model.llm, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    for stage in (config.grpo, config.ga_grpo):
        stage.steps, stage.batch_size, stage.group_size, stage.micro_batch, stage.warmup = 2, 3, 3, 4, 1
        stage.sampling.max_new_tokens = 12
    config.grpo.property_share = 0.0
    config.ga_grpo.tasks, config.ga_grpo.iterations, config.ga_grpo.initial = 3, 2, 2
    data = {k: v[:40] for k, v in split(load_slabs()).items()}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    world = distributed.start(config)
    model, collate = new_model(config, data["train"])
    yield Context(config, model, collate, data, world, tmp_path)
    dist.destroy_process_group()


class TokenReward:
    """Stands where PVCP stands: the share of `e` in the text."""

    def score(self, texts, targets):
        total = np.array([t.count("e") / (len(t) + 1) + 1e-3 * i for i, t in enumerate(texts)])
        parts = dict.fromkeys(("total", "comp", "parse", "valid", "phys"), total)
        return type("Scores", (), {**parts, "reason": [None] * len(texts)})()


def test_grpo_moves_the_llm_and_nothing_frozen(context: Context) -> None:
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    seen = []

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.pvcp = TokenReward()  # type: ignore[assignment]
        roll = stage._roll

        def spy(step):
            seen.append(roll(step))
            return seen[-1]

        stage._roll = spy  # type: ignore[method-assign]
        return stage

    state, _ = train(make, context)
    moved = {k for k in state if not torch.equal(state[k], before[k])}
    assert "llm.lm_head.weight" in moved
    assert any(k.startswith("llm.model.language_model.layers.1.") for k in moved)
    assert not [k for k in moved if k.startswith(("encoder.", "projector.", "llm.model.visual."))]
    assert len(seen) == 2


def test_scored_tokens_are_the_sampled_tokens(context: Context) -> None:
    from catmllm.data.tokenizer import decode
    from catmllm.stages.grpo import rollout_batch

    stage = GRPO(context)
    texts: list[str] = []

    class Spy(TokenReward):
        def score(self, got, targets):
            texts.extend(got)
            return super().score(got, targets)

    stage.pvcp = Spy()  # type: ignore[assignment]
    from catmllm.trainer.distributed import shard

    for p in context.model.parameters():
        p.requires_grad_(True)
    shard(context.model, context.config, context.world)
    prompts, rollouts, _, _, _ = stage._roll(0)
    batch = rollout_batch(context.collate, [prompts[r.prompt] for r in rollouts], rollouts)
    for row, (rollout, text) in enumerate(zip(rollouts, texts)):
        trained = batch.labels[row][batch.labels[row] != -100]
        assert torch.equal(trained, rollout.ids)
        assert decode(context.collate.tokenizer, trained.tolist()) == text
    out = context.model("answer", batch)
    expected = torch.cat([r.logprob for r in rollouts])
    torch.testing.assert_close(out["logprob"].detach(), expected, atol=2e-4, rtol=1e-4)


def test_ga_grpo_moves_the_head_alone(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [write_cif(s) for s in context.data["train"][:4]]

    def judge(self, tasks, answers, iteration):
        rewards = [a.count("e") / (len(a) + 1) + 1e-3 * i for i, a in enumerate(answers)]
        found = [
            Candidate(texts[i % 4], r, -1.0, 5.0, True, f"{iteration}-{i}", iteration)
            for i, r in enumerate(rewards)
        ]
        return found, type("Scores", (), {"total": np.array(rewards)})()

    monkeypatch.setattr(ClosedLoop, "judge", judge)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, stage = train(GAGRPO, context)
    moved = {k for k in state if not torch.equal(state[k], before[k])}
    assert moved == {"llm.lm_head.weight"}
    assert len(stage.running) == 3 and all(len(s.trace) == 3 for s in stage.running)  # type: ignore[attr-defined]
