"""A kernel of descriptors whose measure of distance is learned, for the regression in `kernel_prior`.

By default all descriptors count alike, though most of two hundred say little of an energy. Here each has a
weight of its own, and these, how much two adsorbates or two kinds of structures tell of one another, and the
ridge's strength take the values that predict (bulk, Miller index) pairs best which a fit has not seen.

What is made smaller is the mean of sqrt(e² + `SMOOTH`²) of the errors e without their fold, plus `PRIOR`
times the squared logarithms of the weights' changes over the number of systems. Each step takes `SOME`
systems. With the inverse P of kernel and strength, and coefficients c = P y, the errors of a fold b are
(P_bb)⁻¹ c_b: one factorisation serves all folds, and the gradient by the kernel has as many columns as there
are folds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

SOME = 1200  # systems a step
STEPS, RATE = 60, 0.1  # of Adam; the rate falls to 0
PRIOR = 0.05  # of 0.01, 0.05, 0.2 and 0.8 the errors of validation systems fall little below this one
SMOOTH = 0.07  # of the energies' deviation: errors below this count by their squares
FLOOR = 1e-4  # of the strength: with less, float32 would not carry the coefficients
NEAREST = 1e-12  # squared distance at which two structures are one
BEGIN = (0.6, 0.9, 2e-3)  # `shared`, `related` and strength before any step


class Kernel(NamedTuple):
    """Float64 tensors."""

    metric: torch.Tensor  # [D], of the squared differences of descriptors
    shared: torch.Tensor  # [], kernel of two adsorbates
    related: torch.Tensor  # [], kernel of a relaxed and an unrelaxed structure
    strength: torch.Tensor  # [], of the ridge

    def __call__(self, x: torch.Tensor, adsorbates: torch.Tensor, unrelaxed: torch.Tensor) -> torch.Tensor:
        """Kernel [n, n] of scaled descriptors [n, D], adsorbates [n] and whether unrelaxed [n], without the
        ridge."""
        kernel = matern(self.metric, x, x)
        kernel = torch.where(adsorbates[:, None] == adsorbates, kernel, self.shared * kernel)
        return torch.where(unrelaxed[:, None] == unrelaxed, kernel, self.related * kernel)


def matern(metric: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matérn 3/2 kernel [n, m] of descriptors [n, D], [m, D]; metric: [D], or [n, D] for one a row of a."""
    weighed = a * metric
    squared = (weighed * a).sum(1)[:, None] + metric @ (b**2).T - 2 * weighed @ b.T
    reach = squared.clamp_min(NEAREST).sqrt()
    return (1 + reach) * torch.exp(-reach)


def learn(
    rate: float,
    x: torch.Tensor,
    adsorbates: torch.Tensor,
    unrelaxed: torch.Tensor,
    wanted: torch.Tensor,
    folds: NDArray[np.int64],
    asked: torch.Tensor,
) -> Kernel:
    """The kernel by which ridge regression of `wanted` [n] (eV, float64) errs least in folds that it has not
    seen, where `asked` [n]: other rows only help. x: scaled descriptors [n, D]; rate: of their squared
    distance over their number, to begin with."""
    size, rng = x.shape[1], np.random.default_rng(0)
    free = torch.zeros(size + 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=RATE)
    unit = wanted.std(correction=0)
    wanted = wanted / torch.where(unit > 0, unit, 1.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        rows = np.sort(rng.permutation(len(x))[:SOME])
        kernel = _kernel(rate, free)
        values = kernel(x[rows], adsorbates[rows], unrelaxed[rows])
        gradient = _gradient(values.detach(), kernel.strength.item(), wanted[rows], folds[rows], asked[rows])
        prior = PRIOR / len(rows) * (free[:size] ** 2).sum()
        optimizer.zero_grad()
        torch.autograd.backward([values, prior + kernel.strength * gradient.trace()], [gradient, None])
        optimizer.step()
    return Kernel(*(part.detach() for part in _kernel(rate, free)))


def _kernel(rate: float, free: torch.Tensor) -> Kernel:
    """The kernel of free parameters [D + 3], all 0 before any step."""
    size, (shared, related, strength) = len(free) - 3, BEGIN
    begin = torch.logit(free.new_tensor([shared, related]))
    between = torch.sigmoid(begin + free[size : size + 2])
    metric = 6 * rate / size * torch.exp(free[:size])
    return Kernel(metric, between[0], between[1], FLOOR + (strength - FLOOR) * torch.exp(free[-1]))


def _gradient(
    kernel: torch.Tensor,
    strength: float,
    wanted: torch.Tensor,
    folds: NDArray[np.int64],
    asked: torch.Tensor,
) -> torch.Tensor:
    """Gradient [n, n] by the kernel (by the strength: its trace) of the mean over what is asked of
    sqrt(e² + `SMOOTH`²), where e is the error without the row's fold."""
    ridge = kernel.clone()
    ridge.diagonal().add_(strength)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridge))
    coefficients = inverse @ wanted
    left, right = [], []
    for fold in np.unique(folds):
        rows = torch.from_numpy(np.flatnonzero(folds == fold))
        factor = torch.linalg.cholesky(inverse[rows][:, rows])
        errors = torch.cholesky_solve(coefficients[rows, None], factor)
        slope = torch.where(asked[rows, None], errors / torch.sqrt(errors**2 + SMOOTH**2), 0.0)
        columns = inverse[:, rows]
        left.append(columns @ torch.cholesky_solve(slope, factor))
        right.append(columns @ errors - coefficients[:, None])
    # errors change by (P_bb)⁻¹ (dc_b - dP_bb e_b), where dP = -P dK P and dc = dP y
    return torch.hstack(left) @ torch.hstack(right).T / max(int(asked.sum()), 1)
