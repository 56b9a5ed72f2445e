"""The PVCP reward as verl's `compute_score`, for managers that hand over one answer or a whole batch:

    reward.custom_reward_function.path=pkg://rewards_fast.integrations.verl
    reward.custom_reward_function.name=compute_score

`ground_truth` is the wanted composition: a formula, a prompt or counts, also as JSON text (see
`rewards_fast.parse_target`). Of an agent loop's answer the last assistant message is scored. Scoring needs no
signal, process or event loop, so any thread, asyncio executor or Ray worker may call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards_fast.conversation import Conversation
from rewards_fast.integrations.loops import score_answers
from rewards_fast.pvcp import TERMS
from rewards_fast.settings import LoopSettings, read_settings
from rewards_fast.targets import MissingTargets, Target

Score = dict[str, float | str]
DEFAULT = LoopSettings()
MISSING = MissingTargets("compute_score")
HINT = "The data set's reward_model.ground_truth names none."


def compute_score(
    data_source: Any = None,
    solution_str: Conversation | None = None,
    ground_truth: Target = None,
    extra_info: Any = None,
    *,
    data_sources: Sequence[Any] | None = None,
    solution_strs: Sequence[Conversation] | None = None,
    ground_truths: Sequence[Target] | None = None,
    extra_infos: Sequence[Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **others: Any,
) -> Score | list[Score]:
    """`score` (the reward) with its terms `comp parse valid phys`, the `reason` ("" where the text parses)
    and `no_target` (1 where no composition was wanted), which verl logs.

    One dict for `solution_str`, a list of them for `solution_strs`. settings: keys of `LoopSettings`, from
    `reward_kwargs.settings`. verl's own other arguments are passed over.
    """
    chosen = read_settings(settings, "reward_kwargs.settings", DEFAULT) if settings else DEFAULT
    if solution_strs is not None:
        return _score(chosen, solution_strs, ground_truths)
    if solution_str is None:
        raise TypeError("compute_score needs solution_str, or solution_strs for a batch")
    return _score(chosen, [solution_str], [ground_truth])[0]


def _score(
    settings: LoopSettings, answers: Sequence[Conversation], targets: Sequence[Target] | None
) -> list[Score]:
    wanted = [None] * len(answers) if targets is None else targets
    scores, missing = score_answers(settings, answers, wanted, MISSING, HINT)
    columns = zip(*(getattr(scores, name).tolist() for name in ("total", *TERMS)))
    return [
        {**dict(zip(("score", *TERMS), numbers)), "reason": reason or "", "no_target": float(hole)}
        for numbers, reason, hole in zip(columns, scores.reason, missing)
    ]
