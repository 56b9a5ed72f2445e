"""`reward_func` loaded and called by OpenRLHF's own executor,
up to the advantages that its trainer makes of the rewards.

OpenRLHF does not install without CUDA, but its package with what these paths import does (`make frameworks`):

    OPENRLHF_PYTHON=.frameworks/bin/python pytest tests/oracles/test_openrlhf.py
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards_fast import PVCP
from tests.rewards_fast.cif_texts import SLAB, TARGET
from tests.rewards_fast.test_server import running

ROOT = Path(__file__).parents[2]
PROMPT = f"<|im_start|>user\n{TARGET} Please generate the CIF.<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = [SLAB + "<|im_end|>", f"Sure.\n```\n{SLAB}```", SLAB.replace("Cu", "Ni"), "no idea"]
LABELS = ["", "Pt3CuCO", "Pt3CuCO", ""]


def call_openrlhf(endpoint: str, answers: list[str], labels: list[str]) -> dict[str, Any]:
    """What OpenRLHF makes of an endpoint's rewards; skips where there is no OpenRLHF."""
    python = os.environ.get("OPENRLHF_PYTHON")
    if not python:
        pytest.skip("OPENRLHF_PYTHON names no interpreter that has openrlhf; `make frameworks` makes one")
    job = {"endpoint": endpoint, "prompts": [PROMPT] * len(answers), "labels": labels, "answers": answers}
    run = subprocess.run(
        [python, str(ROOT / "tests" / "oracles" / "openrlhf_calls.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return dict(json.loads(run.stdout.rpartition("RESULT ")[2]))


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
