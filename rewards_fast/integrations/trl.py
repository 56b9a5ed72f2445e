"""The PVCP reward as a TRL reward function: `GRPOTrainer(..., reward_funcs=cif_reward)`.

The wanted composition comes from the data set's column `target` (counts, a formula or a prompt, see `parse_target`); without
it from the prompt itself. Standard and conversational completions are read alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rewards_fast.pvcp import PVCP, Target, prompt_target

Completion = str | Sequence[Mapping[str, Any]]


def _text(completion: Completion) -> str:
    """The text of a completion: itself, or the contents of its messages (a content may be a list of parts)."""
    if isinstance(completion, str):
        return completion
    pieces = []
    for message in completion:
        content = message.get("content") or ""
        pieces.append(
            content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        )
    return "\n".join(pieces)


class CIFReward:
    """A reward function with its own weights or thresholds: `CIFReward(thresholds={"near": 0.7})`; options as `PVCP`."""

    def __init__(self, **options: Any) -> None:
        self.scorer = PVCP(**options)
        self.__name__ = "cif_reward"  # the name under which TRL logs it

    def __call__(
        self,
        prompts: Sequence[Completion] | None = None,
        completions: Sequence[Completion] = (),
        target: Sequence[Target] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One finite reward a completion. Other columns and TRL's own arguments are passed over."""
        if target is None and prompts is not None:
            target = [prompt_target(_text(prompt)) for prompt in prompts]
        return self.scorer.score([_text(c) for c in completions], target).total.tolist()


cif_reward: Callable[..., list[float]] = CIFReward()


async def cif_reward_async(*args: Any, **kwargs: Any) -> list[float]:
    """`cif_reward` off the event loop, for trainers that await several rewards together."""
    answer: Awaitable[list[float]] = asyncio.to_thread(cif_reward, *args, **kwargs)
    return await answer
