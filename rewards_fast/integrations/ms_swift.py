"""The PVCP reward as a plugin of ms-swift's GRPO: a file of two lines,

    from rewards_fast.integrations.ms_swift import register
    register(near=0.7)

given as `--external_plugins FILE --reward_funcs cif_reward`. (This file itself is not to be given: ms-swift
puts a plugin's folder before all others, and here lie modules named like other packages.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards_fast.conversation import Conversation
from rewards_fast.integrations.trl import CIFReward


class SwiftReward(CIFReward):
    """`CIFReward` as ms-swift calls it: the whole conversation of a row stands in the column `messages`."""

    def __call__(  # type: ignore[override]
        self, completions: Sequence[str], messages: Sequence[Sequence[Any]] | None = None, **columns: Any
    ) -> list[float]:
        """One finite reward per completion; the target is the data set's column, else what the user said
        last."""
        if messages is None:
            return super().__call__(None, completions, **columns)
        answers: list[Conversation] = [after_the_prompt(row) for row in messages]
        prompts: list[Conversation] = [row[: len(row) - len(a)] for row, a in zip(messages, answers)]
        return super().__call__(prompts, answers, **columns)


def after_the_prompt(messages: Sequence[Any]) -> Sequence[Any]:
    """What follows the last user message. ms-swift does not say where the prompt ends; results of tools have
    a role of their own."""
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    return messages[users[-1] + 1 :] if users else messages


def register(name: str = "cif_reward", **settings: Any) -> None:
    """Makes the reward known to `--reward_funcs` under a name; settings as `CIFReward`."""
    from swift.rewards import ORM, orms

    reward = SwiftReward(**settings)

    class Registered(ORM):
        def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
            return reward(completions, **columns)

    Registered.__name__ = name  # what ms-swift logs
    orms[name] = Registered
