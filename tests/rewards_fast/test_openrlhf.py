"""OpenRLHF's function file as its executor loads and calls it;
`tests/oracles/test_openrlhf.py` runs OpenRLHF itself."""

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rewards_fast.integrations.openrlhf as openrlhf
from rewards_fast.integrations.openrlhf import make_reward_func, reward_func
from tests.rewards_fast.cif_texts import SLAB, TARGET

PROMPT = f"<|im_start|>user\n{TARGET} Please generate the CIF.<|im_end|>\n<|im_start|>assistant\n"


def load(path: Path | str) -> Any:
    """The function of a file, the way that OpenRLHF's executor gets it."""
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reward_func


def test_the_file_itself_is_a_function_file() -> None:
    command = [sys.executable, "-m", "rewards_fast.integrations.openrlhf"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(run.stdout.strip())
    assert path.samefile(openrlhf.__file__ or "")
    queries = [PROMPT + SLAB + "<|im_end|>", PROMPT + "no idea<|im_end|>"]
    result = load(path)(queries, [PROMPT] * 2, ["Pt3CuCO", ""])
    assert result["rewards"] == pytest.approx([10, -15])
    assert result["scores"] == pytest.approx([1, 0])
    assert result["extra_logs"] == pytest.approx(
        {"comp": -2.5, "valid": 0.0, "phys": 0.0, "parses": 0.5, "no_target": 0.0}
    )
    assert json.loads(json.dumps(result)) == result


def test_own_settings_make_an_own_file(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text(
        "from rewards_fast.integrations.openrlhf import make_reward_func\nreward_func = "
        "make_reward_func(comp=0, parse=1)\n"
    )
    assert load(path)(["x"], ["x"], [""])["rewards"] == [-22.0]
    with pytest.raises(ValueError, match="did you mean `near`"):
        make_reward_func(nearr=1)


def test_the_prompt_is_no_part_of_the_answer() -> None:
    example = f"Example:\n{SLAB}\nNow {TARGET}\n"
    assert reward_func([example + "sorry"], [example], [TARGET])["rewards"] == [-15.0]
    assert reward_func(["<s>" + example + SLAB], [example], [TARGET])["rewards"] == pytest.approx([10.0])
    cut = example[200:]  # the executor cuts long prompts on the left; the answer is still the last turn's
    assert reward_func([f"{cut}<|im_start|>assistant\nsorry"], [example], [TARGET])["rewards"] == [-15.0]


@pytest.mark.parametrize("label", ["", None, {}])
def test_without_a_label_the_prompt_names_the_composition(label: Any) -> None:
    assert reward_func([PROMPT + SLAB], [PROMPT], [label])["rewards"] == pytest.approx([10.0])
    # </s> is also its end of a turn
    mistral = f"<s>[INST] Hi [/INST] Hello</s>[INST] {TARGET} Please [/INST]"
    assert reward_func([mistral + SLAB], [mistral], [label])["rewards"] == pytest.approx([10.0])
    plain = "Write a CIF."
    assert reward_func([plain + SLAB], [plain], [label])["rewards"] == pytest.approx([4.0])


def test_an_agent_loop_and_a_missing_target() -> None:
    tool = (
        f"<|im_end|>\n<|im_start|>user\n<tool_response>\n{SLAB}\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert reward_func([PROMPT + "I ask." + tool + "No idea."], [PROMPT], [""])["rewards"] == [-15.0]
    assert reward_func([PROMPT + "I ask." + tool + SLAB], [PROMPT], [""])["rewards"] == pytest.approx([10.0])
    anywhere = make_reward_func(answer="any")
    assert anywhere([PROMPT + SLAB + tool + "Done."], [PROMPT], [""])["rewards"] == pytest.approx([10.0])
    assert reward_func([SLAB] * 2, ["Make a slab."] * 2, ["", "Pt"])["extra_logs"]["no_target"] == 0.5
    with pytest.raises(ValueError, match=r"reward_func: row 0 has no target composition.*label_key"):
        make_reward_func(missing_target="error")([SLAB], ["?"], [""])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 queries, 1 prompts"):
        reward_func(["a", "b"], ["a"], ["", ""])


def test_from_an_event_loop() -> None:
    async def gather() -> list[Any]:
        calls = (asyncio.to_thread(reward_func, [PROMPT + SLAB], [PROMPT], [TARGET]) for _ in range(64))
        return list(await asyncio.gather(*calls))

    assert {r["rewards"][0] for r in asyncio.run(gather())} == {
        reward_func([SLAB], [""], [TARGET])["rewards"][0]
    }
