"""The PVCP reward as OpenRLHF's `reward_func`; this file's own path is the argument:

    --reward.remote_url "$(python -m rewards_fast.integrations.openrlhf)"

or, with other settings, a file of two lines:

    from rewards_fast.integrations.openrlhf import make_reward_func
    reward_func = make_reward_func(near=0.7)

`rewards-fast serve` answers the same over HTTP (`--reward.remote_url http://127.0.0.1:8000/get_reward`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards_fast.integrations.loops import score_answers, with_prompts
from rewards_fast.pvcp import PVCP, TERMS, Scores, score_range
from rewards_fast.settings import LoopSettings, read_settings
from rewards_fast.targets import MissingTargets, Target

HINT = "Name the data set's column with --data.label_key, or the composition in the user's message."


def _answer(query: str, prompt: str) -> str:
    """What the model wrote: a query is prompt and answer in one text, with the special tokens."""
    start = query.find(prompt)
    return query if start < 0 else query[start + len(prompt) :]


def score_queries(
    settings: LoopSettings,
    queries: Sequence[str],
    prompts: Sequence[str] | None,
    labels: Sequence[Target] | None,
    watch: MissingTargets,
) -> tuple[Scores, list[bool]]:
    """Scores of queries (prompt + answer), and which had no target. A label is the wanted composition; where
    it is empty the prompt names it. Of an agent loop's answer the last assistant message is scored."""
    n = len(queries)
    prompts = [""] * n if prompts is None else prompts
    labels = [None] * n if labels is None else labels
    if len(prompts) != n or len(labels) != n:
        raise ValueError(
            f"{n} queries, {len(prompts)} prompts and {len(labels)} labels: one of each is needed"
        )
    answers = [_answer(q, p) for q, p in zip(queries, prompts)]
    return score_answers(settings, answers, with_prompts(labels, prompts), watch, HINT)


def reply(scorer: PVCP, scores: Scores, missing: Sequence[bool]) -> dict[str, Any]:
    """OpenRLHF's answer: `rewards`; `scores`, the same from 0 (does not parse) to 1 (perfect), for dynamic
    filtering; `extra_logs`, the mean of each term, the share that parses and the share without a target."""
    floor, top = score_range(scorer.weights)
    n = max(1, len(scores))
    total, *terms = scores.rows[:, : 1 + len(TERMS)].T.tolist()
    logs = {name: sum(values) / n for name, values in zip(TERMS, terms) if name != "parse"}
    logs["parses"] = sum(reason is None for reason in scores.reason) / n
    logs["no_target"] = sum(missing) / n
    return {
        "rewards": total,
        "scores": [min(1.0, max(0.0, (x - floor) / (top - floor or 1.0))) for x in total],
        "extra_logs": logs,
    }


def make_reward_func(**settings: Any) -> Callable[..., dict[str, Any]]:
    """A `reward_func` with other settings; keys of `rewards_fast.settings.LoopSettings`."""
    chosen = read_settings(settings, "make_reward_func", LoopSettings())
    scorer, watch = chosen.scorer(), MissingTargets("reward_func")

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Target], **others: Any
    ) -> dict[str, Any]:
        """Rewards of answers, as OpenRLHF's single-turn executor calls it (from a thread);
        lists of floats, never NaN."""
        return reply(scorer, *score_queries(chosen, queries, prompts, labels, watch))

    return reward_func


reward_func = make_reward_func()

if __name__ == "__main__":
    print(__file__)
