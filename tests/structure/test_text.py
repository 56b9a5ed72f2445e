"""Three-part texts against an independent route through ASE, and their invariances."""

from __future__ import annotations

import dataclasses
import gzip
import io
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import NeighborList
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.data.slabs import load_slabs
from catmllm.structure.periodic import bond_matrix
from catmllm.structure.system import System, make_system
from catmllm.structure.text import configuration, three_part_text
from tests.oracles.structure_ase import ase_configuration, ase_three_part_text
from tests.structure.systems import cells, rotations, slabs

SHIPPED = load_slabs()


def _expected(system: System, scale: float) -> str:
    assert system.miller is not None
    return ase_three_part_text(system.as_ase(), system.adsorbate, system.miller, scale)


def test_shipped_systems_against_ase() -> None:
    for system in SHIPPED[::6]:
        assert three_part_text(system) == _expected(system, 1.0)


def test_indicative_scale_against_ase() -> None:
    for system in SHIPPED[::300]:
        for scale in (0.5, 1.3, 4.0):
            assert three_part_text(system, scale) == _expected(system, scale)


@given(slabs(), st.sampled_from([1.0, 1.4]))
@settings(max_examples=40)
def test_generated_slabs_against_ase(system: System, scale: float) -> None:
    """Cells of one or two atoms along an edge: several images of one pair, and bonds to the own image."""
    assert three_part_text(system, scale) == _expected(system, scale)


def test_share_of_unbound() -> None:
    unbound = sum(configuration(system) == "[]" for system in SHIPPED) / len(SHIPPED)
    assert unbound == pytest.approx(0.10, abs=0.01)


def _system(
    positions: list[list[float]], symbols: str, tags: list[int], name: str, edge: float = 12.0
) -> System:
    numbers = Atoms(symbols).numbers
    return make_system(np.diag([edge, edge, 25.0]), positions, numbers, tags, name, (2, -1, 2))


def test_format_of_each_site() -> None:
    slab = [[0.0, 0, 0], [2.7, 0, 0], [1.35, 2.3, 0]]
    atop = _system([*slab, [0, 0, 1.9]], "Sb3C", [1, 1, 1, 2], "C")
    assert three_part_text(atop) == "C</s>Sb (2 -1 2)</s>[C Sb atop [Sb Sb Sb C]]"
    bridge = _system([*slab, [1.35, -0.3, 1.4]], "RhAsRhN", [1, 1, 1, 2], "N")
    assert three_part_text(bridge) == "N</s>AsRh2 (2 -1 2)</s>[N Rh As bridge [Rh As Rh N] [As Rh Rh N]]"
    hollow = _system([*slab, [1.35, 0.77, 1.2], [1.35, 0.77, 2.2]], "Rh3NH", [1, 1, 1, 2, 2], "NH")
    assert configuration(hollow) == "[N Rh Rh Rh hollow [Rh Rh Rh N] [Rh Rh Rh N] [Rh Rh Rh N]]"
    far = _system([*slab, [0, 0, 6.0]], "Rh3N", [1, 1, 1, 2], "N")
    assert three_part_text(far) == "N</s>Rh (2 -1 2)</s>[]"


def test_bundles_are_joined_without_separator() -> None:
    two = _system([[0, 0, 0], [5, 0, 0], [0, 0, 1.9], [5, 0, 1.9]], "Sb2C2", [1, 1, 2, 2], "CC")
    assert three_part_text(two) == "CC</s>Sb (2 -1 2)</s>[C Sb atop [Sb C]][C Sb atop [Sb C]]"


def test_bond_limit_is_strict_and_ten_picometres_wide() -> None:
    for distance, bonded in ((0.76 + 1.39 + 0.0999, True), (0.76 + 1.39 + 0.1001, False)):
        system = _system([[0, 0, 0], [0, 0, distance]], "SbC", [1, 2], "C")
        assert (configuration(system) != "[]") == bonded


def test_images_of_one_pair_are_one_bond_and_an_own_image_counts() -> None:
    small = _system([[0, 0, 0], [0, 0, 1.9]], "SbC", [1, 2], "C", edge=2.7)
    assert configuration(small) == "[C Sb atop [Sb Sb C]]" == ase_configuration(small.as_ase())


def test_hopeless_cell_is_an_error() -> None:
    with pytest.raises(ValueError, match="too small"):
        three_part_text(_system([[0, 0, 0], [0, 0, 1.9]], "SbC", [1, 2], "C", edge=0.001))


def test_unknown_miller_index_is_an_error() -> None:
    with pytest.raises(ValueError, match="no Miller index"):
        three_part_text(dataclasses.replace(SHIPPED[0], miller=None))


@given(slabs(), rotations(), st.lists(st.integers(-3, 3), min_size=3, max_size=3), st.floats(-5, 5))
def test_invariance(system: System, rotation: np.ndarray, images: list[int], shift: float) -> None:
    """Turning the crystal, moving it, and taking other images of its atoms changes no letter."""
    text = three_part_text(system, 1.2)
    moved = system.positions + [shift, 2 * shift, -shift]
    moved[::2] += np.array(images) @ system.lattice
    turned = make_system(
        system.lattice @ rotation,
        moved @ rotation,
        system.numbers,
        system.tags,
        system.adsorbate,
        system.miller,
    )
    assert three_part_text(turned, 1.2) == text


@given(slabs(), st.integers(0, 2**32 - 1))
def test_permutation_renames_but_keeps_every_bond(system: System, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(system))
    radii = np.random.default_rng(0).uniform(0.5, 1.5, len(system))
    plain = bond_matrix(system.lattice, system.positions, radii, 0.1)
    permuted = bond_matrix(system.lattice, system.positions[order], radii[order], 0.1)
    np.testing.assert_array_equal(permuted, plain[np.ix_(order, order)])


@given(cells(), st.floats(0.3, 1.5))
def test_bond_matrix_against_ase(cell: tuple[np.ndarray, np.ndarray], radius: float) -> None:
    lattice, positions = cell
    n = len(positions)
    neighbours = NeighborList([radius] * n, skin=0.05, self_interaction=False, bothways=True)
    neighbours.update(Atoms(numbers=[6] * n, positions=positions, cell=lattice, pbc=True))
    expected = neighbours.get_connectivity_matrix(sparse=False).astype(bool)
    np.testing.assert_array_equal(bond_matrix(lattice, positions, [radius] * n, 0.1), expected)


def test_real_oc20_frames_against_ase(shared: Path) -> None:
    text = gzip.decompress((shared / "data/oc20/oc20_30_init_relaxed.extxyz.gz").read_bytes()).decode()
    bound = 0
    for atoms in ase.io.read(io.StringIO(text), ":", format="extxyz"):
        name = atoms[atoms.get_tags() == 2].get_chemical_formula()
        system = make_system(atoms.cell[:], atoms.positions, atoms.numbers, atoms.get_tags(), name, (1, 0, 0))
        assert three_part_text(system) == ase_three_part_text(atoms, name, (1, 0, 0))
        bound += configuration(system) != "[]"
    assert bound >= 20
