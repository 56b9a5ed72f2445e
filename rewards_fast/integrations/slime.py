"""The PVCP reward for slime (THUDM): `--custom-rm-path rewards_fast.integrations.slime.cif_reward`, with
`--group-rm` or without.

A sample's `label` is the wanted composition (`--label-key`), else the prompt names it. Settings are keys of
`LoopSettings` under `cif_reward` in the file of `--custom-config-path`.
"""

from __future__ import annotations

from typing import Any

from rewards_fast.integrations.loops import score_answers, with_prompts
from rewards_fast.settings import LoopSettings, read_settings
from rewards_fast.targets import MissingTargets

MISSING = MissingTargets("cif_reward")
HINT = "Name the data set's column with --label-key."


async def cif_reward(args: Any, samples: Any, **others: Any) -> Any:
    """The reward of one sample, or the rewards of a list of them; of an agent loop the last assistant
    message is scored."""
    if not isinstance(samples, list):
        return (await cif_reward(args, [samples]))[0]
    settings = read_settings(getattr(args, "cif_reward", None) or {}, "cif_reward", LoopSettings())
    targets = with_prompts([sample.label for sample in samples], [sample.prompt for sample in samples])
    scores, _ = score_answers(settings, [sample.response for sample in samples], targets, MISSING, HINT)
    return scores.total.tolist()
