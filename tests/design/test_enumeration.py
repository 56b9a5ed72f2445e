"""Ideal slabs have what was asked for, obey every constraint, and are the shipped systems' own starts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from pymatgen.analysis.adsorption import AdsorbateSiteFinder
from pymatgen.core.surface import Slab
from pymatgen.io.ase import AseAtomsAdaptor

from catmllm.data.fcc_slabs import ADSORBATES, N_SLAB, build_slab, draw_site
from catmllm.data.slabs import load_slabs
from catmllm.design.constraints import adsorbate_faults, hard_constraints
from catmllm.design.enumeration import MOST_SITES, enumerable, ideal_slab, ideal_system, on_sites
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.cif import write_cif
from rewards_fast import PVCP

SYSTEMS = load_slabs()[::60]


def test_systems_have_what_is_asked_for_and_are_sound() -> None:
    rng = Random(0)
    made = [ideal_system(s.identity, rng) for s in SYSTEMS]
    for asked, system in zip(SYSTEMS, made):
        assert (system.identity, system.target) == (asked.identity, asked.target)
        assert adsorbate_fault(system) is None
    scores = PVCP().score([write_cif(s) for s in made], [s.target for s in SYSTEMS])
    assert hard_constraints(scores, adsorbate_faults(made)).all()


def test_cells_are_those_of_the_data() -> None:
    rng = Random(1)
    for asked in SYSTEMS:
        np.testing.assert_allclose(ideal_system(asked.identity, rng).lattice, asked.lattice, atol=2e-5)


def test_arrangements_and_sites_differ() -> None:
    rng = Random(2)
    identity = next(s.identity for s in SYSTEMS if len(s.slab_counts) == 2)
    made = [ideal_system(identity, rng) for _ in range(20)]
    assert len({s.numbers.tobytes() for s in made}) > 10
    assert len({s.frac.round(3).tobytes() for s in made}) == 20


@pytest.mark.parametrize(
    ("facet", "calls"),
    [
        ("111", {"top": "ontop", "bridge": "bridge", "hollow": "hollow"}),
        # pymatgen triangulates the square of (100), so that its middle lies on an edge: a bridge to it
        ("100", {"top": "ontop", "bridge": "bridge", "hollow": "bridge"}),
    ],
)
def test_sites_are_those_of_pymatgen(facet: str, calls: dict[str, str]) -> None:
    """Every site that may be drawn is one of pymatgen's AdsorbateSiteFinder, by name too, and the other way
    round."""
    slab = build_slab(facet, "Pt", "Cu", 0.25, Random(0))
    structure = AseAtomsAdaptor.get_structure(slab.atoms)
    pymatgen = Slab(
        structure.lattice, structure.species, structure.frac_coords, (0, 0, 1), structure, 0, np.eye(3)
    )
    found = AdsorbateSiteFinder(pymatgen, height=0.9).find_adsorption_sites(
        distance=0, symm_reduce=0, put_inside=True
    )
    plane = np.linalg.inv(slab.atoms.cell[:2, :2])
    theirs = {kind: [point[:2] @ plane for point in points] for kind, points in found.items()}
    rng = Random(1)
    drawn = [draw_site(slab, rng) for _ in range(2000)]
    ours = [(kind, centre[:2] @ plane) for kind, _, centre in drawn]

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(np.abs(a - b - np.round(a - b)).max() < 1e-4)

    for kind, site in ours:
        assert any(same(site, other) for other in theirs[calls[kind]])
    for other in theirs["all"]:
        assert any(same(site, other) for _, site in ours)


def test_adsorbates_on_every_site_of_a_slab_are_sound() -> None:
    rng = Random(3)
    for asked in SYSTEMS:
        slab = ideal_slab(asked.identity, rng)
        assert (slab.slab_formula, slab.miller) == (asked.slab_formula, asked.miller)
        assert len(slab) == N_SLAB and not slab.relaxed
        for name in ADSORBATES:
            made = on_sites(slab, name)
            assert 3 <= len(made) <= MOST_SITES
            for system in made:
                assert (system.adsorbate, system.slab_formula) == (name, asked.slab_formula)
                assert adsorbate_fault(system) is None and not system.relaxed
                np.testing.assert_array_equal(system.positions[:N_SLAB], slab.positions)


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        ("CO</s>Pt12 (2 1 1)", "facet"),
        ("CO2</s>Pt12 (1 1 1)", "adsorbate CO2"),
        ("CO</s>Fe12 (1 1 1)", "constant of Fe"),
        ("CO</s>Pt16 (1 1 1)", "no slab of 12"),
        ("CO</s>Pt10Cu2 (1 1 1)", "no slab of 12"),
    ],
)
def test_what_cannot_be_made_is_said(identity: str, reason: str) -> None:
    assert reason in str(enumerable(identity))
    with pytest.raises(ValueError, match=reason):
        ideal_system(identity, Random(0))
