"""Property predictors without a network: what a model must beat before its error means anything.

The mean of the adsorbate says how much the adsorbate's name alone tells; ridge regression on words, how much
is in the text without any order beyond pairs; kernel ridge regression on local descriptors, what seconds of
classical machine learning make of the structure. On the shipped systems, split by (bulk, Miller index), mean
MAE over five splits: 0.66, 0.32 and 0.11 eV.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catmllm.data.open import texts_only
from catmllm.evaluate.metrics import mae, r2
from catmllm.models.kernel_metric import matern
from catmllm.models.kernel_prior import scales
from catmllm.structure.descriptors import local_descriptor
from catmllm.structure.system import System
from catmllm.structure.text import three_part_text

Floats = NDArray[np.float64]

STRENGTHS = tuple(float(s) for s in np.logspace(-2, 4, 13))
_WORD = re.compile(r"</s>|\[|\]|[^\s\[\]<]+")


def energies(systems: Sequence[System]) -> Floats:
    """Energies (eV) [n]. Raises ValueError for a system without one."""
    for system in systems:
        if system.energy is None:
            raise ValueError(f"system {system.sid!r} has no energy")
    return np.array([system.energy for system in systems], dtype=np.float64)


@dataclass(frozen=True)
class AdsorbateMean:
    """Predicts the mean training energy of the adsorbate; of one that training lacks, the mean of all."""

    means: Mapping[str, float]
    overall: float

    @classmethod
    def fit(cls, train: Sequence[System]) -> AdsorbateMean:
        """From training systems (at least one)."""
        values = energies(train)
        if not len(values):
            raise ValueError("no training systems")
        by_name: dict[str, list[float]] = defaultdict(list)
        for system, value in zip(train, values):
            by_name[system.adsorbate].append(float(value))
        return cls({name: float(np.mean(group)) for name, group in by_name.items()}, float(values.mean()))

    def predict(self, systems: Sequence[System]) -> Floats:
        """Energies (eV) [n]."""
        return np.array([self.means.get(s.adsorbate, self.overall) for s in systems], dtype=np.float64)


def text_features(system: System) -> Counter[Hashable]:
    """Counts of the words (brackets are words) and adjacent pairs of the three-part text, and of each
    element: of the cell, or where there is no structure, of the composition that the text names."""
    words = _WORD.findall(three_part_text(system))
    counts: Counter[Hashable] = Counter(words)
    counts.update(pairwise(words))
    elements = system.target or system.slab_counts
    counts.update({("atoms", symbol): number for symbol, number in elements.items()})
    return counts


@dataclass(frozen=True, eq=False)
class TextRidge:
    """Ridge regression on `text_features` or their square roots, not scaled, with a free intercept.
    Features training lacks count for nothing."""

    vocabulary: Mapping[Hashable, int]
    weights: Floats  # [features], eV a count
    intercept: float  # eV
    strength: float
    roots: bool = False

    @classmethod
    def fit(
        cls,
        train: Sequence[System],
        val: Sequence[System],
        strengths: Sequence[float] = STRENGTHS,
        roots: Sequence[bool] = (False, True),
    ) -> TextRidge:
        """In closed form, with the strength of least MAE on `val`, of counts or of their square roots, by
        fits to at most `_SEARCHED` systems; without `val`, the middle one of `strengths` and the first of
        `roots`."""
        if not train:
            raise ValueError("no training systems")
        if not val:
            strengths, roots = [sorted(strengths)[len(strengths) // 2]], roots[:1]
        counted, shown = [[text_features(s) for s in part] for part in (train, val)]
        wanted, truth, step = energies(train), energies(val), -(-len(train) // _SEARCHED)
        fits: list[tuple[float, TextRidge]] = []
        for root in roots:
            for fit in _ridges(counted[::step], wanted[::step], sorted(strengths, reverse=True), root):
                fits.append((mae(fit._apply(shown), truth) if val else 0.0, fit))
        best = min(fits, key=lambda pair: pair[0])[1]
        return best if step == 1 else next(_ridges(counted, wanted, [best.strength], best.roots))

    def predict(self, systems: Sequence[System]) -> Floats:
        """Energies (eV) [n]."""
        return self._apply([text_features(system) for system in systems])

    def _apply(self, counted: Sequence[Mapping[Hashable, int]]) -> Floats:
        return _matrix(counted, self.vocabulary, self.roots) @ self.weights + self.intercept

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "features": list(self.vocabulary),
            "weights": self.weights.tolist(),
            "intercept": self.intercept,
            "strength": self.strength,
            "roots": self.roots,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TextRidge:
        features = [tuple(f) if isinstance(f, list) else f for f in found["features"]]
        return cls(
            {feature: i for i, feature in enumerate(features)},
            np.array(found["weights"], dtype=np.float64),
            found["intercept"],
            found["strength"],
            found["roots"],
        )


def _ridges(
    counted: Sequence[Mapping[Hashable, int]], wanted: Floats, strengths: Sequence[float], roots: bool
) -> Iterator[TextRidge]:
    """A fit for each strength, by one decomposition for all, of whichever product is smaller: words may
    outnumber systems. For a single strength by Cholesky's, which is thirty times faster."""
    vocabulary = {feature: i for i, feature in enumerate(dict.fromkeys(f for c in counted for f in c))}
    centred, mean = _matrix(counted, vocabulary, roots), float(wanted.mean())
    centre = centred.mean(axis=0)
    centred -= centre
    dual = len(counted) < len(vocabulary)
    product = centred @ centred.T if dual else centred.T @ centred
    right = wanted - mean if dual else centred.T @ (wanted - mean)
    if len(strengths) > 1:
        values, vectors = np.linalg.eigh(product)
        projected = vectors.T @ right
    for strength in strengths:
        if len(strengths) > 1:
            found = vectors @ (projected / (np.maximum(values, 0.0) + strength))
        else:
            from scipy.linalg import solve

            product[np.diag_indices_from(product)] += strength
            found = solve(product, right, assume_a="pos", overwrite_a=True)
        weights = centred.T @ found if dual else found
        yield TextRidge(vocabulary, weights, mean - float(centre @ weights), strength, roots)


def _matrix(
    counted: Sequence[Mapping[Hashable, int]], vocabulary: Mapping[Hashable, int], roots: bool
) -> Floats:
    matrix = np.zeros((len(counted), len(vocabulary)))
    for row, counts in enumerate(counted):
        for feature, count in counts.items():
            column = vocabulary.get(feature)
            if column is not None:
                matrix[row, column] = count
    return np.sqrt(matrix, out=matrix) if roots else matrix


RATES = (0.025, 0.05, 0.1)  # of the squared distance over the number of descriptors
RIDGES = (1e-4, 1e-3, 1e-2)
SHARED = 0.6  # kernel of two adsorbates: of 0.1, 0.3, 0.6, 0.9 the best on validation, split seeds 0 and 1
_SEARCHED = 2500  # structures by which rate and strength are chosen; by 1,500 the MAE is 0.01 eV higher
TRAINED = "baselines.json"  # of a run's folder: the networks of gnn_baselines.py on the same split
FRAMES = (0.0,)  # what a regression that screens unrelaxed structures has also seen: the systems' starts


@dataclass(frozen=True, eq=False)
class KernelRidge:
    """Kernel ridge regression on `local_descriptor`, of what the mean of the adsorbate leaves.

    The kernel is Matérn 3/2 of the scaled descriptors times one of the adsorbates:
    what a surface does to one tells something of another.
    """

    descriptors: Floats  # [n, D] of the training systems, scaled
    adsorbates: NDArray[np.str_]
    coefficients: Floats  # [n], eV
    mean: AdsorbateMean
    centre: Floats
    scale: Floats
    rate: float

    @classmethod
    def fit(cls, train: Sequence[System], val: Sequence[System], frames: Sequence[float] = ()) -> KernelRidge:
        """Fitted on `train`; length scale and strength are those of the least MAE on `val`
        (without it: the middle ones), by fits to at most `_SEARCHED`.

        frames: points between start (0) and relaxed (1) at which each training system that has a start also
        counts, so that unrelaxed structures are not strangers. Test MAE on the shipped systems (split 0),
        relaxed and as they started: 0.10 and 0.70 eV without, 0.18 and 0.32 eV with frames (0,).
        """
        from scipy.linalg import cho_factor, cho_solve

        if not train:
            raise ValueError("no training systems")
        every, shown = (
            [*p, *(s.frame(x) for x in frames for s in p if s.start is not None)] for p in (train, val)
        )
        raw = np.array([local_descriptor(s) for s in every])
        centre, scale = scales(raw)
        x, names, mean = (raw - centre) / scale, _names(every), AdsorbateMean.fit(train)
        left = energies(every) - mean.predict(every)

        def fitted(rate: float, strength: float, step: int) -> KernelRidge:
            part, name = x[::step], names[::step]
            matrix = _kernel(part, name, part, name, rate)
            np.fill_diagonal(matrix, 1.0 + strength)
            factor = cho_factor(matrix, lower=True, overwrite_a=True)
            return cls(part, name, cho_solve(factor, left[::step]), mean, centre, scale, rate)

        if not shown:
            return fitted(RATES[1], RIDGES[1], 1)
        held_out, step = np.array([local_descriptor(s) for s in shown]), -(-len(x) // _SEARCHED)
        errors = {
            (r, s): mae(fitted(r, s, step)._apply(held_out, shown), energies(shown))
            for r in RATES
            for s in RIDGES
        }
        return fitted(*min(errors, key=lambda pair: errors[pair]), 1)

    def predict(self, systems: Sequence[System]) -> Floats:
        """Energies (eV) [n]."""
        return self._apply(np.array([local_descriptor(s) for s in systems]), systems)

    def _apply(self, raw: Floats, systems: Sequence[System]) -> Floats:
        if not len(systems):
            return np.zeros(0)
        x = (raw - self.centre) / self.scale
        kernel = _kernel(x, _names(systems), self.descriptors, self.adsorbates, self.rate)
        return np.asarray(kernel @ self.coefficients + self.mean.predict(systems), dtype=np.float64)


def _names(systems: Sequence[System]) -> NDArray[np.str_]:
    return np.array([s.adsorbate for s in systems], dtype=np.str_)


def _kernel(
    a: Floats, a_names: NDArray[np.str_], b: Floats, b_names: NDArray[np.str_], rate: float
) -> Floats:
    """Matérn 3/2 kernel [n, m] of scaled descriptors [n, D], [m, D], times one of adsorbates."""
    kernel = matern(6 * rate / a.shape[1], a, b)
    kernel[a_names[:, None] != b_names] *= SHARED
    return kernel


def baselines(
    parts: Mapping[Any, Sequence[System]], subset: Callable[[System], bool] | None = None
) -> dict[str, dict[str, Any]]:
    """MAE (eV) and R² on `parts["test"]` of all, fitted on `train` (and `val`); where there is a `subset`,
    also on its test systems alone, as `subset`. `for_baselines` makes such parts.

    Returns {name: {"mae", "r2"}} of `adsorbate_mean`, `text_ridge` and, where there are structures,
    `kernel_ridge`; and where every test system has a start, `kernel_ridge_frames` with what it says of these
    as `start`.
    """
    train, val, test = (parts[name] for name in ("train", "val", "test"))
    wanted = energies(test)
    inside = None if subset is None else np.array([subset(s) for s in test], dtype=bool)

    def errors(predicted: Floats) -> dict[str, Any]:
        found: dict[str, Any] = {"mae": mae(predicted, wanted), "r2": r2(predicted, wanted)}
        if inside is not None:
            mine, theirs = predicted[inside], wanted[inside]
            found["subset"] = {"mae": mae(mine, theirs), "r2": r2(mine, theirs)}
        return found

    found = {
        "adsorbate_mean": errors(AdsorbateMean.fit(train).predict(test)),
        "text_ridge": errors(TextRidge.fit(train, val).predict(test)),
    }
    if texts_only(train):
        return found
    found["kernel_ridge"] = errors(KernelRidge.fit(train, val).predict(test))
    if all(s.start is not None for s in test):
        frames = KernelRidge.fit(train, val, FRAMES)
        found["kernel_ridge_frames"] = errors(frames.predict(test)) | {
            "start": errors(frames.predict([s.frame(0.0) for s in test]))
        }
    return found


def for_baselines(parts: Mapping[str, Sequence[System]], most: int) -> dict[str, Sequence[System]]:
    """What baselines are fitted to, cut by `some`, and the test systems on which the model is measured too:
    at most so many (`evaluate.property_systems`)."""
    return {name: some(parts[name]) for name in ("train", "val")} | {
        "test": evenly_spaced(parts["test"], most)
    }


def some(systems: Sequence[System]) -> Sequence[System]:
    """At most 4,000 of a part, or 10,000 texts, evenly spaced: the regressions' matrices are dense."""
    return evenly_spaced(systems, 10_000 if texts_only(systems) else 4000)


def evenly_spaced(systems: Sequence[System], most: int) -> Sequence[System]:
    """At most so many of some systems."""
    return systems[:: -(-len(systems) // most) or 1]
