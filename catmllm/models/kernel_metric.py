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
from numpy.typing import NDArray

from catmllm.seeds import Stream, generator

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

SOME = 1200  # systems a step
STEPS, RATE = 60, 0.1  # of Adam; the rate falls to 0
PRIOR = 0.05  # of 0.01, 0.05, 0.2 and 0.8 the errors of validation systems fall little below this one
SMOOTH = 0.07  # of the energies' deviation: errors below this count by their squares
FLOOR = 1e-4  # of the strength: with less, float32 would not carry the coefficients
BEGIN = (0.6, 0.9, 2e-3)  # `shared`, `related` and strength before any step


class Kernel(NamedTuple):
    """How much descriptors count, and what differs between structures."""

    metric: Floats  # [D], of the squared differences of descriptors
    shared: float  # kernel of two adsorbates
    related: float  # kernel of a relaxed and an unrelaxed structure
    strength: float  # of the ridge

    def __call__(self, x: Floats, adsorbates: Integers, unrelaxed: Booleans) -> Floats:
        """Kernel [n, n] of scaled descriptors [n, D], adsorbates [n] and whether unrelaxed [n], without the
        ridge."""
        return matern(self.metric, x, x) * self._factors(adsorbates, unrelaxed)

    def _factors(self, adsorbates: Integers, unrelaxed: Booleans) -> Floats:
        factors = np.where(adsorbates[:, None] == adsorbates, 1.0, self.shared)
        factors[unrelaxed[:, None] != unrelaxed] *= self.related
        return factors


class Shown(NamedTuple):
    """What a kernel is learned from."""

    x: Floats  # [n, D], scaled descriptors
    adsorbates: Integers  # [n]
    unrelaxed: Booleans  # [n]
    wanted: Floats  # [n], eV
    folds: Integers  # [n]
    asked: Booleans  # [n]; other rows only help

    def of(self, rows: Integers) -> Shown:
        x, adsorbates, unrelaxed, wanted, folds, asked = self
        return Shown(x[rows], adsorbates[rows], unrelaxed[rows], wanted[rows], folds[rows], asked[rows])


def matern(metric: Floats | float, a: Floats, b: Floats) -> Floats:
    """Matérn 3/2 kernel [n, m] of descriptors [n, D], [m, D]; metric [D], or one for all."""
    reach = _reach(metric, a, b)
    kernel = np.exp(-reach)
    kernel *= np.add(reach, 1.0, out=reach)
    return kernel


def _reach(metric: Floats | float, a: Floats, b: Floats) -> Floats:
    """Distances [n, m]."""
    root = np.sqrt(metric)
    a, b = a * root, b * root
    squared = a @ b.T
    squared *= -2
    squared += (a**2).sum(1)[:, None] + (b**2).sum(1)
    return np.asarray(np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared))


def learn(rate: float, shown: Shown) -> Kernel:
    """The kernel by which ridge regression of what is wanted errs least in folds that it has not seen, where
    that is asked. rate: of the squared distance over the number of descriptors, to begin with."""
    rng = generator(Stream.CLOSED_FORM.key(0))
    free = np.zeros(shown.x.shape[1] + 3)
    mean, square = np.zeros((2, len(free)))
    shown = shown._replace(wanted=shown.wanted / (shown.wanted.std() or 1.0))
    for step in range(STEPS):
        rows = np.sort(rng.permutation(len(shown.x))[:SOME])
        slope = _slope(rate, free, shown.of(rows))
        mean += 0.1 * (slope - mean)
        square += 0.001 * (slope**2 - square)
        size = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        free -= RATE * (1 - step / STEPS) * mean / (1 - 0.9 ** (step + 1)) / size
    return _kernel(rate, free)


def _kernel(rate: float, free: Floats) -> Kernel:
    """The kernel of free parameters [D + 3], all 0 before any step."""
    size, (shared, related, strength) = len(free) - 3, BEGIN
    odds = np.array([shared / (1 - shared), related / (1 - related)]) * np.exp(free[size : size + 2])
    between = odds / (1 + odds)
    metric = 6 * rate / size * np.exp(free[:size])
    ridge = FLOOR + (strength - FLOOR) * np.exp(free[-1])
    return Kernel(metric, float(between[0]), float(between[1]), float(ridge))


def _slope(rate: float, free: Floats, shown: Shown) -> Floats:
    """Gradient [D + 3] by the free parameters of what is made smaller."""
    x, adsorbates, unrelaxed, wanted, folds, asked = shown
    kernel, size = _kernel(rate, free), x.shape[1]
    reach, factors = _reach(kernel.metric, x, x), kernel._factors(adsorbates, unrelaxed)
    decay = np.exp(-reach)
    values = (1 + reach) * decay * factors
    by_kernel = _gradient(values, kernel.strength, wanted, folds, asked)
    squared = by_kernel * factors * decay  # -2 times the gradient by the squared distances
    by_metric = (x * (squared @ x)).sum(0) - 0.5 * (squared.sum(0) + squared.sum(1)) @ x**2
    by_values = by_kernel * values
    slope = np.empty(size + 3)
    slope[:size] = kernel.metric * by_metric + 2 * PRIOR / len(x) * free[:size]
    slope[size] = (1 - kernel.shared) * by_values[adsorbates[:, None] != adsorbates].sum()
    slope[size + 1] = (1 - kernel.related) * by_values[unrelaxed[:, None] != unrelaxed].sum()
    slope[size + 2] = (kernel.strength - FLOOR) * by_kernel.trace()
    return slope


def _gradient(kernel: Floats, strength: float, wanted: Floats, folds: Integers, asked: Booleans) -> Floats:
    """Gradient [n, n] by the kernel (by the strength: its trace) of the mean over what is asked of
    sqrt(e² + `SMOOTH`²), where e is the error without the row's fold."""
    from scipy.linalg import cho_factor, cho_solve, lapack

    factor, _ = cho_factor(kernel + strength * np.eye(len(kernel)), lower=True, overwrite_a=True)
    coefficients = cho_solve((factor, True), wanted)
    inverse = np.tril(lapack.dpotri(factor, lower=1, overwrite_c=1)[0])
    inverse += np.tril(inverse, -1).T
    left, right = np.zeros((2, len(kernel), folds.max() + 1))
    for fold in np.unique(folds):
        rows = folds == fold
        block = cho_factor(inverse[np.ix_(rows, rows)], lower=True)
        errors = cho_solve(block, coefficients[rows])
        toward = np.where(asked[rows], errors / np.sqrt(errors**2 + SMOOTH**2), 0.0)
        left[:, fold] = inverse[:, rows] @ cho_solve(block, toward)
        right[:, fold] = inverse[:, rows] @ errors - coefficients
    # errors change by (P_bb)⁻¹ (dc_b - dP_bb e_b), where dP = -P dK P and dc = dP y
    return np.asarray(left @ right.T / max(asked.sum(), 1))
