"""Attention of growing answers to their caches: torch's own in float64, within what float32 rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm_kernels.varlen_attention.cached import cached_attention, fits

UNIT = 2.0**-24
Rows = list[list[tuple[int, int]]]  # of each prompt: own tokens of a row, and how many of the newest ask


def problem(prompts: list[int], rows: Rows, heads: int, kv: int, width: int, slots: int = 40) -> tuple:
    """The arguments in float64, with nan wherever no query may look."""
    generator = torch.Generator().manual_seed(sum(prompts) + heads * width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    flat = [row for of_prompt in rows for row in of_prompt]
    bounds = np.cumsum([0, *(asking for _, asking in flat)])
    longest = max(prompts, default=0) + 1
    prompt = [normal(len(prompts), kv, longest, width) for _ in range(2)]
    own = [normal(len(flat), kv, slots, width) for _ in range(2)]
    for cache in prompt:
        for g, n in enumerate(prompts):
            cache[g, :, n:] = torch.nan
    for cache in own:
        for r, (n, _) in enumerate(flat):
            cache[r, :, n:] = torch.nan
    group = np.cumsum([0, *(len(of_prompt) for of_prompt in rows)])
    before = np.array([n - asking for n, asking in flat], dtype=np.int64)
    return normal(bounds[-1], heads, width), prompt, own, group, np.array(prompts), bounds, before


def defined(query, prompt, own, group, length, bounds, before):  # type: ignore[no-untyped-def]
    """torch's attention for each query alone, and how far float32 may be from each of its numbers."""
    out, reach = torch.zeros_like(query), torch.zeros_like(query)
    share, width = query.shape[1] // prompt[0].shape[1], query.shape[2]
    for g, n in enumerate(length):
        for r in range(group[g], group[g + 1]):
            for t in range(bounds[r], bounds[r + 1]):
                seen = before[r] + t - bounds[r] + 1
                key, value = (torch.cat([p[g, :, :n], o[r, :, :seen]], 1) for p, o in zip(prompt, own))
                key, value = (x.repeat_interleave(share, 0) for x in (key, value))
                q = query[t][:, None]
                out[t] = F.scaled_dot_product_attention(q, key, value)[:, 0]
                # A score is a sum of `width` products, exp's error is relative to its argument's, and the
                # weights and the mix are sums over all keys: each term rounds at its size.
                score = (q.abs() @ key.abs().transpose(1, 2) * width**-0.5).amax((1, 2))
                factor = 2 * (width + 2) * score + 3 * key.shape[1] + 10
                reach[t] = UNIT * factor[:, None] * value.abs().amax(1)
    return out, reach


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=4),
        ),
        max_size=4,
    ),
    st.sampled_from([(1, 1, 1), (6, 2, 32), (3, 1, 37), (4, 4, 16), (28, 4, 128)]),
    st.sampled_from([1, 2]),
)
def test_it_is_torchs_own(groups: list, sizes: tuple[int, int, int], threads: int) -> None:
    prompts = [n for n, _ in groups]
    rows = [[(own, min(own, asking)) for own, asking in of_prompt] for _, of_prompt in groups]
    query, prompt, own, *numbers = problem(prompts, rows, *sizes)
    expected, reach = defined(query, prompt, own, *numbers)
    single = [tuple(x.float() for x in pair) for pair in (prompt, own)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = cached_attention(query.float(), *single, *numbers)
    finally:
        torch.set_num_threads(before)
    assert bool(((found.double() - expected).abs() <= reach).all())


def test_what_does_not_agree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    query, prompt, own, group, length, bounds, before = problem(
        [5, 3], [[(4, 1), (9, 2)], [(6, 6)]], 6, 2, 32
    )
    p, o = (tuple(x.float() for x in pair) for pair in (prompt, own))
    assert fits(query.float()) and not fits(query) and not fits(query.float().to("meta"))
    monkeypatch.setenv("CATMLLM_KERNELS", "reference")
    assert not fits(query.float())
    good = (query, p, o, group, length, bounds, before)
    assert cached_attention(*good).isfinite().all()
    for place, wrong, error in (
        (1, prompt, "contiguous and float32"),
        (1, tuple(x[..., :16].contiguous() for x in p), "of queries"),
        (2, (o[0], o[1][:, :, :20].contiguous()), "other shapes"),
        (5, bounds + 1, "bounds do not agree"),
        (3, group[:-1], "bounds do not agree"),
        (2, tuple(x[:2] for x in o), "the caches have 2, 2"),
    ):
        with pytest.raises(ValueError, match=error):
            cached_attention(*good[:place], wrong, *good[place + 1 :])
    for place, wrong, error in (
        (4, np.array([5, 7]), "prompt is longer"),
        (6, np.array([3, 39, 0]), "row is longer"),
        (6, np.array([-1, 7, 0]), "row is longer"),
        (3, np.array([0, 3, 2]), "cover all rows"),
    ):
        with pytest.raises(RuntimeError, match=error):
            cached_attention(*good[:place], wrong, *good[place + 1 :])
