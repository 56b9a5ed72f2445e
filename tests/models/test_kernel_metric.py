"""The learned kernel: its gradient beside autograd's through fits without a fold, and what it gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from catmllm.models import kernel_metric
from catmllm.models.catalytic_mllm import RATE
from catmllm.models.kernel_metric import BEGIN, SMOOTH, Kernel, learn
from catmllm.models.kernel_prior import KernelPrior
from catmllm.structure.descriptors import SIZE, fold_of, known, surroundings
from catmllm.structure.system import System


def drawn(n: int, folds: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, torch.Tensor]:
    """A positive matrix [n, n], energies [n], folds [n] and what is asked [n]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    kernel = np.exp(-((x[:, None] - x) ** 2).sum(2) / 8)
    asked = torch.from_numpy(rng.random(n) < 0.7)
    return torch.from_numpy(kernel), torch.from_numpy(rng.normal(size=n)), rng.integers(0, folds, n), asked


@pytest.mark.parametrize("folds", [2, 5])
def test_the_gradient_is_that_of_fits_without_each_fold(folds: int) -> None:
    kernel, wanted, fold, asked = drawn(40, folds)
    kernel.requires_grad_()
    strength = torch.tensor(1e-2, dtype=torch.float64, requires_grad=True)
    terms = []
    for f in range(folds):
        seen, rows = (
            torch.from_numpy(np.flatnonzero(fold != f)),
            torch.from_numpy(np.flatnonzero(fold == f)),
        )
        ridge = kernel[seen][:, seen] + strength * torch.eye(len(seen), dtype=torch.float64)
        errors = wanted[rows] - kernel[rows][:, seen] @ torch.linalg.solve(ridge, wanted[seen])
        terms.append(torch.sqrt(errors**2 + SMOOTH**2)[asked[rows]])
    torch.cat(terms).mean().backward()  # type: ignore[no-untyped-call]
    found = kernel_metric._gradient(kernel.detach(), 1e-2, wanted, fold, asked)
    assert kernel.grad is not None and strength.grad is not None
    # symmetric kernels alone are ever asked for: either triangle may hold what belongs to both
    expected = kernel.grad + kernel.grad.T
    torch.testing.assert_close(found + found.T, expected, rtol=1e-8, atol=1e-9 * expected.abs().max().item())
    torch.testing.assert_close(found.trace(), strength.grad, rtol=1e-8, atol=1e-12)


def test_with_one_fold_nothing_can_be_learned() -> None:
    kernel, wanted, _, asked = drawn(20, 2)
    found = kernel_metric._gradient(kernel, 1e-2, wanted, np.zeros(20, dtype=np.int64), asked)
    assert found.abs().max() < 1e-9


def learned_from(n: int, size: int, energies: torch.Tensor, steps: int | None = None) -> Kernel:
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(n, size)))
    names, unrelaxed = torch.arange(n) % 2, torch.zeros(n, dtype=torch.bool)
    return learn(0.04, x, names, unrelaxed, energies, np.arange(n) % 5, torch.ones(n, dtype=torch.bool))


def test_what_energies_depend_on_counts() -> None:
    """Of eight numbers, the two that energies are made of; that there are two adsorbates tells nothing."""
    x = np.random.default_rng(3).normal(size=(200, 8))
    kernel = learned_from(200, 8, torch.from_numpy(np.sin(2 * x[:, 2]) + x[:, 5] ** 2))
    first = set(np.argsort(kernel.metric.numpy())[::-1][:2].tolist())
    assert first == {2, 5} and kernel.metric.sort().values[-2:].min() > 10 * kernel.metric.sort().values[-3]
    assert kernel.shared > BEGIN[0] + 0.1


@pytest.mark.parametrize("n", [1, 3])
def test_equal_energies_teach_nothing_and_nothing_fails(n: int) -> None:
    kernel = learned_from(n, 4, torch.full((n,), 0.0, dtype=torch.float64))
    assert torch.isfinite(kernel.metric).all()
    torch.testing.assert_close(kernel.metric, torch.full((4,), 0.06, dtype=torch.float64))


def test_structures_twice_in_training_do_no_harm(train_systems: list[System]) -> None:
    """A strength that falls to its floor still has an inverse."""
    some = train_systems[:40] * 2
    prior = KernelPrior(SIZE, RATE)
    local, energies = np.array([surroundings(s) for s in some]), np.array([s.known_energy for s in some])
    prior.fit(local, known(some), np.array([fold_of(s) for s in some]), energies)
    assert torch.isfinite(prior.coefficients).all()


def test_it_errs_less_on_new_pairs(train_systems: list[System], monkeypatch: pytest.MonkeyPatch) -> None:
    """Than with all descriptors alike, at the same strength or a better one."""
    new = [s for s in train_systems if fold_of(s) == 0]
    some = [s for s in train_systems if fold_of(s) != 0][::2]
    local = {id(s): surroundings(s) for s in (*some, *new)}
    truth = np.array([s.known_energy for s in new])

    def error(steps: int, strength: float) -> float:
        monkeypatch.setattr(kernel_metric, "STEPS", steps)
        monkeypatch.setattr(kernel_metric, "BEGIN", (0.6, 0.9, strength))
        prior = KernelPrior(SIZE, RATE).eval()
        folds, energies = np.array([fold_of(s) for s in some]), np.array([s.known_energy for s in some])
        prior.fit(np.array([local[id(s)] for s in some]), known(some), folds, energies)
        asked = torch.tensor(np.array([local[id(s)] for s in new]), dtype=torch.float32)
        return float(np.abs(prior(asked, torch.from_numpy(known(new))).double().numpy() - truth).mean())

    steps = kernel_metric.STEPS
    alike = min(error(0, strength) for strength in (2e-4, 2e-3, 2e-2))
    assert error(steps, 2e-3) < 0.95 * alike
