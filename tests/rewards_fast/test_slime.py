"""slime's custom reward, called as its rollout calls it: by path, for one sample or (`--group-rm`) for a
group.

slime's package cannot be installed from an index (the `slime` there is another thing); `Caller` below is
written after `slime/rollout/rm_hub` and `slime/rollout/sglang_rollout.py` of its sources.
"""

import asyncio
import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from rewards_fast.integrations.slime import MISSING
from tests.rewards_fast.cif_texts import SLAB, TARGET

PATH = "rewards_fast.integrations.slime.cif_reward"


@dataclass
class Sample:
    """The fields of slime's Sample that a reward may read."""

    prompt: Any = ""
    response: str = ""
    label: Any = None
    reward: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    custom_rm_path: str | None = None


class Caller:
    """slime's way to a reward: a function named by its dotted path, awaited with the arguments and what is
    to be scored."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = SimpleNamespace(custom_rm_path=PATH, rm_type=None, **arguments)

    def function(self) -> Any:
        module, _, name = self.arguments.custom_rm_path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    async def one_by_one(self, samples: list[Sample]) -> None:
        async def score(sample: Sample) -> None:
            sample.reward = await self.function()(self.arguments, sample)

        await asyncio.gather(*map(score, samples))

    async def as_a_group(self, samples: list[Sample]) -> None:
        rewards = await self.function()(self.arguments, samples)
        for sample, reward in zip(samples, rewards, strict=True):
            sample.reward = reward


def samples() -> list[Sample]:
    tool = f"\nuser\n<tool_response>\n{SLAB}\n</tool_response>\nassistant\n"
    chat = [{"role": "system", "content": "As NH</s>Fe4 (1 1 0)."}, {"role": "user", "content": TARGET}]
    return [
        Sample(TARGET, SLAB, "Pt3CuCO"),
        Sample(chat, SLAB),
        Sample("?", SLAB, '{"Pt": 3, "Cu": 1, "C": 1, "O": 1}'),
        Sample(TARGET, f"I ask.{tool}No idea."),
        Sample(TARGET, f"{SLAB}{tool}Done."),
        Sample("A slab.", SLAB),
    ]


@pytest.mark.parametrize("way", ["one_by_one", "as_a_group"])
def test_rewards_of_samples(way: str) -> None:
    rollout = samples()
    before = MISSING.missing
    asyncio.run(getattr(Caller(), way)(rollout))
    assert [s.reward for s in rollout] == pytest.approx([10, 10, 10, -15, -15, 4])
    assert all(type(s.reward) is float for s in rollout) and MISSING.missing == before + 1
    asyncio.run(getattr(Caller(cif_reward={"answer": "any", "comp": 0}), way)(rollout))
    assert [s.reward for s in rollout] == pytest.approx([4, 4, 4, -6, 4, 4])


def test_wrong_settings_and_missing_targets_are_errors() -> None:
    with pytest.raises(ValueError, match="cif_reward: unknown key `nearr`; did you mean `near`"):
        asyncio.run(Caller(cif_reward={"nearr": 1}).one_by_one(samples()))
    with pytest.raises(ValueError, match="row 5 has no target composition"):
        asyncio.run(Caller(cif_reward={"missing_target": "error"}).as_a_group(samples()))
