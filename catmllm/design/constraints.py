"""What a text must hold to be a design: the hard constraints, as masks over scored texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.adsorbed import Fault, adsorbate_fault
from catmllm.structure.cif import system_from_crystal
from catmllm.structure.formula import Miller
from catmllm.structure.system import System
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


def read_systems(scores: Scores, asked: Sequence[tuple[str, Miller | None]]) -> list[System | None]:
    """The systems of scored texts, [n] as the adsorbates and Miller indices asked for. None: the text does
    not parse, or has not the adsorbate's atoms beside others, or a cell or sites that are none."""
    found: list[System | None] = []
    for crystal, (adsorbate, miller) in zip(scores.crystals, asked, strict=True):
        try:
            found.append(None if crystal is None else system_from_crystal(crystal, adsorbate, miller))
        except ValueError:
            found.append(None)
    return found


def adsorbate_faults(systems: Sequence[System | None]) -> list[Fault | None]:
    """[n] why the adsorbate of each system is none, or None; `no_adsorbate` where no system was read."""
    return ["no_adsorbate" if s is None else adsorbate_fault(s) for s in systems]


def hard_constraints(
    scores: Scores, faults: Sequence[Fault | None], thresholds: Thresholds | None = None
) -> Bools:
    """[n] which texts may be designs (SPEC §6): parse, exact composition, d_min >= 0.7 Å, sane volume per
    atom, and a real adsorbate (`faults` by `adsorbate_faults`)."""
    return (
        parsed(scores)
        & (scores.comp >= 10.0)
        & (scores.min_distance >= MIN_DISTANCE)
        & sane_volume(scores, thresholds or Thresholds())
        & np.array([fault is None for fault in faults], dtype=bool)
    )
