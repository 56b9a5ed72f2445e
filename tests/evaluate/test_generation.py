"""The answers that an evaluation keeps are those that its means are taken over."""

from typing import Any

import numpy as np
import torch

from catmllm.config import RewardConfig, SamplingConfig
from catmllm.data.batches import Collator
from catmllm.design.reward import TERMS
from catmllm.evaluate.generation import evaluate_generation, generation_prompts
from catmllm.models.catalytic_mllm import CatalyticMLLM
from catmllm.structure.system import System
from catmllm.world import World
from rewards_fast import PVCP


class Alone(World):
    """A rank of one, without a process group."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_answers_are_what_was_measured(
    small_model: tuple[CatalyticMLLM, Collator], train_systems: list[System]
) -> None:
    model, collate = small_model
    systems = [min(train_systems, key=len), train_systems[-1]]
    world = Alone(0, 1, torch.device("cpu"))
    sampling = SamplingConfig(max_new_tokens=24, grammar=True)
    found = evaluate_generation(model, collate, systems, 5, sampling, RewardConfig(), 0, world)
    rows = found["answers"]
    assert [row["identity"] for row in rows] == [systems[i % 2].identity for i in range(5)]
    assert [row["energy"] for row in rows] == [None if i % 2 == 0 else systems[1].energy for i in range(5)]
    assert np.isclose(np.mean([row["reward"] for row in rows]), found["reward"], atol=1e-4)
    for name in TERMS:
        assert np.isclose(np.mean([row[name] for row in rows]), found["terms"][name], atol=1e-4), name
    again = PVCP().score([row["text"] for row in rows], [systems[i % 2].target for i in range(5)])
    assert [row["reason"] for row in rows] == list(again.reason) and found["PF"] == np.mean(
        [row["reason"] is not None for row in rows]
    )


def test_prompts_are_spread_over_the_systems(train_systems: list[System]) -> None:
    """Systems come sorted, so the first of them would be of a few slabs."""
    few = [of for _, of in generation_prompts(train_systems[:10], 4)]
    assert [s.sid for s in few] == [train_systems[i].sid for i in (0, 2, 5, 7)]
    again = [of for _, of in generation_prompts(train_systems[:3], 7)]
    assert [s.sid for s in again] == [train_systems[i % 3].sid for i in range(7)]
