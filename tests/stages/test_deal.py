"""Answers dealt to passes: every one once, none above the budget, all of near equal cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from catmllm.stages.deal import cut

groups = st.lists(
    st.tuples(st.integers(0, 90), st.lists(st.integers(1, 300), min_size=1, max_size=9)), max_size=20
)


def costs(
    passes: list[list[list[tuple[int, int]]]], heads: list[int], lengths: list[list[int]]
) -> np.ndarray:
    """[passes, ranks] tokens."""
    return np.array(
        [
            [sum(heads[g] for g in {g for g, _ in b}) + sum(lengths[g][i] for g, i in b) for b in one]
            for one in passes
        ]
    )


@given(made=groups, ranks=st.integers(1, 9), budget=st.integers(50, 2000))
def test_every_answer_is_read_once_and_the_budget_holds(
    made: list[tuple[int, list[int]]], ranks: int, budget: int
) -> None:
    heads, lengths = [h for h, _ in made], [x for _, x in made]
    passes = cut(heads, lengths, ranks, budget)
    assert all(len(one) == ranks for one in passes)
    read = sorted(pair for one in passes for bin_ in one for pair in bin_)
    assert read == [(g, i) for g, x in enumerate(lengths) for i in range(len(x))]
    longest = max((h + n for h, x in made for n in x), default=0)
    assert costs(passes, heads, lengths).max(initial=0) <= max(budget, longest)


def test_ranks_wait_for_nobody() -> None:
    """Systems of 20 to 220 atoms, 7 tokens an atom, of which the eight answers are equally long: the worst
    case, since then no short answer is left to make ends meet."""
    rng = np.random.default_rng(0)
    for ranks in (2, 8, 64):
        atoms = rng.integers(20, 220, 8 * ranks)
        lengths = [[int(7 * n + 120)] * 8 for n in atoms]
        load = costs(cut([80] * len(lengths), lengths, ranks, 16_384), [80] * len(lengths), lengths)
        assert load.max(1).sum() / load.mean(1).sum() < 1.02
        assert load.sum() < 1.01 * sum(80 + sum(x) for x in lengths)  # hardly a prompt is read twice
