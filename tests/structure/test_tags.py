"""Tags of bare crystals: against the known tags of shipped and real systems,
and where the vacuum is elsewhere."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.analysis.adsorption import AdsorbateSiteFinder
from pymatgen.core import Structure

from catmllm.data.slabs import load_slabs
from catmllm.structure.elements import SYMBOLS
from catmllm.structure.formula import count_elements, parse_formula
from catmllm.structure.system import System
from catmllm.structure.tags import LAYER_HEIGHT, heights, surface_tags
from tests.structure.systems import rotations, slabs


def _tags(system: System) -> list[int]:
    return surface_tags(system.lattice, system.frac, system.numbers, parse_formula(system.adsorbate)).tolist()


def test_shipped_systems() -> None:
    for system in load_slabs():
        assert _tags(system) == system.tags.tolist()


def test_surface_layer_is_pymatgens() -> None:
    for system in load_slabs()[::200]:
        slab = system.tags != 2
        structure = Structure(system.lattice, [SYMBOLS[z] for z in system.numbers[slab]], system.frac[slab])
        found = AdsorbateSiteFinder(structure, height=LAYER_HEIGHT).slab.site_properties["surface_properties"]
        assert [tag == 1 for tag in _tags(system) if tag != 2] == [kind == "surface" for kind in found]


@given(slabs(), st.floats(-2, 2), rotations())
def test_the_vacuum_decides_not_the_cell(system: System, shift: float, rotation: np.ndarray) -> None:
    """Moving the slab through the cell boundary, or turning the cell, changes no tag."""
    moved = system.frac + [0.3 * shift, -shift, shift]
    tags = surface_tags(system.lattice @ rotation, moved, system.numbers, parse_formula(system.adsorbate))
    assert np.flatnonzero(tags == 2).tolist() == np.flatnonzero(system.tags == 2).tolist()
    assert tags.tolist() == _tags(system)


@given(slabs(), st.integers(0, 2**32 - 1))
def test_permutation(system: System, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(system))
    tags = surface_tags(
        system.lattice, system.frac[order], system.numbers[order], parse_formula(system.adsorbate)
    )
    assert tags.tolist() == np.array(_tags(system))[order].tolist()


def test_heights_count_from_the_upper_side_of_the_vacuum() -> None:
    lattice = np.diag([3.0, 3.0, 20.0])
    frac = np.array([[0, 0, 0.95], [0, 0, 0.05], [0, 0, 0.15]])
    np.testing.assert_allclose(heights(lattice, frac), [0.0, 2.0, 4.0], atol=1e-12)
    skewed = lattice + [[0, 0, 0], [0, 0, 0], [7.0, 3.0, 0]]
    np.testing.assert_allclose(heights(skewed, frac), [0.0, 2.0, 4.0], atol=1e-12)
    single = heights(lattice, np.array([[0.2, 0.3, 0.7]]))
    assert single.tolist() == [0.0]


def test_adsorbate_of_an_element_of_the_slab_is_the_highest() -> None:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    add_adsorbate(atoms, "Cu", 2.1, "fcc")
    tags = surface_tags(
        atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers.astype(np.int64), {"Cu": 1}
    )
    assert tags.tolist() == [0] * 8 + [1] * 4 + [2]


def test_equal_heights_take_the_later_atom() -> None:
    frac = np.array([[0, 0, 0.1], [0, 0, 0.3], [0.5, 0.5, 0.3]])
    tags = surface_tags(np.diag([4.0, 4, 15]), frac, np.array([46, 8, 8]), {"O": 1})
    assert tags.tolist() == [0, 1, 2]


def test_missing_atoms() -> None:
    with pytest.raises(ValueError, match="needs 2 O, the crystal has 1"):
        surface_tags(np.diag([4.0, 4, 15]), np.zeros((2, 3)), np.array([46, 8]), {"O": 2})


def test_clean_slab_has_no_adsorbate() -> None:
    assert surface_tags(np.diag([4.0, 4, 15]), np.zeros((1, 3)), np.array([46]), {}).tolist() == [1]


def test_real_oc20_adsorbates(shared: Path) -> None:
    """First and last frames of real relaxations in their own cells, some of oxides and nitrides."""
    text = gzip.decompress((shared / "data/oc20/oc20_30_init_relaxed.extxyz.gz").read_bytes()).decode()
    frames = ase.io.read(io.StringIO(text), ":", format="extxyz")
    right = 0
    for atoms in frames:
        mask = atoms.get_tags() == 2
        adsorbate = count_elements(atoms[mask].get_chemical_symbols())
        tags = surface_tags(
            atoms.cell[:], atoms.get_scaled_positions(wrap=False), atoms.numbers.astype(np.int64), adsorbate
        )
        assert (tags == 2).sum() == mask.sum()
        right += (np.flatnonzero(tags == 2) == np.flatnonzero(mask)).all()
    assert len(frames) == 60
    assert right == 60
