"""verl's two documented signatures, from threads and event loops;
`tests/oracles/test_verl.py` runs verl itself."""

import asyncio
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest

from rewards_fast import PVCP
from rewards_fast.integrations.verl import compute_score
from tests.rewards_fast.cif_texts import SLAB, TARGET

ANSWERS = [SLAB, f"Here it is:\n```\n{SLAB}```", SLAB.replace("Cu", "Ni"), "no idea", ""]
TARGETS: list[Any] = [TARGET, {"Pt": 3, "Cu": 1, "C": 1, "O": 1, "Ni": None}, "Pt3CuCO", TARGET, None]


def single(answer: str, target: Any) -> Any:
    return compute_score(data_source="slabs", solution_str=answer, ground_truth=target, extra_info={"a": 1})


def test_one_answer_and_a_batch_agree_with_pvcp() -> None:
    expected = PVCP().score(ANSWERS, TARGETS)
    batch = compute_score(
        data_sources=np.array(["slabs"] * 5, dtype=object),
        solution_strs=ANSWERS,
        ground_truths=TARGETS,
        extra_infos=np.array([{}] * 5),
    )
    assert isinstance(batch, list)
    assert batch == [single(a, t) for a, t in zip(ANSWERS, TARGETS)]
    assert [s["score"] for s in batch] == expected.total.tolist()
    assert [s["reason"] for s in batch] == [r or "" for r in expected.reason]
    for name in ("comp", "parse", "valid", "phys"):
        assert [s[name] for s in batch] == getattr(expected, name).tolist()
    assert all(type(s[k]) is float for s in batch for k in s if k != "reason")


def test_positional_arguments_and_those_of_a_reward_model() -> None:
    score = compute_score("slabs", SLAB, TARGET, None, reward_router_address="host", reward_model_tokenizer=1)
    assert isinstance(score, dict) and score["score"] == pytest.approx(10)


def test_settings_come_through_reward_kwargs() -> None:
    near = SLAB.replace("0.500 1\n", "0.473 1\n")  # C-O at 0.75 Å
    assert single(near, TARGET)["phys"] == 7
    loose = compute_score(solution_str=near, ground_truth=TARGET, settings={"near": 0.7})
    assert isinstance(loose, dict) and loose["phys"] == 10
    with pytest.raises(
        ValueError, match=r"reward_kwargs\.settings: unknown key `nearr`; did you mean `near`"
    ):
        compute_score(solution_str=near, settings={"nearr": 0.7})
    with pytest.raises(TypeError, match="solution_str"):
        compute_score(data_source="x")
    with pytest.raises(ValueError, match="targets"):
        compute_score(solution_strs=[SLAB], ground_truths=["Pt", "Pt"])


def test_json_ground_truths() -> None:
    for target in ('{"Pt": 3, "Cu": 1, "C": 1, "O": 1}', '"Pt3CuCO"', f'"{TARGET}"'):
        assert single(SLAB, target)["score"] == pytest.approx(10), target
    for wrong in ("PT3CUCO", "[1]", "platinum"):
        with pytest.raises(ValueError):
            single(SLAB, wrong)


def test_the_last_assistant_message_of_an_agent_loop_is_scored() -> None:
    """verl decodes the whole loop into one text and skips the special tokens."""
    tool = f"user\n<tool_response>\n{SLAB}\n</tool_response>\nassistant\n"
    call = '<tool_call>\n{"name": "draw", "arguments": {}}\n</tool_call>\n'
    assert single(f"I ask.{call}{tool}No idea.", TARGET)["reason"] == "no_block"
    assert single(f"I ask.{call}{tool}{SLAB}", TARGET)["score"] == pytest.approx(10)
    assert single(f"{SLAB}{call}{tool}Done.", TARGET)["score"] == -15
    loop = compute_score(
        solution_str=f"{SLAB}{call}user\n<tool_response>\nok\n</tool_response>\nassistant\nDone.",
        ground_truth=TARGET,
        settings={"answer": "any"},
    )
    assert isinstance(loop, dict) and loop["score"] == pytest.approx(10)


def test_a_missing_ground_truth_is_counted_and_can_be_an_error() -> None:
    assert (single(SLAB, None)["no_target"], single(SLAB, "Pt3CuCO")["no_target"]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="row 1 has no target composition"):
        compute_score(
            solution_strs=[SLAB] * 2, ground_truths=["Pt", None], settings={"missing_target": "error"}
        )


def test_threads_and_event_loops() -> None:
    expected = [single(a, t) for a, t in zip(ANSWERS, TARGETS)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(single, ANSWERS * 50, TARGETS * 50)) == expected * 50

    async def gather() -> list[Any]:
        loop = asyncio.get_running_loop()
        return list(
            await asyncio.gather(
                *(loop.run_in_executor(None, single, a, t) for a, t in zip(ANSWERS * 20, TARGETS * 20))
            )
        )

    assert asyncio.run(gather()) == expected * 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method: str) -> None:
    single(SLAB, TARGET)  # the parent has used the engine before it forks
    assert pickle.loads(pickle.dumps(compute_score)) is compute_score
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        assert list(pool.map(single, ANSWERS, TARGETS)) == [single(a, t) for a, t in zip(ANSWERS, TARGETS)]
