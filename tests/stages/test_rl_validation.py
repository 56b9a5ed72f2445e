"""RL stages keep their best weights by the mean reward of validation systems, the start's among them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from catmllm.config import Config, ConfigError, load_config
from catmllm.design.search import ClosedLoop
from catmllm.stages.ga_grpo import GAGRPO
from catmllm.stages.grpo import GRPO
from catmllm.stages.policy import validation
from catmllm.stages.scoring import Scored
from catmllm.stages.supervised import validation_systems
from catmllm.train.loop import train
from catmllm.train.stage import Context
from catmllm.train.stop import Stopped
from catmllm.world import World
from tests.contexts import MakeContext, small


def configured() -> Config:
    config = small()
    for rl in (config.grpo, config.ga_grpo):
        rl.sampling.grammar, rl.sampling.max_new_tokens = True, 45
        rl.validate_every, rl.validate_systems, rl.lr = 1, 3, 3e-3
    config.grpo.steps = 4
    return config


class Watched(GRPO):
    """Every reward is a function of the text; what validation finds is given beforehand."""

    values: tuple[float, ...] = ()

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.reward = lambda texts, asked: [len(t) + sum(map(ord, t)) % 97 / 97 for t in texts]
        self.seen: list[dict[str, torch.Tensor]] = []

    def _validation_rewards(self) -> np.ndarray:
        found = super()._validation_rewards()
        assert len(found) == 3 and np.isfinite(found).all()
        head = self.context.model.llm.lm_head.weight
        self.seen.append({"llm.lm_head.weight": head.full_tensor().clone()})  # type: ignore[operator]
        return np.array([self.values[len(self.seen) - 1], np.nan])


@pytest.mark.parametrize(("values", "best"), [((0.0, 2.0, 5.0, 1.0, 3.0), 2), ((9.0, 2.0, 5.0, 1.0, 3.0), 0)])
def test_the_weights_with_the_best_reward_are_the_result(
    make_context: MakeContext, values: tuple[float, ...], best: int
) -> None:
    context = make_context(configured())
    start = context.model.llm.lm_head.weight.detach().clone()
    stage_of = type("Given", (Watched,), {"values": values})
    state, stage = train(stage_of, context)
    assert isinstance(stage, Watched) and len(stage.seen) == 5
    kept = state["llm.lm_head.weight"]
    assert torch.equal(kept, stage.seen[best]["llm.lm_head.weight"])
    assert torch.equal(kept, start) == (best == 0)


def test_a_stopped_stage_goes_on_bit_for_bit(make_context: MakeContext) -> None:
    """Checkpoints of validated weights lie between the others; the run on from one repeats the unbroken."""

    class Real(GRPO):
        stop_after = 99

        def __init__(self, context: Context) -> None:
            super().__init__(context)
            self.reward = lambda texts, asked: [len(t) + sum(map(ord, t)) % 97 / 97 for t in texts]

        def step(self, step: int):  # type: ignore[no-untyped-def]
            if step == self.stop_after:
                raise Stopped("here")
            return super().step(step)

    def run(folder: Path, *stops: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
        state: dict[str, torch.Tensor] = {}
        for stop in (*stops, 99):
            context = make_context(configured())
            context.config.grpo.checkpoint_every = 2
            context.folder = folder
            folder.mkdir(exist_ok=True)
            try:
                state, _ = train(type("Cut", (Real,), {"stop_after": stop}), context)
            except Stopped:
                continue
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return state, rows

    base = make_context(configured()).folder
    whole, log = run(base / "whole")
    cut, log2 = run(base / "cut", 1, 3)
    by_step = {row["step"]: row for row in log2}
    assert [by_step[r["step"]]["loss"] for r in log] == [r["loss"] for r in log]
    assert [by_step[r["step"]]["val_reward"] for r in log] == [r["val_reward"] for r in log]
    assert all(torch.equal(cut[k], v) for k, v in whole.items())


def test_ga_grpo_validates_by_a_search(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context(configured())
    asked = []
    start = ClosedLoop.start

    def watched(self, tasks, *rest):  # type: ignore[no-untyped-def]
        asked.append([t.identity for t in tasks])
        return start(self, tasks, *rest)

    monkeypatch.setattr(ClosedLoop, "start", watched)
    train(GAGRPO, context)
    log = [json.loads(line) for line in (context.folder / "log.jsonl").read_text().splitlines()]
    assert [np.isfinite(row["val_reward"]) for row in log] == [True, True]
    val = {s.identity for s in context.data["val"]}
    assert sum(set(tasks) <= val and len(tasks) == 3 for tasks in asked) == 3  # at the start, after each step


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_as_many_designs_as_cifs_are_validated_on_any_ranks(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    config = configured()
    config.grpo.validate_systems = 12
    context = make_context(config)
    asked: dict[str, bool] = {}
    for rank in range(ranks):
        context.world = World(rank, ranks, context.world.device)
        stage = GRPO(context)

        def answers(prompts, systems, designs, *_):  # type: ignore[no-untyped-def]
            assert designs == ["eV" in p.prompt for p in prompts]
            asked.update({s.sid: design for s, design in zip(systems, designs)})
            return [], Scored(np.zeros(0), {}, []), {}

        monkeypatch.setattr(stage, "_answers", answers)
        stage._validation_rewards()
    systems = validation_systems(context, config.grpo)
    assert [asked[s.sid] for s in systems] == [k % 2 == 1 for k in range(len(systems))]


def test_without_any_reward_nothing_is_chosen(make_context: MakeContext) -> None:
    context = make_context(configured())
    one = validation(context.config.grpo, context.world, lambda: np.array([np.nan, np.nan]))
    assert one is not None and np.isnan(one.run()["val"])
    context.config.grpo.validate_every = 0
    assert validation(context.config.grpo, context.world, lambda: np.zeros(1)) is None


def test_validations_stand_between_rollouts() -> None:
    with pytest.raises(ConfigError, match=r"`grpo\.validate_every` must be a multiple"):
        load_config(None, ["grpo.updates_per_rollout=4", "grpo.validate_every=6"])
