"""Log-probabilities among allowed words against float64 by definition, values and gradients."""

from __future__ import annotations

import pytest
import torch

from catmllm_kernels.linear_logprob import Allowed, allowed_logprobs

T, V, H = 37, 300, 24


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Allowed]:
    """hidden, weight, reference, targets, sets: some of a word, some of many."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, reference = (
        torch.randn(n, H, generator=g).to(dtype) / (1 if n == T else 4) for n in (T, V, V)
    )
    different = [torch.randperm(V, generator=g)[:n].sort().values for n in (1, 2, 7, 64, 200)]
    sets = [different[k % 5] for k in range(T)]
    targets = torch.stack([s[int(torch.randint(len(s), (1,), generator=g))] for s in sets])
    return hidden, weight, reference, targets, Allowed.join(sets)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.6e-2)])
def test_one_pass_equals_the_definition(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    """Logits of up to 4 are rounded once in bfloat16, to 2^-8 of them; gradients of log-probabilities are at
    most 1 and are rounded as often."""
    hidden, weight, reference, targets, allowed = case(dtype)
    factor = torch.linspace(-1, 1, T)

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        h, w, r = (x.clone().requires_grad_() for x in inputs)
        found = allowed_logprobs(h, w, targets, allowed, temperature, True, r)
        (found.logprob * factor.to(found.logprob.dtype)).sum().backward()
        assert found.entropy is not None and found.reference is not None and r.grad is None
        assert h.grad is not None and w.grad is not None
        return [found.logprob.detach(), found.entropy, found.reference, h.grad, w.grad]

    ours = run(hidden, weight, reference)
    theirs = run(*(x.double() for x in (hidden, weight, reference)))
    for a, b in zip(ours, theirs):
        scale = max(1.0, float(b.abs().max()))
        assert float((a.double() - b).abs().max()) < tolerance * scale / temperature


def test_by_definition_in_float64() -> None:
    hidden, weight, _, targets, allowed = case(torch.float64)
    found = allowed_logprobs(hidden, weight, targets, allowed, 0.7, True)
    assert found.entropy is not None
    for k in range(T):
        words = allowed.columns[allowed.sets[allowed.of[k]]]
        known = (hidden[k] @ weight[words].T / 0.7).log_softmax(0)
        torch.testing.assert_close(found.logprob[k], known[words == targets[k]][0])
        torch.testing.assert_close(found.entropy[k], -(known.exp() * known).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_is_no_value(dtype: torch.dtype) -> None:
    hidden, weight, reference, targets, _ = case(dtype)
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    found = allowed_logprobs(hidden, weight, targets[:0], Allowed.join([]), 0.7, True, reference)
    assert all(x is not None and x.shape == (0,) for x in found)
    found.logprob.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_word_that_may_not_come_is_an_error() -> None:
    hidden, weight, _, targets, allowed = case(torch.float32)
    targets[2] = next(
        w for w in range(V) if not bool((allowed.columns[allowed.sets[allowed.of[2]]] == w).any())
    )
    with pytest.raises(ValueError, match="of token 2 is none of the words"):
        allowed_logprobs(hidden, weight, targets, allowed)
