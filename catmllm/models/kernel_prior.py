"""What kernel ridge regression says of a structure: the part of an energy that no training step changes.

On a few thousand systems a kernel on local descriptors is better than any network trained beside it. So the
model starts from it, in closed form, and its networks learn what it leaves. What it says of a training system
is said by fits that have not seen the system's (bulk, Miller index) pair: what they leave is then as large as
it will be on new surfaces.

Relaxed structures and unrelaxed ones are two tasks: the same descriptor has another energy. A fit serves
each, with a learned kernel of its own (`kernel_metric`): of relaxed structures alone, and of both kinds, in
which the other kind counts a little less.

How far a fit is off differs from structure to structure, more than its mean error tells: an adsorbate in a
hollow stays, one on a bridge may slide away. So a second regression, on the same kernel, says how large the
error will be. It learns from what the fits leave of systems that they have not seen.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catmllm.models.kernel_metric import Shown, learn
from catmllm.structure.descriptors import FOLDS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DOUBT_STRENGTHS = (0.3, 1.0)  # errors are noisy: most of the kernel's detail is none
CERTAIN = 0.15  # root of the least error (eV) that is ever expected
SMALLEST = 0.05  # scales below this share of the largest do not blow up what hardly varies


def scales(raw: Floats) -> tuple[Floats, Floats]:
    """Centre and scale [D] of descriptors [n, D]."""
    deviation = raw.std(0)
    return raw.mean(0), np.maximum(deviation, SMALLEST * deviation.max()) + 1e-12


class KernelPrior(nn.Module):
    """Energies (eV) by kernel ridge regression on training systems; 0 where it has none.

    Columns of `means` and `coefficients`: the fit of relaxed structures to all, then without each fold, then
    the same for unrelaxed structures.
    """

    centre: torch.Tensor
    scale: torch.Tensor
    metric: torch.Tensor  # [2, D], by which distances of relaxed and of unrelaxed structures are measured
    shared: torch.Tensor  # [2], kernel of two adsorbates
    landmarks: torch.Tensor  # [m, D], scaled
    adsorbates: torch.Tensor  # [m] int64
    coefficients: torch.Tensor  # [m, 2 (FOLDS + 1)]
    names: torch.Tensor  # [A] int64, adsorbates
    means: torch.Tensor  # [A + 1, 2 (FOLDS + 1)]; the last row is of those that training lacks
    doubts: (
        torch.Tensor
    )  # [m, 2], coefficients of the root of the error, of relaxed and of unrelaxed structures
    usual: torch.Tensor  # [2], what they are added to

    def __init__(self, size: int, rate: float) -> None:
        """size: descriptors D of a structure; rate: of the squared distance over their number, before the
        kernel is learned."""
        super().__init__()
        self.rate, self.size = rate, size
        self.clear()

    def clear(self) -> None:
        """As before any fit."""
        size, columns = self.size, 2 * (FOLDS + 1)
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("metric", torch.ones(2, size))
        self.register_buffer("shared", torch.ones(2))
        self.register_buffer("landmarks", torch.zeros(0, size))
        self.register_buffer("adsorbates", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("coefficients", torch.zeros(0, columns))
        self.register_buffer("names", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("means", torch.zeros(1, columns))
        self.register_buffer("doubts", torch.zeros(0, 2))
        self.register_buffer("usual", torch.zeros(2))

    @torch.no_grad()
    def forward(self, local: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Energies [n] float32 of descriptors [n, D or more] and what is `known` [n, 3] of the calls.
        While the model trains, a system with a fold is seen by the fit without it."""
        if not len(self.landmarks):
            return torch.zeros(len(local), device=local.device)
        kernel = self._kernel(local, known)
        fold = known[:, 2] if self.training else torch.full_like(known[:, 2], -1)
        column = known[:, 1] * (FOLDS + 1) + 1 + fold
        same = known[:, :1] == self.names
        row = torch.where(same.any(1), same.int().argmax(1) if len(self.names) else 0, len(self.names))
        return ((kernel * self.coefficients.T[column]).sum(1) + self.means[row, column]).float()

    @torch.no_grad()
    def doubt(self, local: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Expected |error| (eV) [n] float32 of what `forward` says of them in a trained model; 0 where
        there is no fit."""
        if not len(self.landmarks):
            return torch.zeros(len(local), device=local.device)
        kind = known[:, 1]
        root = (self._kernel(local, known) * self.doubts.T[kind]).sum(1) + self.usual[kind]
        return root.clamp_min(CERTAIN).square().float()

    def _kernel(self, local: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """[n, m] float64: how near descriptors are to those of the training systems. Distances are
        differences of large numbers, and coefficients hundreds of eV."""
        size = len(self.centre)
        x = (local[:, :size].double() - self.centre) / self.scale
        metric, landmarks = self.metric[known[:, 1]].double(), self.landmarks.double()
        reach = (x**2 * metric).sum(1)[:, None] + metric @ (landmarks**2).T
        reach = (reach - 2 * (x * metric) @ landmarks.T).clamp_min(0).sqrt()
        kernel = (1 + reach) * torch.exp(-reach)
        shared = self.shared[known[:, 1], None]
        return torch.where(known[:, :1] == self.adsorbates, kernel, shared * kernel)

    def fit(
        self, local: Floats, known: Integers, folds: Integers, energies: Floats, scaled: int | None = None
    ) -> dict[str, float]:
        """Fit to descriptors [n, D or more], `known` [n, 3] (its folds do not count), folds [n] and
        energies (eV) [n]; centre and scale are those of the first `scaled` rows (None: of all). Returns the
        MAE (eV) on pairs that the fits have not seen, of `relaxed` and `unrelaxed` structures; kernels are
        learned by it.

        One inverse: coefficients without a fold follow from its block. Float64 throughout.
        """
        raw = np.asarray(local[:, : len(self.centre)], dtype=np.float64)
        centre, scale = scales(raw[:scaled])
        x, unrelaxed = (raw - centre) / scale, known[:, 1] == 1
        names = np.unique(known[:, 0])
        means = np.array([_means(names, known[:, 0], folds, energies, f) for f in range(-1, FOLDS)]).T
        left = energies[:, None] - means[np.searchsorted(names, known[:, 0])]
        columns, doubts, usual = np.zeros((2, len(x), FOLDS + 1)), np.zeros((2, len(x))), np.zeros(2)
        metric, shared, found = np.ones((2, x.shape[1])), np.ones(2), {}
        for kind, name in enumerate(("relaxed", "unrelaxed")):
            part = np.arange(len(x)) if kind else np.flatnonzero(~unrelaxed)
            asked = unrelaxed[part] if kind else np.ones(len(part), dtype=bool)
            if not asked.any():  # no unrelaxed structure in training: what is known of relaxed ones
                columns[1], doubts[1], usual[1] = columns[0], doubts[0], usual[0]
                metric[1], shared[1] = metric[0], shared[0]
                continue
            alike = x[part], known[part, 0], unrelaxed[part]
            learned = learn(self.rate, Shown(*alike, left[part, 0], folds[part], asked))
            metric[kind], shared[kind] = learned.metric, learned.shared
            kernel = learned(*alike)
            columns[kind, part], residuals = _held_out(kernel, learned.strength, left[part], folds[part])
            found[name] = float(np.abs(residuals[asked]).mean())
            doubts[kind, part[asked]], usual[kind] = _doubts(
                kernel[np.ix_(asked, asked)], residuals[asked], folds[part[asked]]
            )
            if kind:
                columns[kind, ~unrelaxed] *= learned.related
        self._put(centre=centre, scale=scale, metric=metric, shared=shared)
        self._put(landmarks=x, names=names, adsorbates=known[:, 0])
        self._put(coefficients=np.hstack(list(columns)), means=np.hstack([means, means]))
        self._put(doubts=doubts.T, usual=usual)
        return found

    def make_room(self, known: Integers) -> None:
        """Buffers as large as after a fit to what is `known` [n, 3], for what another process has fitted."""
        n, names = len(known), np.unique(known[:, 0])
        self._put(landmarks=np.zeros((n, self.size)), adsorbates=known[:, 0], names=names)
        self._put(coefficients=np.zeros((n, self.coefficients.shape[1])), doubts=np.zeros((n, 2)))
        self._put(means=np.zeros((len(names) + 1, self.means.shape[1])))

    def _put(self, **arrays: NDArray[np.generic]) -> None:
        """New values of buffers, of any length, in their own dtype."""
        for name, array in arrays.items():
            old = getattr(self, name)
            setattr(self, name, torch.from_numpy(np.ascontiguousarray(array)).to(old.device, old.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
        """Training systems are as many as the file has."""
        for name, mine in list(self.named_buffers()):
            if (theirs := state_dict.get(prefix + name)) is not None and theirs.shape != mine.shape:
                setattr(self, name, mine.new_empty(theirs.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _means(names: Integers, adsorbates: Integers, folds: Integers, energies: Floats, fold: int) -> Floats:
    """Mean energies [A + 1] of adsorbates without a fold, and of all for those that are then not there."""
    seen = folds != fold if (folds != fold).any() else np.ones(len(folds), dtype=bool)
    overall = energies[seen].mean()
    some = [energies[seen & (adsorbates == name)] for name in names]
    return np.array([*(group.mean() if len(group) else overall for group in some), overall])


def _held_out(kernel: Floats, strength: float, wanted: Floats, folds: Integers) -> tuple[Floats, Floats]:
    """Coefficients [n, FOLDS + 1] of kernel ridge regression on all (targets `wanted` [:, 0]) and without
    each fold (targets [:, 1 + fold], 0 in the fold), and the residuals [n] of every fold by the fit without
    it."""
    from scipy.linalg import cho_factor, cho_solve, lapack

    factor, _ = cho_factor(kernel + strength * np.eye(len(kernel)), lower=True, overwrite_a=True)
    coefficients = cho_solve((factor, True), wanted)
    inverse, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)
    residuals = np.zeros(len(kernel))
    for fold in range(FOLDS):
        block = np.flatnonzero(folds == fold)
        if not len(block):
            continue
        # the lower triangle is what there is of the inverse
        columns = np.where(np.arange(len(kernel))[:, None] >= block, inverse[:, block], inverse[block].T)
        mine = coefficients[:, 1 + fold]
        residuals[block] = np.linalg.solve(columns[block], mine[block])
        mine -= columns @ residuals[block]
        mine[block] = 0.0
    return coefficients, residuals


def _doubts(kernel: Floats, residuals: Floats, folds: Integers) -> tuple[Floats, float]:
    """Coefficients [n] and constant of the root of |residuals| [n]. Their strength is chosen on folds that
    the fits have not seen, and they are so scaled that the squares have the mean of |residuals| there."""
    roots = np.sqrt(np.abs(residuals))
    usual = float(roots.mean())
    wanted = np.repeat((roots - usual)[:, None], FOLDS + 1, axis=1)
    fits = [_held_out(kernel, strength, wanted, folds) for strength in DOUBT_STRENGTHS]
    coefficients, missed = min(fits, key=lambda fit: float((fit[1] ** 2).mean()))
    expected = np.maximum(roots - missed, CERTAIN) ** 2
    scale = float(np.sqrt(np.abs(residuals).mean() / expected.mean()))
    return scale * coefficients[:, 0], scale * usual
