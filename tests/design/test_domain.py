"""What a model has seen, and the errors that its predictions are given with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from catmllm.data.slabs import load_slabs
from catmllm.design.domain import calibrate, domain_of, load_domain, shape

SYSTEMS = load_slabs()[::10]


def test_training_systems_lie_inside_and_others_do_not(tmp_path: Path) -> None:
    domain = domain_of(SYSTEMS, "SevenNet-0", "gas H2")
    inside = [not domain.outside(s) for s in load_slabs()[5::50]]
    assert np.mean(inside) > 0.97
    system = next(s for s in SYSTEMS if s.adsorbate == "O")
    assert "adsorbate S not in training" in domain.outside(replace(system, adsorbate="S"))
    numbers = system.numbers.copy()
    numbers[0] = 44
    assert "Ru in no training slab" in domain.outside(replace(system, numbers=numbers))[0]
    up = system.frac + np.outer(system.tags == 2, [0, 0, 3.5 / system.lattice[2, 2]])
    assert "adsorbate-slab distance" in "; ".join(domain.outside(replace(system, frac=up)))
    assert any("one adsorbate on" in o for o in domain.outside(replace(system, adsorbate="(O)4")))
    domain.save(tmp_path)
    read = load_domain(tmp_path)
    assert read is not None and read.outside(system) == [] and read.reference == "gas H2"
    assert load_domain(tmp_path / "none") is None


def test_the_nearest_distances_are_those_of_ase() -> None:
    from ase.data import covalent_radii
    from ase.neighborlist import neighbor_list

    for system in SYSTEMS[:5]:
        i, j, d = neighbor_list("ijd", system.as_ase(), 4.0)
        scaled = d / (covalent_radii[system.numbers[i]] + covalent_radii[system.numbers[j]])
        ads = system.tags == 2
        contact, between, area = shape(system)
        assert contact == pytest.approx(scaled[ads[i] != ads[j]].min(), rel=1e-5)
        assert between == pytest.approx(scaled[~ads[i] & ~ads[j]].min(), rel=1e-5)
        assert area == pytest.approx(system.volume / system.lattice[2, 2], rel=1e-9)


def test_intervals_hold_what_they_say() -> None:
    """Split conformal: of fresh errors of the same kind 68 % are within the half width, in expectation."""
    rng = np.random.default_rng(0)
    domain = domain_of(SYSTEMS[:20], "", None)
    held = []
    for _ in range(40):
        calibrate(domain, rng.normal(0, 0.3, 100), np.zeros(100), ["H"] * 60 + ["C"] * 40)
        width = domain.half_width("H")
        assert width is not None and domain.half_width("unknown") == domain.error[""][0]
        held.append(float((np.abs(rng.normal(0, 0.3, 2000)) <= width).mean()))
    # of 60 calibration errors the share has a standard deviation of 0.06, of 40 repeats 0.0095
    assert np.mean(held) == pytest.approx(0.685, abs=0.03)


def test_widths_follow_what_is_expected() -> None:
    """Errors as large as expected, up to one factor: 68 % are held among the sure and the doubtful."""
    rng = np.random.default_rng(0)
    domain, held = domain_of(SYSTEMS[:20], "", None), np.zeros(2)
    for _ in range(40):
        expected = rng.choice([0.1, 0.6], 100)
        calibrate(domain, rng.normal(0, 2 * expected), np.zeros(100), ["H"] * 100, expected, relaxed=False)
        widths = [domain.half_width("H", False, e) for e in (0.1, 0.6)]
        assert widths[0] is not None and widths[1] == pytest.approx(6 * widths[0])
        held += [(np.abs(rng.normal(0, 2 * e, 2000)) <= w).mean() for e, w in zip((0.1, 0.6), widths)]
    np.testing.assert_allclose(held / 40, 0.685, atol=0.03)
    assert domain.half_width("H", True, 0.1) is None  # nothing was shown relaxed
    assert domain.half_width("H", False) is None  # nothing is expected of this one
