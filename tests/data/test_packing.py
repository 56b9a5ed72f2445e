"""Packs: every sample once, none over the budget, at most 2 % of the tokens wasted,
and each pack a fair mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catmllm.data.packing import evenly, pack


@given(lengths=st.lists(st.integers(1, 50), max_size=120), budget=st.integers(50, 300))
def test_every_sample_is_in_one_pack_and_no_pack_is_over(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(i for group in packs for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= budget for group in packs)
    assert all(group == sorted(group) for group in packs) and packs == pack(lengths, budget)
    # any two packs of best fit hold more than one budget: never twice as many as the tokens ask for
    assert len(packs) <= 2 * -(-sum(lengths) // budget)


def tiny(rng: np.random.Generator, n: int) -> np.ndarray:
    """Shipped slabs: energies of about 54 tokens, CIFs of about 173."""
    short, long = rng.normal(54, 10, n).clip(20, 90), rng.normal(173, 6, n).clip(140, 185)
    return np.where(rng.random(n) < 0.7, short, long).astype(int)


def oc20(rng: np.random.Generator, n: int) -> np.ndarray:
    """Half energies, half CIFs of 15 to 230 atoms, seven tokens an atom."""
    atoms = rng.lognormal(np.log(70), 0.45, n).clip(15, 230)
    short = rng.normal(180, 50, n).clip(60, 400)
    return np.where(rng.random(n) < 0.5, short, 130 + 7 * atoms).astype(int)


@pytest.mark.parametrize(("draw", "budget"), [(tiny, 2048), (oc20, 4096), (oc20, 16384)])
def test_waste_and_mixture(draw, budget: int) -> None:
    rng = np.random.default_rng(0)
    size = round(64 * budget / draw(rng, 2000).mean())
    held, used, spreads = 0, 0, []
    for _ in range(10):
        lengths = draw(rng, size)
        packs = pack(lengths.tolist(), budget)
        held += len(packs) * budget
        used += int(lengths.sum())
        counts = np.array([len(group) for group in packs])
        middle = np.sort(counts)[1:]  # the emptiest pack may hold what was left
        spreads.append(middle.std() / middle.mean())
    assert 1 - used / held < 0.02
    assert np.mean(spreads) < 0.3  # best fit in decreasing order: 0.55 to 0.75


def test_a_sample_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="51 tokens does not fit a budget of 50"):
        pack([3, 51], 50)
    assert pack([], 50) == [] and pack([50, 50], 50) == [[0], [1]]


@given(costs=st.lists(st.integers(1, 500), max_size=120), n=st.integers(1, 12))
def test_even_groups_have_equally_many_of_near_equal_cost(costs: list[int], n: int) -> None:
    groups = evenly(costs, n)
    assert sorted(i for g in groups for i in g) == list(range(len(costs))) and len(groups) == n
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    if len(costs) % n == 0 and costs:
        loads = [sum(costs[i] for i in g) for g in groups]
        assert max(loads) - min(loads) <= max(costs) - min(costs)
