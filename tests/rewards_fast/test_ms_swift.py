"""ms-swift's reward plugin beside a stand-in of its registry; `tests/oracles/test_environments.py` runs
ms-swift itself."""

import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rewards_fast.integrations.ms_swift import SwiftReward, register
from tests.rewards_fast.cif_texts import SLAB, TARGET


@pytest.fixture
def orms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ms-swift keeps its rewards in."""

    class ORM:
        def __init__(self, args: Any = None, **others: Any) -> None:
            self.args = args

    rewards = types.ModuleType("swift.rewards")
    rewards.ORM, rewards.orms = ORM, {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    return rewards.orms  # type: ignore[attr-defined, no-any-return]


def test_a_plugin_file_registers_the_reward(orms: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(
        "from rewards_fast.integrations.ms_swift import register\nregister()\n"
    )
    runpy.run_path(str(tmp_path / "plugin.py"))
    reward = orms["cif_reward"](args=None)
    assert reward([SLAB, "x"], target=["Pt3CuCO"] * 2, trainer_state=None) == pytest.approx([10, -15])
    register("near", near=0.7)
    assert type(orms["near"](args=None)).__name__ == "near"
    with pytest.raises(ValueError, match="did you mean `near`"):
        register("wrong", nearr=0.7)


def test_conversations_of_a_row() -> None:
    user = {"role": "user", "content": TARGET}
    tool = {"role": "tool", "content": SLAB}
    say = [{"role": "assistant", "content": text} for text in (SLAB, "No idea.")]
    rows = [[user, say[0]], [user, say[1], tool, say[1]], [user, say[1], tool], [user, say[1], tool, say[0]]]
    completions = [row[-1]["content"] for row in rows]
    assert SwiftReward()(completions, messages=rows) == pytest.approx([10, -15, -15, 10])
