"""The draw of a token against transformers' top-p distribution, and the noise it is made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TopPLogitsWarper

from catmllm.sample.nucleus import sample_nucleus, uniforms


def warped(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The distribution that transformers samples from."""
    processors = LogitsProcessorList([TopPLogitsWarper(top_p=top_p)]) if top_p < 1 else LogitsProcessorList()
    nothing: Any = torch.zeros(len(logits), 1, dtype=torch.int64)
    return processors(nothing, logits.clone()).softmax(-1)


def random_logits(rows: int, tokens: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("tokens", [40, 300])
def test_one_try_is_the_inverse_of_transformers_distribution(top_p: float, scale: float, tokens: int) -> None:
    """With a single column of noise the draw is exact: equally spaced
    noise gives each token its share to 1 / n."""
    logits, n = random_logits(3, tokens, scale), 20_000
    noise = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()[:, None]
    for row, expected in zip(logits, warped(logits, top_p)):
        mass = (row - row.max()).exp().expand(n, -1)
        ours = torch.bincount(sample_nucleus(mass, top_p, noise), minlength=tokens) / n
        assert (ours - expected).abs().max() < 2.5 / n
        assert not ours[expected == 0].any()


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("scale", [0.2, 2.0])
@pytest.mark.parametrize("tries", [2, 5])
def test_throwing_draws_away_gives_transformers_distribution(top_p: float, scale: float, tries: int) -> None:
    """Chi-square of many draws: the kept tries and the sorted rest together."""
    n, tokens = 60_000, 150
    logits = random_logits(1, tokens, scale, seed=4)
    expected = warped(logits, top_p)[0].double().numpy() * n
    mass = (logits - logits.max()).exp().expand(n, -1)
    noise = torch.rand(n, tries, generator=torch.Generator().manual_seed(5))
    counts = np.bincount(sample_nucleus(mass, top_p, noise).numpy(), minlength=tokens)
    assert not counts[expected == 0].any()
    cells = expected > 0
    freedom = cells.sum() - 1
    chi_square = float(((counts - expected)[cells] ** 2 / expected[cells]).sum())
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


@pytest.mark.parametrize("tries", [1, 3])
def test_no_token_outside_the_nucleus_whatever_the_noise(tries: int) -> None:
    logits = random_logits(500, 60, 2.0, seed=1)
    allowed = warped(logits, 0.7) > 0
    mass = (logits - logits.amax(1, keepdim=True)).exp()
    for value in (0.0, 1e-7, 0.5, 1 - 2**-24):
        token = sample_nucleus(mass, 0.7, torch.full((500, tries), value))
        assert allowed.gather(1, token[:, None]).all()


@pytest.mark.parametrize("tokens", [6, 64, 65, 200])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("tries", [1, 3])
def test_extreme_noise_takes_possible_tokens(tokens: int, top_p: float, tries: int) -> None:
    """Noise 0 must not take an impossible first token, nor the largest noise fall off the end."""
    mass = torch.zeros(1, tokens)
    mass[0, 2], mass[0, 4] = 0.3, 0.3
    for value in (0.0, 1 - 2**-24):
        assert int(sample_nucleus(mass, top_p, torch.full((1, tries), value))) in (2, 4)


def test_a_tiny_top_p_is_greedy() -> None:
    logits = random_logits(50, 3000, 0.1, seed=2)
    noise = torch.rand(50, 5, generator=torch.Generator().manual_seed(3))
    assert sample_nucleus(logits.exp(), 1e-6, noise).tolist() == logits.argmax(1).tolist()


def test_noise_is_uniform_and_independent() -> None:
    rows, steps = torch.arange(400).repeat_interleave(50), torch.arange(50).repeat(400)
    noise = uniforms(12345, rows, steps, 5).double()
    assert float(noise.min()) >= 0 and float(noise.max()) < 1
    n = noise.numel()
    counts = torch.histc(noise.flatten(), 100, 0, 1)
    assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 99 + 5 * (2 * 99) ** 0.5
    # neighbouring answers, tokens, tries and keys are uncorrelated
    table = noise.view(400, 50, 5) - 0.5
    other = uniforms(12346, rows, steps, 5).double().view(400, 50, 5) - 0.5
    for a, b in (
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (table[..., 1:], table[..., :-1]),
        (table, other),
    ):
        assert abs(float((a * b).mean())) * 12 < 5 / a.numel() ** 0.5


def test_noise_is_a_function_of_what_it_is_for() -> None:
    row, step = torch.tensor([7, 3, 9]), torch.tensor([0, 11, 4])
    together = uniforms(5, row, step, 4)
    for i in range(3):
        assert uniforms(5, row[i : i + 1], step[i : i + 1], 4).equal(together[i : i + 1])
