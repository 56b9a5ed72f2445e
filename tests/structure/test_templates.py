"""What slabs and molecules of the data have in common, against ASE's builders and structures that have
nothing in common."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from catmllm.data.fcc_slabs import FCC_CONSTANT, build_slab
from catmllm.structure.system import ADSORBATE, System, lattice_parameters, make_system
from catmllm.structure.templates import NONE, Templates


@pytest.fixture(scope="module")
def templates(train_systems: list[System]) -> Templates:
    return Templates.fit([s.frame(0.0) for s in train_systems])


@pytest.mark.parametrize("facet", ["111", "100"])
def test_the_recipe_builds_what_ase_builds(templates: Templates, facet: str) -> None:
    """Of all 72 compositions of two metals, more than training has: the cell, and the layers that do not
    relax; the top layer moves by less than half of a layer."""
    miller = (1, 1, 1) if facet == "111" else (1, 0, 0)
    rng = Random(0)
    for host in FCC_CONSTANT:
        for guest in FCC_CONSTANT:
            slab = build_slab(facet, host, guest, 0.25, rng)
            counts = Counter(slab.atoms.get_chemical_symbols())
            template = templates.slab(counts, miller, 3)
            assert template is not None
            cell = np.array(lattice_parameters(slab.atoms.cell[:]))
            assert np.abs(template.cell - cell[:, None]).max() < 1e-3
            off = slab.atoms.get_scaled_positions() - template.sites
            off = np.abs(off - np.round(off))
            assert (off[:8] <= template.off[:8]).all()
            assert (off[8:] * cell[:3]).max() < 0.6
            assert (template.off[8:] * cell[:3]).max() < 0.6
            for layer, rows in zip(template.layers, np.split(np.array(slab.atoms.get_chemical_symbols()), 3)):
                assert layer == Counter(rows.tolist())


def test_other_slabs_have_none(templates: Templates) -> None:
    pt = {"Pt": 12}
    assert templates.slab(pt, (1, 1, 1), 3) is not None
    assert templates.slab({"Fe": 12}, (1, 1, 1), 3) is None
    assert templates.slab({"Pt": 16}, (1, 1, 1), 3) is None
    assert templates.slab(pt, (2, 1, 1), 3) is None
    assert templates.slab(pt, None, 3) is None
    assert NONE.slab(pt, (1, 1, 1), 3) is None
    # 11 and 1 atoms cannot be shared out over three layers
    uneven = templates.slab({"Pt": 11, "Au": 1}, (1, 1, 1), 3)
    assert uneven is not None and uneven.layers == ()


def test_slabs_that_are_not_built_alike_have_no_recipe(train_systems: list[System]) -> None:
    """Cells strained at random, sites moved at random, elements at random places, and too few of them."""
    rng = np.random.default_rng(0)
    some = [s.frame(0.0) for s in train_systems[::4]]
    assert len(Templates.fit(some).recipes) == 2

    def strained(s: System) -> System:
        lattice = s.lattice * rng.uniform(0.9, 1.1)
        return make_system(lattice, None, s.numbers, s.tags, s.adsorbate, s.miller, frac=s.frac)

    def mixed(s: System) -> System:
        numbers = s.numbers.copy()
        slab = np.flatnonzero(s.tags != ADSORBATE)
        numbers[slab] = rng.permutation(numbers[slab])
        return replace(s, numbers=numbers)

    assert not Templates.fit([strained(s) for s in some]).recipes
    assert not Templates.fit(
        [replace(s, frac=s.frac + rng.normal(0, 0.1, s.frac.shape)) for s in some]
    ).recipes
    assert [r.layers for r in Templates.fit([mixed(s) for s in some]).recipes.values()] == [[], []]
    assert not Templates.fit(some[:40]).recipes


def test_molecules_are_as_they_are_placed(templates: Templates) -> None:
    """CO stands upright with 1.16 Å, OH leans with its O first; an atom has no shape."""
    assert set(templates.shapes) == {"CH", "CO", "NH", "OH"}
    assert templates.shape("CO") == {("O", "C"): pytest.approx((1.14, 1.18, 1.14, 1.18), abs=1e-3)}
    length = (0.60**2 + 0.30**2 + 0.75**2) ** 0.5
    wanted = (length - 0.02, length + 0.02, 0.73, 0.77)
    assert templates.shape("OH") == {("H", "O"): pytest.approx(wanted, abs=1e-3)}
    assert templates.shape("H") == {} == NONE.shape("CO")


def test_a_molecule_is_known_from_twenty_systems(train_systems: list[System]) -> None:
    of_co = [s for s in train_systems if s.adsorbate == "CO"]
    assert not Templates.fit(of_co[:19]).shapes
    (relaxed,) = Templates.fit(of_co[:20]).shape("CO").values()
    lengths = [np.linalg.norm(s.positions[-1] - s.positions[-2]) for s in of_co[:20]]
    assert relaxed[0] < np.median(lengths) < relaxed[1] < 1.3


def test_what_is_saved_is_read_again(templates: Templates, tmp_path: Path) -> None:
    templates.save(tmp_path)
    assert Templates.load(tmp_path) == templates
    assert Templates.load(tmp_path / "nothing") == NONE
