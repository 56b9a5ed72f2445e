"""The closed loop's reward: both parts by their formulas, and PVCP made from the configuration."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catmllm.config import GAGRPOConfig, RewardConfig
from catmllm.design.reward import design_reward, energy_reward
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System
from rewards_fast import min_distance

energies = st.floats(-20, 20)


@given(predicted=energies, target=energies, lam=st.floats(0.01, 5))
def test_the_energy_reward_lies_in_0_1(predicted: float, target: float, lam: float) -> None:
    r = float(energy_reward(np.array([predicted]), np.array([target]), lam)[0])
    assert r == pytest.approx(math.exp(-lam * abs(predicted - target)))
    assert 0 < r <= 1
    assert float(energy_reward(np.array([target]), np.array([target]), lam)[0]) == 1.0


def test_what_has_no_energy_has_no_energy_reward() -> None:
    r = energy_reward(np.array([np.nan, np.inf, -np.inf, -1.0]), np.full(4, -1.0), 1.0)
    assert r.tolist() == [0.0, 0.0, 0.0, 1.0]


@given(pvcp=st.floats(-15, 10), predicted=energies, target=energies, scale=st.sampled_from(["unit", "raw"]))
def test_the_design_reward_is_eq_4(pvcp: float, predicted: float, target: float, scale: str) -> None:
    config = GAGRPOConfig(pvcp_scale=scale)  # type: ignore[arg-type]
    quality = (pvcp + 15) / 25 if scale == "unit" else pvcp
    expected = 0.7 * math.exp(-abs(predicted - target)) + 0.3 * quality
    r = design_reward(np.array([pvcp]), np.array([predicted]), np.array([target]), config)
    assert float(r[0]) == pytest.approx(expected)
    if scale == "unit":
        assert 0 <= float(r[0]) <= 1 + 1e-12


def test_the_worst_text_has_reward_0_and_the_perfect_one_1() -> None:
    r = design_reward(
        np.array([-15.0, 10.0]), np.array([np.nan, -2.0]), np.array([-2.0, -2.0]), GAGRPOConfig()
    )
    np.testing.assert_allclose(r, [0.0, 1.0])


def test_weights_and_lambda_are_settings() -> None:
    config = replace(GAGRPOConfig(), energy_weight=0.4, pvcp_weight=0.6, energy_lambda=2.0)
    r = design_reward(np.array([10.0]), np.array([-1.0]), np.array([-1.5]), config)
    assert float(r[0]) == pytest.approx(0.4 * math.exp(-1.0) + 0.6)


def test_pvcp_has_the_configurations_weights_and_distances(train_systems: list[System]) -> None:
    hydroxyls = (s for s in train_systems if s.adsorbate == "OH")
    system = next(s for s in hydroxyls if 0.7 < min_distance(s.lattice, s.frac) < 0.995)
    text, target = write_cif(system), system.target
    default = RewardConfig().scorer().score([text], [target])
    strict = RewardConfig(near=1.0).scorer().score([text], [target])
    assert default.total[0] == pytest.approx(10.0)
    assert strict.total[0] == pytest.approx(10.0 - 0.1 * 3.0)  # Eq. 41 hits the O-H bond of 0.98 A
    weighted = RewardConfig(comp=0.0, parse=1.0, valid=0.0, phys=0.0).scorer().score(["garbage"], [target])
    assert weighted.total[0] == -20.0
    assert RewardConfig(close=3.0, near=3.0).scorer().score([text], [target]).phys[0] == pytest.approx(2.0)
