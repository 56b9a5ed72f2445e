"""A mean of two readers of a text: the language model, and ridge regression on its words.

Where texts are all there is the two are about as good and err in different ways. The share of each is the
best on validation, so that the mean is, there, never worse than either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from catmllm.evaluate.baselines import TextRidge, energies, some
from catmllm.evaluate.metrics import mae
from catmllm.structure.system import System, text_system
from catmllm.structure.text import three_part_text

Floats = NDArray[np.float64]

FILE = "ridge.json"  # of a stage's folder
SHARES = tuple(k / 20 for k in range(21))


@dataclass(frozen=True, eq=False)
class Ensemble:
    """share: of the language model, the rest is the ridge's."""

    ridge: TextRidge
    share: float

    @classmethod
    def fit(
        cls, train: Sequence[System], val: Sequence[System], shown: Sequence[System], llm: Floats
    ) -> Ensemble:
        """Ridge on `train`, its strength by `val`; the share by the least MAE on the systems `shown`, of
        which the language model says `llm` (eV) [n]; half each where there are none."""
        ridge = TextRidge.fit(some(train), some(val))
        if not len(shown):
            return cls(ridge, 0.5)
        truth = energies(shown)
        errors = {s: mae(cls(ridge, s).mean(shown, llm), truth) for s in SHARES}
        return cls(ridge, min(errors, key=lambda s: (errors[s], abs(s - 0.5))))

    def mean(self, systems: Sequence[System], llm: Floats) -> Floats:
        """Energies (eV) [n] of systems, of which the language model says `llm` [n]; of a structure by its
        text, as training saw."""
        texts = [s if s.text is not None else text_system(three_part_text(s)) for s in systems]
        mixed = self.share * llm + (1.0 - self.share) * self.ridge.predict(texts)
        return np.asarray(mixed, dtype=np.float64)

    def save(self, folder: Path) -> None:
        temporary = folder / f".{FILE}"
        temporary.write_text(json.dumps({"share": self.share, "ridge": self.ridge.to_json()}))
        temporary.rename(folder / FILE)


def load_ensemble(folder: Path) -> Ensemble | None:
    """That of a stage's folder; None where it was trained on structures."""
    path = folder / FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return Ensemble(TextRidge.from_json(found["ridge"]), found["share"])
