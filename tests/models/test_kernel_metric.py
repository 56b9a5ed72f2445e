"""The learned kernel: its gradient beside autograd's through fits without a fold, and what it gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from catmllm.models import kernel_metric
from catmllm.models.catalytic_mllm import RATE
from catmllm.models.kernel_metric import BEGIN, FLOOR, PRIOR, SMOOTH, Shown, learn
from catmllm.models.kernel_prior import KernelPrior
from catmllm.structure.descriptors import SIZE, fold_of, known, surroundings
from catmllm.structure.system import System


def drawn(n: int, folds: int, size: int = 4) -> Shown:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, size))
    kinds, names = rng.random(n) < 0.5, rng.integers(0, 3, n)
    return Shown(x, names, kinds, rng.normal(size=n), rng.integers(0, folds, n), rng.random(n) < 0.7)


def loss(shown: Shown, free: torch.Tensor) -> torch.Tensor:
    """What is made smaller, by a solution for each fold in torch."""
    x, wanted = torch.from_numpy(shown.x), torch.from_numpy(shown.wanted)
    size = x.shape[1]
    metric = 6 * 0.04 / size * torch.exp(free[:size])
    shared, related = torch.sigmoid(
        torch.logit(torch.tensor(BEGIN[:2], dtype=torch.float64)) + free[size : size + 2]
    )
    strength = FLOOR + (BEGIN[2] - FLOOR) * torch.exp(free[-1])
    # the smallest part keeps the root's derivative finite where a structure meets itself
    reach = (((x[:, None] - x) ** 2 * metric).sum(2) + 1e-30).sqrt()
    kernel = (1 + reach) * torch.exp(-reach)
    kernel = torch.where(
        torch.from_numpy(shown.adsorbates[:, None] == shown.adsorbates), kernel, shared * kernel
    )
    kernel = torch.where(
        torch.from_numpy(shown.unrelaxed[:, None] == shown.unrelaxed), kernel, related * kernel
    )
    terms = []
    for fold in np.unique(shown.folds):
        seen, rows = (
            torch.from_numpy(np.flatnonzero(part)) for part in (shown.folds != fold, shown.folds == fold)
        )
        ridge = kernel[seen][:, seen] + strength * torch.eye(len(seen), dtype=torch.float64)
        errors = wanted[rows] - kernel[rows][:, seen] @ torch.linalg.solve(ridge, wanted[seen])
        terms.append(torch.sqrt(errors**2 + SMOOTH**2)[torch.from_numpy(shown.asked)[rows]])
    return torch.cat(terms).mean() + PRIOR / len(x) * (free[:size] ** 2).sum()


@pytest.mark.parametrize("folds", [2, 5])
def test_the_gradient_is_that_of_fits_without_each_fold(folds: int) -> None:
    """In float64, of all parameters, away from where they begin."""
    shown = drawn(60, folds)
    free = np.random.default_rng(1).normal(size=7) * 0.5
    by = torch.tensor(free, requires_grad=True)
    loss(shown, by).backward()  # type: ignore[no-untyped-call]
    assert by.grad is not None
    found = kernel_metric._slope(0.04, free, shown)
    np.testing.assert_allclose(found, by.grad.numpy(), rtol=1e-9, atol=1e-11)


def test_with_one_fold_nothing_can_be_learned() -> None:
    found = kernel_metric._slope(0.04, np.zeros(7), drawn(20, 1))
    assert np.abs(found).max() < 1e-9


def test_what_energies_depend_on_counts() -> None:
    """Of eight numbers, the two that energies are made of; that there are three adsorbates tells nothing."""
    shown = drawn(200, 5, 8)
    energies = np.sin(2 * shown.x[:, 2]) + shown.x[:, 5] ** 2
    kernel = learn(0.04, shown._replace(wanted=energies, asked=np.ones(200, dtype=bool)))
    order = np.argsort(kernel.metric)
    assert set(order[-2:].tolist()) == {2, 5} and kernel.metric[order[-2]] > 10 * kernel.metric[order[-3]]
    assert kernel.shared > BEGIN[0] + 0.1 and kernel.related > BEGIN[1]


@pytest.mark.parametrize("n", [1, 3])
def test_equal_energies_teach_nothing_and_nothing_fails(n: int) -> None:
    kernel = learn(0.04, drawn(n, 2)._replace(wanted=np.zeros(n)))
    np.testing.assert_allclose(kernel.metric, 0.06)


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
