"""The nearest site of a surface, against where ASE puts its own; all of them, against pymatgen's."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from ase.build import add_adsorbate, bcc110, fcc100, fcc111
from pymatgen.analysis.adsorption import AdsorbateSiteFinder
from pymatgen.core.surface import Slab
from pymatgen.io.ase import AseAtomsAdaptor

from catmllm.data.fcc_slabs import build_slab
from catmllm.structure.descriptors import surroundings
from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.sites import CONTACT, different_sites, on_site, surface_sites
from catmllm.structure.system import System, make_system
from catmllm.structure.tags import heights

BUILT = {
    "fcc111": (fcc111, ("ontop", "bridge", "fcc", "hcp")),
    "fcc100": (fcc100, ("ontop", "bridge", "hollow")),
    # its hollow is no middle of a triangle: ASE has it 0.17 Å from there
    "bcc110": (bcc110, ("ontop", "longbridge", "shortbridge")),
}


def placed(build: str, site: str, height: float, aside: np.ndarray) -> System:
    """CO over a site of ASE's, at a height (Å), moved along the surface [2] (Å)."""
    make, _ = BUILT[build]
    metal = "Fe" if build == "bcc110" else "Pt"
    atoms = make(metal, (3, 3, 3), vacuum=8.0, periodic=True)
    n = len(atoms)
    add_adsorbate(atoms, "C", height, site, offset=(1, 1))
    add_adsorbate(atoms, "O", height + 1.16, site, offset=(1, 1))
    atoms.positions[n:, :2] += aside
    top = heights(atoms.cell[:], atoms.get_scaled_positions()[:n])
    tags = [*np.where(top > top.max() - 0.5, 1, 0), 2, 2]
    return make_system(atoms.cell[:], atoms.positions, atoms.numbers, tags, "CO", (1, 1, 1))


@pytest.mark.parametrize(("build", "site"), [(b, s) for b, (_, sites) in BUILT.items() for s in sites])
def test_an_adsorbate_goes_to_the_site_that_it_is_near(build: str, site: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        way = rng.normal(size=2)
        aside = 0.15 * way / np.linalg.norm(way)
        system = placed(build, site, rng.uniform(0.8, 2.5), aside)
        wanted = placed(build, site, 0.0, np.zeros(2))
        moved = on_site(replace(system, relaxed=False))
        apart = moved.frac - wanted.frac
        apart[:, 2] = 0.0
        assert np.linalg.norm((apart - np.round(apart)) @ system.lattice, axis=1).max() < 1e-3
        # the slab and the molecule are as they were
        np.testing.assert_allclose(moved.positions[:-2], system.positions[:-2], atol=1e-9)
        bonds = [s.positions[-1] - s.positions[-2] for s in (moved, system)]
        np.testing.assert_allclose(bonds[0], bonds[1], atol=1e-9)
        # C touches the slab
        slab = moved.positions[:-2][:, None] + _images(moved)
        radii = COVALENT_RADIUS[moved.numbers[:-2]][:, None] + COVALENT_RADIUS[6]
        assert (np.linalg.norm(slab - moved.positions[-2], axis=2) / radii).min() == pytest.approx(CONTACT)


_CELLS = np.array([[i, j, 0] for i in (-1, 0, 1) for j in (-1, 0, 1)])


def _images(system: System) -> np.ndarray:
    return _CELLS @ system.lattice


def test_a_site_is_the_same_wherever_the_cell_begins() -> None:
    system = placed("fcc111", "fcc", 1.4, np.array([0.1, -0.05]))
    first = on_site(system)
    for shift in ([0.3, 0.8, 0.0], [0.95, 0.1, 0.0]):
        again = on_site(replace(system, frac=system.frac + shift))
        apart = again.frac - first.frac - shift
        assert np.abs((apart - np.round(apart)) @ system.lattice).max() < 1e-9


def test_only_what_is_not_relaxed_is_moved() -> None:
    """How high a start was put changes nothing of its description, but what of a relaxed structure's."""
    low, high = (placed("fcc111", "fcc", h, np.array([0.1, 0.0])) for h in (1.2, 1.9))
    assert np.abs(surroundings(low) - surroundings(high)).max() > 0.01
    starts = [surroundings(replace(s, relaxed=False)) for s in (low, high)]
    np.testing.assert_allclose(*starts, atol=1e-9)


def test_without_a_surface_nothing_moves(train_systems: list[System]) -> None:
    system = replace(train_systems[0], relaxed=False)
    bare = replace(system, tags=np.zeros_like(system.tags))
    assert on_site(bare) is bare
    # two atoms a layer: a line of atoms has no triangle
    keep = [0, 1, len(system) - 1]
    line = make_system(
        system.lattice, system.positions[keep], system.numbers[keep], [1, 0, 2], system.adsorbate, (1, 1, 1)
    )
    assert np.isfinite(on_site(line).positions).all()


@pytest.mark.parametrize("facet", ["111", "100"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_all_sites_are_those_of_pymatgen(facet: str, share: float) -> None:
    """Every site, by name, and of those that symmetry tells apart one of each kind. pymatgen's triangles
    halve the square of (100), so that its middle is a bridge to it."""
    atoms = build_slab(facet, "Pt", "Cu", share, Random(1)).atoms
    slab = make_system(atoms.cell[:], atoms.positions, atoms.numbers, [0] * 8 + [1] * 4, "", (1, 1, 1))
    structure = AseAtomsAdaptor.get_structure(atoms)
    finder = AdsorbateSiteFinder(
        Slab(structure.lattice, structure.species, structure.frac_coords, (0, 0, 1), structure, 0, np.eye(3)),
        height=0.9,
    )
    names = {"top": "ontop", "bridge": "bridge", "hollow": "hollow" if facet == "111" else "bridge"}
    inverse = np.linalg.inv(slab.lattice[:2, :2])

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        apart = (a[:2] - b[:2]) @ inverse
        return bool(np.abs(apart - np.round(apart)).max() < 1e-4)

    theirs = finder.find_adsorption_sites(distance=0, symm_reduce=0, put_inside=True)
    ours = surface_sites(slab)
    assert len(ours) == len(theirs["all"]) == (24 if facet == "111" else 16)
    for kind, name in names.items():
        mine = [s.centre for s in ours if s.kind == kind]
        assert mine and all(any(same(site, other) for other in theirs[name]) for site in mine)
    for site in ours:  # between which atoms: those of the top layer that are nearest
        flat = (slab.frac[8:, None] + _CELLS) @ slab.lattice - site.centre
        nearest = np.argsort(np.linalg.norm(flat, axis=-1).ravel(), kind="stable")[: len(site.symbols)]
        assert sorted(np.repeat(slab.symbols[8:], len(_CELLS))[nearest]) == list(site.symbols)
    chosen = different_sites(slab, 99)
    if not share:
        reduced = finder.find_adsorption_sites(distance=0, put_inside=True)
        assert len(chosen) == len(reduced["all"]) == (4 if facet == "111" else 3)
        assert [s.kind for s in chosen].count("hollow") == len(chosen) - 2
    assert len({(s.kind, s.symbols, s.below) for s in chosen}) == len(chosen) > 2
    assert [s.kind for s in different_sites(slab, 2)] == [s.kind for s in chosen[:2]]
    assert surface_sites(replace(slab, tags=np.zeros_like(slab.tags))) == []
