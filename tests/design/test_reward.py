"""The rewards of the RL stages: their parts by their formulas, and PVCP made from the configuration."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import laplace

from catmllm.config import GAGRPOConfig, RewardConfig
from catmllm.design.reward import (
    PVCP_TERMS,
    TERMS,
    AnswerReward,
    design_reward,
    distances,
    energy_reward,
    expected_distance,
)
from catmllm.structure.cif import write_cif
from catmllm.structure.system import System
from rewards_fast import min_distance

energies = st.floats(-20, 20)


@given(predicted=energies, target=energies, lam=st.floats(0.01, 5))
def test_the_energy_reward_lies_in_0_1(predicted: float, target: float, lam: float) -> None:
    r = float(energy_reward(np.array([abs(predicted - target)]), lam)[0])
    assert r == pytest.approx(math.exp(-lam * abs(predicted - target)))
    assert 0 < r <= 1
    assert float(energy_reward(np.zeros(1), lam)[0]) == 1.0


def test_what_has_no_energy_has_no_energy_reward() -> None:
    r = energy_reward(np.array([np.nan, np.inf, 0.0]), 1.0)
    assert r.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("off, error", [(0.0, 0.3), (0.2, 0.1), (-0.4, 0.4), (1.5, 0.2)])
def test_the_expected_distance_is_laplaces(off: float, error: float) -> None:
    expected = laplace(loc=off, scale=error).expect(abs, lb=-30, ub=30, points=[0.0, off])
    found = expected_distance(np.array([off - 1.0]), np.array([-1.0]), np.array([error]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_expected_errors_count_by_setting_only() -> None:
    predicted, target, errors = (
        np.array([-1.0, -1.0, np.nan, -2.0]),
        np.full(4, -1.0),
        np.array([0.1, 0.4, 0.1, np.nan]),
    )
    plain = distances(predicted, target, errors, GAGRPOConfig())
    np.testing.assert_array_equal(plain, [0.0, 0.0, np.nan, 1.0])
    doubtful = distances(predicted, target, errors, GAGRPOConfig(expected_error=True))
    np.testing.assert_allclose(doubtful, [0.1, 0.4, np.nan, 1.0])  # unknown: the prediction's own


@given(pvcp=st.floats(-15, 10), predicted=energies, target=energies, scale=st.sampled_from(["unit", "raw"]))
def test_the_design_reward_is_eq_4(pvcp: float, predicted: float, target: float, scale: str) -> None:
    config = GAGRPOConfig(pvcp_scale=scale)  # type: ignore[arg-type]
    quality = (pvcp + 15) / 25 if scale == "unit" else pvcp
    expected = 0.7 * math.exp(-abs(predicted - target)) + 0.3 * quality
    for fault, more in (("broken", 0.0), (None, 0.3)):
        r = design_reward(np.array([pvcp]), [fault], np.array([abs(predicted - target)]), config)
        assert float(r[0]) == pytest.approx(expected + more)
        if scale == "unit":
            assert 0 <= float(r[0]) <= 1.3 + 1e-12


@pytest.mark.parametrize("weights", [{}, {"comp": 1.0}, {"comp": 0.0, "parse": 2.0}])
def test_the_worst_text_has_reward_0_and_the_perfect_one_the_sum_of_weights(
    train_systems: list[System], weights: dict[str, float]
) -> None:
    """Whatever PVCP's own weights are."""
    config = GAGRPOConfig(reward=RewardConfig(**weights))
    system = train_systems[0]
    pvcp = config.reward.scorer().score(["", write_cif(system)], system.target).total
    r = design_reward(pvcp, ["no_adsorbate", None], np.array([np.nan, 0.0]), config)
    np.testing.assert_allclose(r, [0.0, 1.3], atol=1e-12)


def test_without_any_term_of_pvcp_energy_and_adsorbate_are_left() -> None:
    config = GAGRPOConfig(reward=RewardConfig(comp=0.0, parse=0.0, valid=0.0, phys=0.0))
    r = design_reward(np.zeros(2), ["broken", None], np.array([np.nan, 0.0]), config)
    np.testing.assert_allclose(r, [0.0, 1.0], atol=1e-12)


def test_an_answer_has_pvcp_and_its_adsorbate(train_systems: list[System]) -> None:
    """PVCP sees nothing wrong with a CO whose atoms are 3 Å apart."""
    system = next(s for s in train_systems if s.adsorbate == "CO")
    apart = system.frac.copy()
    apart[-1] = np.linalg.solve(system.lattice.T, system.positions[-1] + [0, 0, 2.0])
    texts = [
        write_cif(system),
        write_cif(replace(system, frac=apart)),
        "garbage",
        write_cif(train_systems[0]),
    ]
    pvcp = RewardConfig().scorer().score(texts, system.target)
    assert pvcp.total[:2].tolist() == [10.0, 10.0]
    found = AnswerReward(RewardConfig(), 0.5)(texts, [system] * 4)
    assert found.terms["adsorbate"].tolist()[:3] == [10.0, -10.0, -10.0]
    np.testing.assert_array_equal(found.total, pvcp.total + 0.5 * found.terms["adsorbate"])
    assert found.reason == pvcp.reason and set(found.terms) == set(TERMS)
    for name in PVCP_TERMS:
        np.testing.assert_array_equal(found.terms[name], getattr(pvcp, name))
    np.testing.assert_array_equal(AnswerReward(RewardConfig(), 0.0)(texts, [system] * 4).total, pvcp.total)


def test_weights_and_lambda_are_settings() -> None:
    config = replace(
        GAGRPOConfig(), energy_weight=0.4, pvcp_weight=0.6, energy_lambda=2.0, adsorbate_weight=0.1
    )
    r = design_reward(np.array([10.0]), [None], np.array([0.5]), config)
    assert float(r[0]) == pytest.approx(0.4 * math.exp(-1.0) + 0.6 + 0.1)


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
