"""What a text must hold to be a design: the hard constraints, as masks over scored texts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rewards_fast import Scores
from rewards_fast.pvcp import Thresholds

Bools = NDArray[np.bool_]

MIN_DISTANCE = 0.7  # Å; H-H is 0.74


def parsed(scores: Scores) -> Bools:
    """[n] which texts parsed."""
    return np.array([reason is None for reason in scores.reason], dtype=bool)


def sane_volume(scores: Scores, thresholds: Thresholds) -> Bools:
    """[n] which texts have a volume per atom between the thresholds."""
    with np.errstate(invalid="ignore", divide="ignore"):
        per_atom = scores.volume / scores.n_sites
    return (per_atom >= thresholds.volume_per_atom_min) & (per_atom <= thresholds.volume_per_atom_max)


def hard_constraints(scores: Scores, thresholds: Thresholds | None = None) -> Bools:
    """[n] which texts may be designs (SPEC §6): parse, exact composition, d_min >= 0.7 Å,
    sane volume per atom."""
    return (
        parsed(scores)
        & (scores.comp >= 10.0)
        & (scores.min_distance >= MIN_DISTANCE)
        & sane_volume(scores, thresholds or Thresholds())
    )
