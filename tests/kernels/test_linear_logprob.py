"""Log-probabilities of target tokens against log_softmax in float64: values, gradients, chunks, temperature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catmllm_kernels.linear_logprob import linear_logprob


def problem(
    tokens: int, width: int = 16, vocabulary: int = 37, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def oracle(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and gradients of the weighted sum in float64, by torch's own log_softmax."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    value = torch.log_softmax(h @ w.T / temperature, -1)[torch.arange(len(targets)), targets]
    (value * scale.double()).sum().backward()
    assert h.grad is not None and w.grad is not None
    return value.detach(), h.grad, w.grad


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 33),
    vocabulary=st.integers(2, 70),
    chunk=st.integers(1, 50),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_against_float64(
    tokens: int, width: int, vocabulary: int, chunk: int, temperature: float, seed: int
) -> None:
    hidden, weight, targets = problem(tokens, width, vocabulary, seed)
    scale = torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = linear_logprob(h, w, targets, temperature, max_logits=chunk * vocabulary)
    assert ours.shape == (tokens,) and ours.dtype == torch.float32
    assert (ours <= 1e-5).all()
    (ours * scale).sum().backward()
    value, dh, dw = oracle(hidden, weight, targets, temperature, scale)
    torch.testing.assert_close(ours.detach().double(), value, rtol=1e-4, atol=1e-4)
    assert h.grad is not None and w.grad is not None
    torch.testing.assert_close(h.grad.double(), dh, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(w.grad.double(), dw, rtol=1e-4, atol=2e-4)


def test_chunks_change_nothing() -> None:
    hidden, weight, targets = problem(23)
    results = []
    for chunk in (4096, 23, 22, 8, 1):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = linear_logprob(h, w, targets, 0.7, max_logits=chunk * 37 + 5)
        value.square().sum().backward()
        assert h.grad is not None and w.grad is not None
        results.append((value.detach(), h.grad, w.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums in another order


def test_float64_stays_float64() -> None:
    hidden, weight, targets = problem(5, dtype=torch.float64)
    value, _, _ = oracle(hidden, weight, targets, 1.3, torch.ones(5))
    ours = linear_logprob(hidden, weight, targets, 1.3)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets, 1.3, max_logits=80), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
def test_half_precision_has_a_float32_softmax(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = problem(20, dtype=dtype)
    ours = linear_logprob(hidden, weight, targets)
    assert ours.dtype == torch.float32
    value, _, _ = oracle(hidden, weight, targets, 1.0, torch.ones(20))
    torch.testing.assert_close(ours.double(), value, rtol=tolerance, atol=tolerance)
    # all else equal the probabilities of one row add up to one, to float32 and not to half precision
    row = hidden[:1].expand(weight.shape[0], -1)
    total = linear_logprob(row, weight, torch.arange(weight.shape[0])).double().exp().sum()
    assert abs(float(total) - 1) < 1e-5


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem(8)
    ours = linear_logprob(hidden * 1e4, weight, targets)
    assert ours.isfinite().all() and (ours <= 0).all()


def test_no_token_is_no_value() -> None:
    hidden, weight, targets = problem(0)
    assert linear_logprob(hidden, weight, targets).shape == (0,)


def test_never_more_logits_at_a_time_than_allowed() -> None:
    """What autograd keeps of 64 tokens by 512 words: a few chunks of 8 rows, not the whole product."""
    hidden, weight, targets = problem(64, vocabulary=512)
    sizes: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets, max_logits=8 * 512)
    assert sizes and max(sizes) <= weight.numel()


def test_a_limit_below_one_row_still_works() -> None:
    hidden, weight, targets = problem(4)
    torch.testing.assert_close(
        linear_logprob(hidden, weight, targets, max_logits=1), linear_logprob(hidden, weight, targets)
    )
