"""The slabs, sites and records that `catmllm data make` draws."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
from ase.data import atomic_numbers, reference_states

from catmllm.data.oracle import GASES
from catmllm.data.surfaces import (
    ADSORBATES,
    CONTACT,
    FACETS,
    METALS,
    SHOWN,
    draw_site,
    draw_slab,
    place,
    surface_records,
)
from catmllm.potentials.relax import Structure
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.system import SURFACE, make_system
from tests.data.toy_calculator import egg_box

DRAWN = [draw_slab(Random(seed)) for seed in range(150)]


def test_lattice_constants_are_those_of_ase() -> None:
    for metal, (crystal, a, c) in METALS.items():
        theirs = reference_states[atomic_numbers[metal]]
        assert theirs["symmetry"] == crystal
        assert a == pytest.approx(theirs["a"], abs=0.03)
        assert not c or c == pytest.approx(theirs["a"] * theirs["c/a"], abs=0.05)


def test_every_kind_of_slab_is_drawn_and_none_is_squeezed() -> None:
    kinds, elements, strained = set(), set(), 0
    for slab in DRAWN:
        s = slab.structure
        shifts = [i * s.lattice[0] + j * s.lattice[1] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        distances = np.concatenate(
            [np.linalg.norm(s.positions[:, None] - s.positions + shift, axis=-1).ravel() for shift in shifts]
        )
        assert distances[distances > 1e-6].min() == pytest.approx(slab.nearest, rel=0.035)
        exposed = slab.tags == SURFACE
        assert 0 < exposed.sum() < len(exposed) and exposed[np.argmax(s.positions[:, 2])]
        kinds.add(slab.miller)
        elements.update(s.numbers.tolist())
        strained += slab.strain != 0
    assert kinds == {miller for facets in FACETS.values() for _, miller, _ in facets}
    assert len(elements) == len(METALS) and 30 < strained < 90


def test_adsorbates_start_whole_and_in_touch() -> None:
    rng = Random(5)
    seen = set()
    for slab in DRAWN[:60]:
        name = rng.choice(list(ADSORBATES))
        site, start = place(slab, slab.structure.positions, name, rng)
        seen.add(site)
        n = len(slab.tags)
        tags = [*slab.tags, *[2] * len(ADSORBATES[name][0])]
        system = make_system(start.lattice, start.positions, start.numbers, tags, name, slab.miller)
        assert adsorbate_fault(system) is None, (name, site, slab.miller)
        a, b = start.lattice[:2]
        nearest = np.inf
        for shift in (i * a + j * b for i in (-1, 0, 1) for j in (-1, 0, 1)):
            gaps = np.linalg.norm(start.positions[n:, None] - start.positions[:n] + shift, axis=-1)
            radii = COVALENT_RADIUS[start.numbers[n:, None]] + COVALENT_RADIUS[start.numbers[:n]]
            nearest = min(nearest, (gaps / radii).min())
        assert nearest == pytest.approx(CONTACT, abs=1e-6)
    assert seen == {"top", "bridge", "hollow"}


def test_sites_lie_between_the_atoms_of_the_surface() -> None:
    rng = Random(6)
    for slab in DRAWN[:60]:
        s = slab.structure
        for _ in range(5):
            site, centre = draw_site(slab, s.positions, rng)
            a, b = s.lattice[:2]
            top = s.positions[slab.tags == SURFACE]
            images = np.concatenate([top + i * a + j * b for i in range(-3, 4) for j in range(-3, 4)])
            gaps = np.sort(np.linalg.norm(images - centre, axis=1))
            if site == "top":
                assert gaps[0] < 1e-9
            elif site == "bridge":
                assert gaps[1] < 0.63 * slab.nearest
            else:
                assert gaps[2] < 0.85 * slab.nearest


def test_records_say_what_became_of_each() -> None:
    records = list(surface_records(Random(3), "p0-0", 6, egg_box(), dict.fromkeys(GASES, 0.25)))
    assert [r["sid"] for r in records] == [f"diep-p0-0-{k}" for k in range(6)]
    again = list(surface_records(Random(3), "p0-0", 6, egg_box(), dict.fromkeys(GASES, 0.25)))
    assert json.dumps(records) == json.dumps(again)
    for r in records:
        n = len(r["fixed"])
        assert r["ok"] == (r["reason"] is None)
        assert len(r["symbols"]) == len(r["tags"]) == len(r["pos"]) == n + len(ADSORBATES[r["adsorbate"]][0])
        assert r["pos"][:n] == r["pos_start"][:n]
        assert 0 < len(r["frames"]) <= SHOWN or r["steps"] == 0
        for frame in r["frames"]:
            assert len(frame["pos"]) == len(r["symbols"]) - n
            assert frame["energy"] >= r["energy"] - 1e-3


def test_a_potential_that_blows_up_is_recorded() -> None:
    def broken(structures: list[Structure]):
        raise np.linalg.LinAlgError("blown up")

    records = list(surface_records(Random(3), "p0-0", 2, broken, dict.fromkeys(GASES, 0.0)))
    assert [(r["ok"], r["reason"], r["energy"], r["frames"]) for r in records] == [
        (False, "slab", None, [])
    ] * 2
    assert "NaN" not in json.dumps(records)
