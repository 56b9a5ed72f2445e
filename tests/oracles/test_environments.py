"""The reward called by verifiers', OpenEnv's and ms-swift's own code.

They want other versions than the trainer, so they have an environment of their own (`make environments`):

    ENVIRONMENTS_PYTHON=.environments/bin/python pytest tests/oracles/test_environments.py
"""

from typing import Any

import pytest

from rewards_fast.settings import LoopSettings
from tests.oracles.elsewhere import called
from tests.rewards_fast.cif_texts import SLAB, TARGET

NEAR = SLAB.replace("0.500 1\n", "0.473 1\n")  # C-O at 0.75 Å, allowed by the setting that the job passes
TOOL = {"role": "tool", "content": SLAB, "tool_call_id": "1"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# What the assistant said last, and the conversation it said it in.
LAST = [SLAB, NEAR, "No idea.", SLAB, f"Sure.\n```\n{SLAB}```"]
CONVERSATIONS = [
    [said(SLAB)],
    [said("I ask."), TOOL, said(NEAR)],
    [said("I ask."), TOOL, said("No idea.")],
    [said("no"), TOOL, said(SLAB)],
    [said(f"Sure.\n```\n{SLAB}```")],
]
PROMPTS = ["A slab, please.", "A slab, please.", TARGET, f"{TARGET} Please.", "A slab, please."]
TARGETS: list[Any] = [{"Pt": 3, "Cu": 1, "C": 1, "O": 1}, "Pt3CuCO", None, None, None]


@pytest.mark.slow
def test_environments_get_the_reward_of_the_last_assistant_message() -> None:
    job = {"prompts": PROMPTS, "targets": TARGETS, "conversations": CONVERSATIONS}
    needs = "verifiers; `make environments` makes one"
    found = called("environment_calls.py", job, "ENVIRONMENTS_PYTHON", needs)
    wanted = [*TARGETS[:2], TARGET, TARGET, None]
    near = LoopSettings(near=0.7).scorer().score(LAST, wanted)
    plain = LoopSettings().scorer().score(LAST, wanted).total.tolist()
    total = near.total.tolist()
    assert total == pytest.approx([10, 10, -15, 10, 4])
    assert found["verifiers"]["rewards"] == pytest.approx(total)
    assert found["verifiers"]["plugged"] == pytest.approx(plain)
    assert [m["phys"] for m in found["verifiers"]["metrics"]] == near.phys.tolist()
    assert [m["no_target"] for m in found["verifiers"]["metrics"]] == [0, 0, 0, 0, 1]
    episodes = found["openenv"]["episodes"]
    assert [e[0] for e in episodes] == PROMPTS and all(e[2] for e in episodes)
    assert [e[1] for e in episodes] == pytest.approx(total)
    assert [e[3] for e in episodes] == near.reason
    assert found["swift"]["names"] == ["cif_reward", "near"]
    assert found["swift"]["rewards"] == [pytest.approx(plain), pytest.approx(total)]
