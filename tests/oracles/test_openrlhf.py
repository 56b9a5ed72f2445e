"""`reward_func` loaded and called by OpenRLHF's own executor,
up to the advantages that its trainer makes of the rewards.

OpenRLHF does not install without CUDA, but its package with what these paths import does (`make frameworks`):

    OPENRLHF_PYTHON=.frameworks/bin/python pytest tests/oracles/test_openrlhf.py
"""

from typing import Any

import numpy as np
import pytest

from rewards_fast import PVCP
from tests.oracles.elsewhere import ROOT, called
from tests.rewards_fast.cif_texts import SLAB, TARGET
from tests.rewards_fast.test_server import running

PROMPT = f"<|im_start|>user\n{TARGET} Please generate the CIF.<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = [SLAB + "<|im_end|>", f"Sure.\n```\n{SLAB}```", SLAB.replace("Cu", "Ni"), "no idea"]
LABELS = ["", "Pt3CuCO", "Pt3CuCO", ""]


def call_openrlhf(endpoint: str, answers: list[str], labels: list[str]) -> dict[str, Any]:
    """What OpenRLHF makes of an endpoint's rewards; skips where there is no OpenRLHF."""
    job = {"endpoint": endpoint, "prompts": [PROMPT] * len(answers), "labels": labels, "answers": answers}
    needs = "openrlhf; `make frameworks` makes one"
    return dict(called("openrlhf_calls.py", job, "OPENRLHF_PYTHON", needs, timeout=300))


def check(found: dict[str, Any]) -> None:
    expected = PVCP().score(ANSWERS, "Pt3CuCO")
    total = expected.total
    assert found["rewards"] == pytest.approx(total.tolist(), abs=1e-5)
    assert found["scores"] == pytest.approx(((total + 15) / 25).tolist(), abs=1e-6)
    assert [log["comp"] for log in found["logs"]] == pytest.approx(expected.comp.tolist())
    assert [log["parses"] for log in found["logs"]] == [1, 1, 1, 0]
    advantages = (total - total.mean()) / total.std(ddof=1)  # its group_norm
    np.testing.assert_allclose(found["advantages"], advantages, atol=1e-5)


@pytest.mark.slow
def test_the_function_file() -> None:
    path = ROOT / "rewards_fast" / "integrations" / "openrlhf.py"
    check(call_openrlhf(str(path), ANSWERS, LABELS))


@pytest.mark.slow
def test_over_http() -> None:
    with running() as port:
        check(call_openrlhf(f"http://127.0.0.1:{port}/get_reward", ANSWERS, LABELS))
    with running(token="s3cret") as port:
        check(call_openrlhf(f"http://any:s3cret@127.0.0.1:{port}/get_reward", ANSWERS, LABELS))
