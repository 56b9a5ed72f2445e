"""The PVCP reward as a TRL reward function: `GRPOTrainer(..., reward_funcs=cif_reward)`.

The wanted composition comes from the data set's column `target` (counts, a formula or a prompt, see
`parse_target`); without it from what the user says last in the prompt. Of a completion with several turns or
tools the last assistant message is scored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rewards_fast.conversation import Conversation
from rewards_fast.integrations.loops import column_hint, score_answers, with_prompts
from rewards_fast.settings import LoopSettings, read_settings
from rewards_fast.targets import MissingTargets

# What TRL hands over beside the data set's columns.
_ARGUMENTS = frozenset(("completion_ids", "trainer_state", "log_extra", "log_metric", "environments"))


class CIFReward:
    """A reward function with its own settings: `CIFReward(near=0.7, target_column="composition")`.

    Other keys are those of `LoopSettings`. `missing.missing` of
    `missing.seen` answers had no target composition.
    """

    def __init__(self, target_column: str = "target", **settings: Any) -> None:
        self.settings = read_settings(settings, "CIFReward", LoopSettings())
        self.settings.scorer()
        self.target_column = target_column
        self.missing = MissingTargets("cif_reward")
        self.__name__ = "cif_reward"  # the name under which TRL logs it

    def __call__(
        self,
        prompts: Sequence[Conversation] | None = None,
        completions: Sequence[Conversation] = (),
        **columns: Any,
    ) -> list[float]:
        """One finite reward a completion. Other columns and TRL's own arguments are passed over.

        Where TRL takes metrics (`log_metric`), it gets the share of
        answers that parse and of those without a target.
        """
        given = columns.get(self.target_column)
        targets = (
            with_prompts(given, prompts)
            if given is not None or prompts is not None
            else [None] * len(completions)
        )
        others = [name for name in columns if name not in _ARGUMENTS and name != self.target_column]
        hint = column_hint(others, self.target_column)
        scores, missing = score_answers(self.settings, completions, targets, self.missing, hint)
        if (log := columns.get("log_metric")) is not None and missing:
            log("cif_reward/parses", sum(reason is None for reason in scores.reason) / len(missing))
            log("cif_reward/no_target", sum(missing) / len(missing))
        return scores.total.tolist()


cif_reward: Callable[..., list[float]] = CIFReward()


async def cif_reward_async(*args: Any, **kwargs: Any) -> list[float]:
    """`cif_reward` off the event loop, for trainers that await several rewards together."""
    answer: Awaitable[list[float]] = asyncio.to_thread(cif_reward, *args, **kwargs)
    return await answer
