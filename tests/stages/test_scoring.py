"""Scoring beside sampling: the rewards are those of one call, whatever fails."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from catmllm.stages.own_reward import OwnReward, load_reward
from catmllm.stages.scoring import Scored, Scoring
from rewards_fast import PVCP
from tests.rewards_fast.cif_texts import SLAB, TARGET


def collect(reward, texts: list[str], timeout: float = 5.0, targets=None) -> Scored:
    scoring = Scoring(reward, targets or [{"Pd": 1}] * len(texts), timeout)
    for i in reversed(range(len(texts))):
        scoring.take(i, texts[i])
    return scoring.finish()


def test_pvcp_gives_what_one_call_gives() -> None:
    texts = [SLAB, "garbage", SLAB.replace("Cu", "Ni"), SLAB[: len(SLAB) // 2]] * 40
    targets = [TARGET] * len(texts)
    expected = PVCP().score(texts, targets)
    found = collect(PVCP().score, texts, targets=targets)
    np.testing.assert_array_equal(found.total, expected.total)
    for name in ("comp", "parse", "valid", "phys"):
        np.testing.assert_array_equal(found.terms[name], getattr(expected, name))
    assert found.reason == list(expected.reason) and found.problems == {}


def test_scoring_runs_while_others_are_sampled() -> None:
    done = threading.Event()

    def reward(texts, targets):
        done.set()
        return [1.0] * len(texts)

    scoring = Scoring(reward, [{}, {}], 5.0)
    scoring.take(0, "a")
    assert done.wait(5)  # before the second answer has come
    scoring.take(1, "b")
    assert scoring.finish().total.tolist() == [1.0, 1.0]


def test_one_that_raises_does_not_cost_its_batch() -> None:
    def reward(texts, targets):
        return [1.0 / (len(t) - 3) for t in texts]

    found = collect(reward, ["a", "bbb", "cc", "dddd"])
    assert found.problems.keys() == {1} and found.problems[1].startswith("ZeroDivisionError")
    np.testing.assert_array_equal(found.total, [-0.5, np.nan, -1.0, 1.0])


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_no_number_is_no_reward(value: float | None) -> None:
    found = collect(lambda texts, targets: [value if t == "x" else 2.0 for t in texts], ["x", "y"])
    assert np.isnan(found.total[0]) and found.total[1] == 2.0
    assert list(found.problems) == [0]


def test_the_wrong_number_of_rewards_is_told() -> None:
    found = collect(lambda texts, targets: [1.0, 2.0, 3.0], ["a", "b"])
    assert all("3" in p and "for 1 texts" in p for p in found.problems.values()) and len(found.problems) == 2


def test_one_that_hangs_costs_itself_and_its_time() -> None:
    """Two of forty hang for good: the others are scored, and the whole takes two limits, not two for each."""
    release = threading.Event()

    def reward(texts, targets):
        if "hang" in texts:
            release.wait(30)
        return [float(len(t)) for t in texts]

    texts = ["hang" if i in (7, 20) else "x" * (i % 5 + 5) for i in range(40)]
    began = time.perf_counter()
    found = collect(reward, texts, timeout=0.4)
    assert time.perf_counter() - began < 5
    release.set()
    assert found.problems == {7: "no reward within 0.4 s", 20: "no reward within 0.4 s"}
    expected = [np.nan if t == "hang" else float(len(t)) for t in texts]
    np.testing.assert_array_equal(found.total, expected)
    time.sleep(0.2)  # those that hung come back now: too late
    np.testing.assert_array_equal(found.total, expected)


def test_nothing_to_score() -> None:
    assert Scoring(lambda t, g: [], [], 1.0).finish().total.shape == (0,)


def test_rewards_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(texts, targets):\n    return [-len(t) for t in texts]\n")
    reward = load_reward(f"{tmp_path / 'mine.py'}:short")
    assert collect(reward, ["abc"]).total.tolist() == [-3.0]
    assert load_reward("math:hypot")(3, 4) == 5  # type: ignore[arg-type]
    for wrong, message in (
        ("nothing", "file.py:function"),
        (f"{tmp_path / 'mine.py'}:long", "no function 'long'"),
        ("no.such.module:f", "cannot import"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(wrong)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_reward("absent.py:f")


OWN = """
import os, time

def score(texts, targets):
    if len(texts) > 1 and any(t in ("raise", "hang", "eat", "die") for t in texts):
        raise RuntimeError("together")
    (text, *_) = texts
    if text == "raise":
        raise KeyError("no such element")
    if text == "hang":
        while True:
            pass
    if text == "eat":
        return [len(bytearray(8 << 30))]
    if text == "die":
        os._exit(1)
    return [None if t == "none" else len(t) + t_["Pd"] for t, t_ in zip(texts, targets)]

def slow(texts, targets):
    began = time.process_time()
    while time.process_time() - began < 0.3 * len(texts):
        pass  # holds Python's lock of its process
    return [os.getpid()] * len(texts)
"""


def test_a_reward_of_ones_own_costs_its_answer_and_no_more(tmp_path: Path) -> None:
    """It may raise, hang in a loop, ask for more memory than it may have, or take its process down."""
    (tmp_path / "own.py").write_text(OWN)
    own = OwnReward(f"{tmp_path / 'own.py'}:score", 2, timeout=1.0, memory=2.0)
    texts = ["a", "raise", "bb", "hang", "none", "eat", "ccc", "die", "dddd"]
    try:
        found = collect(own, texts, timeout=100.0)
        again = collect(own, ["x", "yy"], timeout=100.0)
    finally:
        own.close()
    np.testing.assert_array_equal(found.total, [2, np.nan, 3, np.nan, np.nan, np.nan, 4, np.nan, 5])
    said = {texts[i]: problem for i, problem in found.problems.items()}
    assert said.keys() == {"raise", "hang", "none", "eat", "die"}
    assert "KeyError" in said["raise"] and said["hang"] == "no reward within 1 s"
    assert "MemoryError" in said["eat"] and "ended" in said["die"]
    assert again.total.tolist() == [2.0, 3.0]


def test_decoding_goes_on_while_python_computes_a_reward(tmp_path: Path) -> None:
    """None of a reward's 0.6 s are spent in this process, whose lock the decoding loop needs."""
    (tmp_path / "own.py").write_text(OWN)
    own = OwnReward(f"{tmp_path / 'own.py'}:slow", 2, timeout=30.0)
    scoring = Scoring(own, [{"Pd": 1}] * 2, 60.0)
    everyone, mine = time.process_time(), time.thread_time()
    scoring.take(0, "a")
    scoring.take(1, "b")
    while len(scoring._settled) < 2 and time.thread_time() - mine < 60:
        sum(range(1000))  # decodes
    others = time.process_time() - everyone - (time.thread_time() - mine)
    found = scoring.finish()
    own.close()
    assert (found.total > 0).all() and (found.total != os.getpid()).all()
    assert others < 0.2


def test_a_reward_that_cannot_be_loaded_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import absent_package")
    with pytest.raises(ValueError, match=r"own\.py:score: ModuleNotFoundError: No module named 'absent"):
        OwnReward(f"{tmp_path / 'own.py'}:score", 1, 1.0)
