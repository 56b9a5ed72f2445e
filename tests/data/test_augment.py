"""Symmetric copies are the same crystal: ASE's distances, the composition and the rows' sites say so."""

import numpy as np
import pytest
from ase.geometry import get_distances

from catmllm.data.augment import symmetric_copy
from catmllm.data.slabs import load_slabs

SYSTEMS = load_slabs()[::97]


def leans(system):
    atoms = system.positions[system.tags == 2]
    return np.linalg.norm((atoms[1:] - atoms[0]).sum(0)[:2]) > 0.3


def spectrum(system):
    _, d = get_distances(system.positions, cell=system.lattice, pbc=True)
    pairs = [
        (*sorted(z), round(x, 4))
        for z, x in zip(
            np.stack(np.broadcast_arrays(system.numbers[:, None], system.numbers[None]), -1)
            .reshape(-1, 2)
            .tolist(),
            d.ravel().tolist(),
        )
    ]
    return np.array(sorted(pairs))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.sid)
def test_copy_is_the_same_crystal_with_rows_at_their_sites(system) -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(6):
        copy = symmetric_copy(system, rng)
        changed += not np.allclose(copy.frac, system.frac)
        np.testing.assert_allclose(spectrum(copy), spectrum(system), atol=2e-3)
        assert (
            copy.target == system.target and copy.identity == system.identity and copy.energy == system.energy
        )
        assert (copy.numbers[copy.tags == 2] == system.numbers[system.tags == 2]).all()
        slab = system.tags != 2
        apart = copy.frac[slab] - system.frac[slab]
        apart -= np.round(apart)
        assert np.linalg.norm(apart @ system.lattice, axis=1).max() <= 0.9
    assert changed >= 2 or leans(system)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.sid)
def test_the_adsorbate_comes_to_one_place_of_its_site(system) -> None:
    """Of the four translations of a 2x2 cell one brings it to within a quarter of an edge of a third: a
    window of half an edge, in which a site has one place."""
    rng = np.random.default_rng(0)
    places = []
    for _ in range(20):
        copy = symmetric_copy(system, rng)
        anchor = copy.frac[copy.tags == 2][0, :2]
        # relaxed atoms of the lowest layer, which the translations are read from, are off by less than 0.02
        assert np.abs(anchor - 1 / 3).max() <= 0.27
        places.append(anchor)
    assert (
        len(np.unique(np.round(places, 3), axis=0)) > 1
        or np.allclose(places[0], 0.5, atol=0.03)
        or leans(system)
    )


@pytest.mark.parametrize(("miller", "low", "high"), [((1, 0, 0), 0, 45), ((1, 1, 1), -30, 30)])
def test_a_molecule_that_leans_does_so_in_one_sector(miller, low, high) -> None:
    """Starts of OH, which lean anywhere, in all but the few whose slabs a turn does not carry."""
    angles = []
    for k, system in enumerate(s for s in load_slabs() if s.adsorbate == "OH" and s.miller == miller):
        copy = symmetric_copy(system.frame(0.0), np.random.default_rng(k))
        v, _ = get_distances(*copy.positions[copy.tags == 2][:, None], cell=copy.lattice, pbc=True)
        angles.append(np.degrees(np.arctan2(v[0, 0, 1], v[0, 0, 0])))
    inside = [low - 1 <= angle <= high + 1 for angle in angles]
    assert len(inside) > 100 and np.mean(inside) > 0.97
    assert np.ptp(np.array(angles)[inside]) > 0.8 * (high - low)  # drawn within it, as the data has them


def test_both_facets_have_their_full_symmetry() -> None:
    from catmllm.data.augment import _isometries

    for system in SYSTEMS:
        expected = 12 if system.miller == (1, 1, 1) else 8
        assert len(_isometries(system.lattice.tobytes())) == expected


def test_a_high_vacuum_makes_no_symmetry() -> None:
    """Edges of 5 and 5.2 Å were alike under 60 Å."""
    from catmllm.data.augment import _isometries

    for height in (20.0, 60.0, 200.0):
        assert len(_isometries(np.diag([5.0, 5.0, height]).tobytes())) == 8
        assert len(_isometries(np.diag([5.0, 5.2, height]).tobytes())) == 4


def test_the_start_goes_along() -> None:
    """What moved during the relaxation moved as far in the copy."""
    rng = np.random.default_rng(1)
    for system in SYSTEMS:
        copy = symmetric_copy(system, rng)
        way = [
            np.linalg.norm((s.frac - s.start - np.round(s.frac - s.start)) @ s.lattice, axis=1)
            for s in (system, copy)
        ]
        # the turns are isometries of a lattice that is rounded to 1e-5 Å
        np.testing.assert_allclose(np.sort(way[0]), np.sort(way[1]), atol=1e-5)
        np.testing.assert_allclose(spectrum(copy.frame(0.0)), spectrum(system.frame(0.0)), atol=2e-3)
