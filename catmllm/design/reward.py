"""The rewards of the RL stages: PVCP by `rewards_fast`, and the distance to a wanted energy."""

from __future__ import annotations

import numpy as np

from catmllm.config import GAGRPOConfig


def energy_reward(predicted: np.ndarray, target: np.ndarray, lam: float) -> np.ndarray:
    """exp(-lam |E_pred - E*|) in (0, 1] (paper Eq. 5 with the sign its text means); 0 where E_pred is NaN."""
    return np.where(np.isnan(predicted), 0.0, np.exp(-lam * np.abs(np.nan_to_num(predicted) - target)))


def design_reward(
    pvcp: np.ndarray, predicted: np.ndarray, target: np.ndarray, config: GAGRPOConfig
) -> np.ndarray:
    """0.7 R_energy + 0.3 R_PVCP (paper Eq. 4); PVCP rescaled from [-15, 10] to [0,
    1] unless `raw` is asked for."""
    quality = (pvcp + 15.0) / 25.0 if config.pvcp_scale == "unit" else pvcp
    return config.energy_weight * energy_reward(predicted, target, config.energy_lambda) + (
        config.pvcp_weight * quality
    )
