"""The exemplar pool: what stays, in what order, and how it is drawn from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from catmllm.design.exemplar_pool import Candidate, ExemplarPool


def candidate(key: str, reward: float, feasible: bool = True, iteration: int = 0) -> Candidate:
    return Candidate(f"text of {key}", reward, -1.0, 5.0, None, feasible, key, iteration)


candidates = st.builds(
    candidate,
    st.sampled_from("abcdefgh"),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.booleans(),
    st.integers(0, 3),
)


def test_the_best_k_are_kept_best_first() -> None:
    pool = ExemplarPool(3)
    pool.add([candidate(k, r) for k, r in zip("abcde", (0.1, 0.9, 0.5, 0.7, 0.3))])
    assert [c.key for c in pool.members] == ["b", "d", "c"]
    pool.add([candidate("f", 0.6), candidate("g", 0.01)])
    assert [c.key for c in pool.members] == ["b", "d", "f"]
    assert pool.best is pool.members[0] and pool.feasible


def test_hard_constraints_come_before_reward() -> None:
    pool = ExemplarPool(3)
    pool.add([candidate("a", 0.9, feasible=False), candidate("b", 0.8, feasible=False)])
    assert [c.key for c in pool.members] == ["a", "b"] and not pool.feasible
    pool.add([candidate("c", 0.1)])
    assert [c.key for c in pool.members] == ["c"] and pool.feasible
    pool.add([candidate("d", 1.0, feasible=False)])
    assert [c.key for c in pool.members] == ["c"]


def test_one_structure_enters_once_with_its_best_reward() -> None:
    pool = ExemplarPool(5)
    pool.add([candidate("a", 0.2), candidate("a", 0.6, iteration=1), candidate("a", 0.4, iteration=2)])
    assert [(c.key, c.reward) for c in pool.members] == [("a", 0.6)]
    pool.add([candidate("a", 0.6, iteration=3)])
    assert pool.members[0].iteration == 1  # at equal reward the one that was there


def test_an_empty_pool_draws_nothing() -> None:
    pool = ExemplarPool(2)
    assert pool.draw(np.random.default_rng(0)) is None and pool.best is None and not pool.feasible
    pool.add([])
    assert pool.members == []


def test_the_draw_is_uniform() -> None:
    pool = ExemplarPool(4)
    pool.add([candidate(k, r) for k, r in zip("abcd", (1.0, 0.9, 0.2, 0.1))])
    rng = np.random.default_rng(0)
    n = 4000
    counts = Counter(pool.draw(rng).key for _ in range(n))  # type: ignore[union-attr]
    chi_square = sum((counts[k] - n / 4) ** 2 / (n / 4) for k in "abcd")
    assert chi_square < 16.3  # 0.1 % of uniform draws, 3 degrees of freedom
    assert pool.draw(np.random.default_rng(7)) is pool.draw(np.random.default_rng(7))


@given(batches=st.lists(st.lists(candidates, max_size=6), max_size=5), size=st.integers(1, 4))
def test_the_pool_is_the_top_of_everything_seen(batches: list[list[Candidate]], size: int) -> None:
    pool = ExemplarPool(size)
    for batch in batches:
        pool.add(batch)
    keys = [c.key for c in pool.members]
    assert len(keys) <= size and len(set(keys)) == len(keys)
    assert [c.reward for c in pool.members] == sorted((c.reward for c in pool.members), reverse=True)
    seen = [c for batch in batches for c in batch]
    assert bool(pool.members) == bool(seen)
    if any(c.feasible for c in seen):
        assert pool.feasible == pool.members[0].feasible


@given(batch=st.lists(candidates, min_size=1, max_size=8), size=st.integers(1, 4))
def test_one_batch_against_the_definition(batch: list[Candidate], size: int) -> None:
    """Feasible ones if there are any, each structure by its best, the best `size` rewards."""
    pool = ExemplarPool(size)
    pool.add(batch)
    eligible = [c for c in batch if c.feasible] or batch
    best: dict[str, float] = {}
    for c in eligible:
        best[c.key] = max(best.get(c.key, -1.0), c.reward)
    assert [c.reward for c in pool.members] == sorted(best.values(), reverse=True)[:size]
    assert all(c.feasible == any(d.feasible for d in batch) for c in pool.members)


def test_json_gives_the_candidate_back() -> None:
    c = replace(candidate("a", 0.3, iteration=4), error=0.2)  # a NaN equals nothing
    assert Candidate(**c.to_json()) == c
