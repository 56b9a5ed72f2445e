"""The RL stages in one process with a made-up reward: weights move, the right ones, on the very tokens that were scored.

A model of a few steps writes nothing that parses, so that every group would be degenerate; the reward here counts
tokens instead.
"""

import numpy as np
import pytest
import torch

from catmllm.rl.exemplar_pool import Candidate
from catmllm.rl.search import ClosedLoop
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.structure.cif import write_cif
from catmllm.trainer.loop import Context, train
from tests.stages.conftest import MakeContext, small


class TokenReward:
    """Stands where PVCP stands: the share of `e` in the text."""

    def score(self, texts, targets):
        total = np.array([t.count("e") / (len(t) + 1) + 1e-3 * i for i, t in enumerate(texts)])
        parts = dict.fromkeys(("total", "comp", "parse", "valid", "phys"), total)
        return type("Scores", (), {**parts, "reason": [None] * len(texts)})()


@pytest.mark.parametrize(("precision", "replay"), [("fp32", 0.0), ("bf16", 0.5)])
def test_grpo_moves_the_llm_and_nothing_frozen(
    make_context: MakeContext, precision: str, replay: float
) -> None:
    config = small()
    config.precision, config.grpo.property_share = precision, replay  # type: ignore[assignment]
    context = make_context(config)
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
    assert ("energy_head.weight" in moved) == (replay > 0)
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
        trained = batch.targets[batch.answer_sample == row]
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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_any_signal_changes_nothing(make_context: MakeContext, precision: str) -> None:
    class Flat(TokenReward):
        def score(self, texts, targets):
            scores = super().score(texts, targets)
            scores.total = scores.comp = np.zeros(len(texts))
            return scores

    def make(c: Context) -> GRPO:
        stage = GRPO(c)
        stage.pvcp = Flat()  # type: ignore[assignment]
        return stage

    config = small()
    config.precision = precision  # type: ignore[assignment]
    context = make_context(config)
    before = {k: v.clone() for k, v in context.model.state_dict().items()}
    state, stage = train(make, context)
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    assert stage.state()["skipped"] == 2 * config.grpo.batch_size
