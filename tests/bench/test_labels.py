"""How candidates for labels are held against DFT: sites, offsets and the claims that come of them."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111

from bench import labels
from catmllm.data.fcc_slabs import ADSORBATES, FCC_CONSTANT
from tests.data.toy_calculator import egg_box


@pytest.mark.parametrize("name", ["O", "CO"])
def test_the_hollow_is_that_of_ase(name: str) -> None:
    start = labels.in_hollow("Pt", labels.bare_slab("Pt").structure.positions, name)
    slab = fcc111("Pt", (2, 2, 3), a=FCC_CONSTANT["Pt"], vacuum=5.0, periodic=True)
    add_adsorbate(slab, name[0], ADSORBATES[name].heights[2], "fcc")
    expected, ours = slab.positions[-1], start.structure.positions[12]
    apart = np.linalg.solve(slab.cell[:].T, ours - expected)
    np.testing.assert_allclose(apart - np.round(apart * 2) / 2 * [1, 1, 0], 0, atol=1e-6)
    assert start.structure.free is not None and start.structure.free.sum() == len(ADSORBATES[name].symbols)


def test_an_offset_an_adsorbate_costs_nothing() -> None:
    names = ["H", "O"] * 5
    wanted = np.arange(10.0)
    said = wanted + [7.0, -3.0] * 5
    said[4] += 1.0
    assert labels.offset_error(said.tolist(), wanted.tolist(), names) == pytest.approx(0.1)
    np.testing.assert_allclose(labels.centred(wanted.tolist(), names), [-4, -4, -2, -2, 0, 0, 2, 2, 4, 4])


def test_claims_are_of_the_parts_that_were_measured() -> None:
    published = labels.beside_published(egg_box(), quick=True)
    assert np.isfinite([published["published"], published["nickel"]]).all()
    assert set(published["energies"]) == set(labels.PUBLISHED)
    slabs = {"r": 0.9, "mae": 0.1, "seconds": 0.1}
    names = {c["claim"] for c in labels.claims({"a": slabs}, 32)}
    assert names == {"labels_r", "labels_mae", "labels_seconds"}
    more = {c["claim"] for c in labels.claims({"a": slabs | published}, 32)}
    assert more - names == {"labels_published", "labels_nickel"}
