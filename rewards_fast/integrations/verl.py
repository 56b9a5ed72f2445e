"""The PVCP reward as verl's `compute_score`, for managers that hand over one answer or a whole batch:

    reward.custom_reward_function.path=pkg://rewards_fast.integrations.verl
    reward.custom_reward_function.name=compute_score

`ground_truth` is the wanted composition: a formula, a prompt or counts (see `rewards_fast.parse_target`). Scoring needs no
signal, process or event loop, so any thread, asyncio executor or Ray worker may call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards_fast.pvcp import PVCP, Target
from rewards_fast.settings import read_settings

Score = dict[str, float | str]
DEFAULT = PVCP()


def compute_score(
    data_source: Any = None,
    solution_str: str | None = None,
    ground_truth: Target = None,
    extra_info: Any = None,
    *,
    data_sources: Sequence[Any] | None = None,
    solution_strs: Sequence[str] | None = None,
    ground_truths: Sequence[Target] | None = None,
    extra_infos: Sequence[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **others: Any,
) -> Score | list[Score]:
    """`score` (the reward) with its terms `comp parse valid phys` and the `reason` ("" where the text parses), which verl logs.

    One dict for `solution_str`, a list of them for `solution_strs`. settings: keys of `RewardSettings`, from
    `reward_kwargs.settings`. verl's own other arguments are passed over.
    """
    scorer = read_settings(settings, "reward_kwargs.settings").scorer() if settings else DEFAULT
    if solution_strs is not None:
        return _score(scorer, solution_strs, ground_truths)
    if solution_str is None:
        raise TypeError("compute_score needs solution_str, or solution_strs for a batch")
    return _score(scorer, [solution_str], [ground_truth])[0]


def _score(scorer: PVCP, answers: Sequence[str], targets: Sequence[Target] | None) -> list[Score]:
    scores = scorer.score(answers, targets)
    terms = zip(scores.total, scores.comp, scores.parse, scores.valid, scores.phys, scores.reason)
    return [
        {
            "score": float(total),
            "comp": float(comp),
            "parse": float(parse),
            "valid": float(valid),
            "phys": float(phys),
            "reason": reason or "",
        }
        for total, comp, parse, valid, phys, reason in terms
    ]
