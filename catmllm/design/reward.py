"""The rewards of the RL stages: PVCP by `rewards_fast`, a real adsorbate, and the distance to a wanted
energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catmllm.config import GAGRPOConfig, RewardConfig
from catmllm.design.constraints import adsorbate_faults, read_systems
from catmllm.structure.adsorbed import Fault
from catmllm.structure.system import System
from rewards_fast.pvcp import TERMS as PVCP_TERMS
from rewards_fast.pvcp import score_range

Floats = NDArray[np.float64]

# Of an answer's reward by name: those of PVCP, and the adsorbate, of which PVCP knows nothing.
TERMS = (*PVCP_TERMS, "adsorbate")


@dataclass(frozen=True)
class Rewards:
    """Rewards of n answers: their total, every one of `TERMS` [n], and why a text does not parse, or None."""

    total: Floats
    terms: dict[str, Floats]
    reason: list[str | None]


class AnswerReward:
    """PVCP plus `weight` times the adsorbate's term: 10 for a real one, -10 for any other answer."""

    def __init__(self, config: RewardConfig, weight: float) -> None:
        self.pvcp, self.weight = config.scorer(), weight

    def __call__(self, texts: Sequence[str], asked: Sequence[System]) -> Rewards:
        """Rewards of texts [n] that answer for the systems `asked` [n]."""
        scores = self.pvcp.score(texts, [s.target for s in asked])
        terms = {name: getattr(scores, name) for name in PVCP_TERMS}
        faults = adsorbate_faults(read_systems(scores, [(s.adsorbate, s.miller) for s in asked]))
        terms["adsorbate"] = adsorbate_term(faults)
        return Rewards(scores.total + self.weight * terms["adsorbate"], terms, scores.reason)


def adsorbate_term(faults: Sequence[Fault | None]) -> Floats:
    """10 where there is no fault, else -10, [n]."""
    return np.array([10.0 if fault is None else -10.0 for fault in faults])


def energy_reward(distance: np.ndarray, lam: float) -> np.ndarray:
    """exp(-lam |E - E*|) in (0, 1] of distances (eV) [n] (paper Eq. 5 with the sign its text means); 0 of
    NaN."""
    return np.where(np.isnan(distance), 0.0, np.exp(-lam * np.nan_to_num(distance)))


def expected_distance(predicted: np.ndarray, target: np.ndarray | float, errors: np.ndarray) -> np.ndarray:
    """Mean |E - E*| [n] of an E that lies around E_pred by Laplace's distribution of mean error `errors` [n]:
    |E_pred - E*| where that is large, the error where it is 0. NaN where E_pred is NaN."""
    distance = np.abs(predicted - target)
    width = np.maximum(errors, 1e-12)
    return np.asarray(distance + errors * np.exp(-distance / width))


def distances(
    predicted: np.ndarray, target: np.ndarray | float, errors: np.ndarray, config: GAGRPOConfig
) -> np.ndarray:
    """From the wanted energy (eV) [n]: of the predictions, or with `expected_error` what is to be expected of
    such predictions. NaN where E_pred is NaN."""
    if not config.expected_error:
        return np.asarray(np.abs(predicted - target))
    return expected_distance(predicted, target, np.nan_to_num(errors))


def design_reward(
    pvcp: np.ndarray,
    faults: Sequence[Fault | None],
    distance: np.ndarray,
    config: GAGRPOConfig,
) -> np.ndarray:
    """0.7 R_energy + 0.3 R_PVCP (paper Eq. 4) + 0.3 for a real adsorbate, [n]. `distance` [n] from the wanted
    energy in eV is NaN where an answer has no energy.

    PVCP is rescaled to [0, 1] from the floor and the top of its own weights unless `raw` is asked for.
    """
    quality = pvcp
    if config.pvcp_scale == "unit":
        floor, top = score_range(config.reward.scorer().weights)
        quality = (pvcp - floor) / (top - floor or 1.0)  # 0 where no term counts
    real = np.array([fault is None for fault in faults], dtype=np.float64)
    energy = energy_reward(distance, config.energy_lambda)
    return config.energy_weight * energy + config.pvcp_weight * quality + config.adsorbate_weight * real
