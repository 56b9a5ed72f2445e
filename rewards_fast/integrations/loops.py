"""What the bridges to RL code and the server share: from conversations and data-set columns to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewards_fast.conversation import Conversation, answer_text
from rewards_fast.pvcp import Scores
from rewards_fast.settings import LoopSettings
from rewards_fast.targets import MissingTargets, Target, is_empty, prompt_target

ALIASES = frozenset(
    (
        "composition",
        "formula",
        "targets",
        "target_composition",
        "ground_truth",
        "label",
        "labels",
        "answer",
        "solution",
        "reference",
    )
)


def column_hint(columns: Sequence[str], wanted: str) -> str:
    """Which of a data set's columns may have been meant as the target."""
    near = [name for name in columns if name.lower() in ALIASES]
    if near:
        return f"There is no column {wanted!r}, but {', '.join(map(repr, near))}: name the one to read."
    return (
        f"Give a column {wanted!r}, or name the composition in the user's message (`CO</s>Pt9Cu3 (1 1 1)`)."
    )


def with_prompts(targets: Sequence[Target] | None, prompts: Sequence[Conversation] | None) -> list[Target]:
    """Targets of a data set; where one is empty, that of its prompt."""
    if prompts is None:
        return list(targets or ())
    if targets is None:
        return [prompt_target(prompt) for prompt in prompts]
    return [prompt_target(prompt) if is_empty(t) else t for t, prompt in zip(targets, prompts)]


def score_answers(
    settings: LoopSettings,
    completions: Sequence[Conversation],
    targets: Sequence[Target] | Target,
    watch: MissingTargets,
    hint: str = "",
) -> tuple[Scores, list[bool]]:
    """Scores of the assistant's words, and for each answer whether
    its target is missing (see `LoopSettings`).

    targets: one for each completion, or one for all. Where the composition weighs nothing none is expected.
    """
    texts = [answer_text(c, settings.answer, settings.extract) for c in completions]
    missing = [False] * len(texts)
    each = [targets] * len(texts) if targets is None or isinstance(targets, str | Mapping) else targets
    if settings.comp and len(each) == len(texts):
        missing = watch.count(each, settings.missing_target, hint)
    return settings.scorer().score(texts, targets), missing
