"""`compute_score` called by verl's own managers (synchronous, batch, reward loop, its Ray workers),
and rewards in Ray at large.

verl wants an older transformers, so it has an environment of its own (`make frameworks`,
or any interpreter that imports verl 0.9.1 and ray):

    VERL_PYTHON=.frameworks/bin/python pytest tests/oracles/test_verl.py
"""

from typing import Any

import pytest

from rewards_fast import PVCP
from tests.oracles.elsewhere import ROOT, called
from tests.rewards_fast.cif_texts import SLAB

NEAR = SLAB.replace("0.500 1\n", "0.473 1\n")  # C-O at 0.75 Å, allowed by the setting that the job passes
ANSWERS = [SLAB, f"Sure.\n```\n{SLAB}```\nHope it helps.", NEAR, SLAB.replace("Cu", "Ni"), "no idea"]
TARGETS: list[Any] = [
    "CO</s>Pt3Cu (1 1 1)",
    "Pt3CuCO",
    {"Pt": 3, "Cu": 1, "C": 1, "O": 1, "Ni": None},
    "Pt3CuCO",
    None,
]


@pytest.mark.slow
def test_every_manager_of_verl_gets_the_reward() -> None:
    paths = [
        "pkg://rewards_fast.integrations.verl",
        str(ROOT / "rewards_fast" / "integrations" / "verl.py"),
    ]
    job = {"answers": ANSWERS, "targets": TARGETS, "paths": paths}
    result = called("verl_calls.py", job, "VERL_PYTHON", "verl 0.9.1; `make frameworks` makes one")
    found = result["verl"]
    assert len(found) == 2 * 4 + 1 and len(result["ray"]) == 2 * 3 + 1
    expected = PVCP(thresholds={"near": 0.7}).score(ANSWERS, TARGETS)
    for how, samples in found.items():
        assert [s["reward"] for s in samples] == pytest.approx(expected.total.tolist(), abs=1e-5), how
        assert [s["score"] for s in samples] == pytest.approx(expected.total.tolist()), how
        assert [s["phys"] for s in samples] == pytest.approx(expected.phys.tolist()), how
        assert [s["reason"] for s in samples] == [r or "" for r in expected.reason], how
    for how, rewards in result["ray"].items():
        assert rewards == expected.total.tolist(), how
    assert expected.total.tolist() == pytest.approx([10, 10, 10, expected.total[3], -15])
