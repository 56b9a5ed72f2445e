"""Two property predictors without a network: what a model must beat before its error means anything.

The mean of the adsorbate says how much the adsorbate's name alone tells; ridge regression on words says how
much is in the text without any order beyond pairs. On the shipped systems, split by (bulk, Miller index): MAE
0.76 and 0.34 eV.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catmllm.evaluate.metrics import mae, r2
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
    """Counts of the words (brackets are words) and adjacent pairs of the three-part text,
    and of each element."""
    words = _WORD.findall(three_part_text(system))
    counts: Counter[Hashable] = Counter(words)
    counts.update(pairwise(words))
    counts.update({("atoms", symbol): number for symbol, number in system.target.items()})
    return counts


@dataclass(frozen=True, eq=False)
class TextRidge:
    """Ridge regression on `text_features`, not scaled, with a free intercept.
    Features training lacks count for nothing."""

    vocabulary: Mapping[Hashable, int]
    weights: Floats  # [features], eV a count
    intercept: float  # eV
    strength: float

    @classmethod
    def fit(
        cls, train: Sequence[System], val: Sequence[System], strengths: Sequence[float] = STRENGTHS
    ) -> TextRidge:
        """In closed form, with the strength of least MAE on `val`; without `val`,
        the middle one of `strengths`."""
        if not train:
            raise ValueError("no training systems")
        if not val:
            strengths = [sorted(strengths)[len(strengths) // 2]]
        counted = [text_features(system) for system in train]
        vocabulary = {feature: i for i, feature in enumerate(dict.fromkeys(f for c in counted for f in c))}
        features, wanted = _matrix(counted, vocabulary), energies(train)
        centre, mean = features.mean(axis=0), float(wanted.mean())
        centred = features - centre
        values, vectors = np.linalg.eigh(centred.T @ centred)  # one decomposition for all strengths
        projected = vectors.T @ (centred.T @ (wanted - mean))
        fits = []
        val_features, val_energies = _matrix([text_features(s) for s in val], vocabulary), energies(val)
        for strength in sorted(strengths, reverse=True):
            weights = vectors @ (projected / (np.maximum(values, 0.0) + strength))
            fit = cls(vocabulary, weights, mean - float(centre @ weights), strength)
            error = mae(fit._apply(val_features), val_energies) if val else 0.0
            fits.append((error, fit))
        return min(fits, key=lambda pair: pair[0])[1]

    def predict(self, systems: Sequence[System]) -> Floats:
        """Energies (eV) [n]."""
        return self._apply(_matrix([text_features(system) for system in systems], self.vocabulary))

    def _apply(self, features: Floats) -> Floats:
        return features @ self.weights + self.intercept


def _matrix(counted: Sequence[Mapping[Hashable, int]], vocabulary: Mapping[Hashable, int]) -> Floats:
    matrix = np.zeros((len(counted), len(vocabulary)))
    for row, counts in enumerate(counted):
        for feature, count in counts.items():
            column = vocabulary.get(feature)
            if column is not None:
                matrix[row, column] = count
    return matrix


def baselines(parts: Mapping[Any, Sequence[System]]) -> dict[str, dict[str, float]]:
    """MAE (eV) and R² on `parts["test"]` of both, fitted on `train` (and `val`).

    Returns {"adsorbate_mean": {"mae", "r2"}, "text_ridge": {"mae", "r2"}}.
    """
    train, val, test = parts["train"], parts["val"], parts["test"]
    wanted = energies(test)
    predictions = {
        "adsorbate_mean": AdsorbateMean.fit(train).predict(test),
        "text_ridge": TextRidge.fit(train, val).predict(test),
    }
    return {name: {"mae": mae(p, wanted), "r2": r2(p, wanted)} for name, p in predictions.items()}
