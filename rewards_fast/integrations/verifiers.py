"""The PVCP reward in verifiers (Prime Intellect, 0.4 and newer): a taskset of its own, and a reward for
yours.

    from rewards_fast.integrations.verifiers import CIFTaskset  # all of the file catalysts.py
    __all__ = ["CIFTaskset"]

    vf-eval catalysts --env.taskset.data prompts.jsonl --env.taskset.task.reward.near 0.7

reads rows like `{"prompt": ..., "target": "Pt9Cu3CO"}`. A taskset of yours whose data has a field `target`
plugs the reward in by its path: `task.rewards.cif_reward.fn =
"rewards_fast.integrations.verifiers:cif_reward"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import verifiers.v1 as vf

from rewards_fast.files import UNREADABLE, read_rows
from rewards_fast.integrations.loops import score_answers, with_prompts
from rewards_fast.pvcp import TERMS, Scores
from rewards_fast.settings import LoopSettings, read_settings
from rewards_fast.targets import MissingTargets

__all__ = ["CIFTaskset"]
MISSING = MissingTargets("verifiers")
HINT = "The task's data has no `target`, and its prompt names none."


def _score(task: Any, trace: Any, settings: LoopSettings) -> tuple[Scores, bool]:
    prompt = task.prompt or ""
    targets = with_prompts([getattr(task, "target", None)], [prompt])
    scores, missing = score_answers(settings, [list(trace.assistant_messages)], targets, MISSING, HINT)
    return scores, missing[0]


async def cif_reward(task: Any, trace: Any) -> float:
    """The reward of the last assistant message of a trace, for a task whose data has a `target` or names one
    in its prompt."""
    return float(_score(task, trace, LoopSettings())[0].total[0])


class CIFData(vf.TaskData):
    """A prompt with the composition that its answer is to have."""

    target: str | dict[str, float | None] | None = None


class CIFTaskConfig(vf.TaskConfig):
    """`reward`: keys of `LoopSettings` (`--env.taskset.task.reward.near 0.7`)."""

    reward: dict[str, Any] = {}  # noqa: RUF012, pydantic copies it


class CIFTask(vf.Task[CIFData, vf.State, CIFTaskConfig]):
    """Scored by PVCP: the reward, with its terms as metrics."""

    def settings(self) -> LoopSettings:
        return read_settings(self.config.reward, "task.reward", LoopSettings())

    @vf.reward
    async def cif_reward(self, trace: vf.Trace) -> float:
        return float(_score(self.data, trace, self.settings())[0].total[0])

    @vf.metric
    async def cif_terms(self, trace: vf.Trace) -> dict[str, float]:
        scores, missing = _score(self.data, trace, self.settings())
        terms = {name: float(getattr(scores, name)[0]) for name in TERMS if name != "parse"}
        return {**terms, "parses": float(scores.reason[0] is None), "no_target": float(missing)}


class CIFConfig(vf.TasksetConfig):
    """`data`: a .jsonl, .jsonl.gz or .parquet file with `prompt` and `target` in each row."""

    data: str = ""
    task: CIFTaskConfig = CIFTaskConfig()


class CIFTaskset(vf.Taskset[CIFTask, CIFConfig]):
    """The prompts of a file."""

    def load(self) -> Iterator[CIFTask]:
        if not Path(self.config.data).is_file():
            raise ValueError(
                f"taskset.data: no file {self.config.data!r}; give one with `prompt` and `target` in each row"
            )
        for row in read_rows(Path(self.config.data), "prompt"):
            if row.reason is not None:
                what = row.problem if row.reason == UNREADABLE else f"{row.reason}: {row.problem}"
                raise ValueError(f"{self.config.data}, row {row.number}: {what}")
            prompt: Any = row.text
            yield CIFTask(CIFData(prompt=prompt, target=row.target), self.config.task)
