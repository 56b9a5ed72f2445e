"""Three-part texts against an independent route through ASE, and their invariances."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import NeighborList
from hypothesis import given, settings
from hypothesis import strategies as st

from catmllm.data.oc20.pickles import fields, load_pickle
from catmllm.data.oc20.readers import from_data
from catmllm.data.slabs import SHIPPED_SEVENNET, load_slabs
from catmllm.structure.periodic import bond_matrix
from catmllm.structure.system import System, make_system, text_system
from catmllm.structure.text import configuration, three_part_text, two_part_text, worded
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
    systems = load_slabs(SHIPPED_SEVENNET)
    unbound = sum(configuration(system) == "[]" for system in systems) / len(systems)
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


def test_two_parts_are_those_of_the_whole_text_however_a_system_is_known() -> None:
    for system in SHIPPED[::200]:
        text = three_part_text(system)
        two = text.rpartition("</s>")[0]
        asked = text_system(system.identity)
        assert two_part_text(system) == two_part_text(text_system(text)) == two_part_text(asked) == two
        start = dataclasses.replace(system, relaxed=False)
        told = worded(start, two)
        assert (told.text, told.energy, told.sid, told.relaxed) == (two, system.energy, system.sid, False)
        assert (told.bulk, told.miller, len(told)) == (system.bulk, system.miller, 0)


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


def test_an_unknown_miller_index_is_left_out() -> None:
    known = three_part_text(SHIPPED[0])
    plane = " ({} {} {})".format(*SHIPPED[0].known_miller)
    assert plane in known
    assert three_part_text(dataclasses.replace(SHIPPED[0], miller=None)) == known.replace(plane, "", 1)


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


@given(slabs(), st.sampled_from([1.0, 1.7, 4.0]), st.integers(2, 400))
def test_capped_string_is_the_whole_one_cut_between_words(system: System, scale: float, cap: int) -> None:
    whole, capped = configuration(system, scale), configuration(system, scale, max_characters=cap)
    assert len(capped) <= cap
    if len(whole) <= cap:
        assert capped == whole
        return
    assert capped.count("[") == capped.count("]") and capped[0] == "[" and capped[-1] == "]"
    kept = capped.rstrip("]")
    assert whole.startswith(kept)
    assert kept in ("", "[") or whole[len(kept)] in " ]["  # no word is cut in two
    assert configuration(system, scale, max_characters=cap + 1).startswith(kept)


def test_cap_that_holds_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        configuration(SHIPPED[0], max_characters=1)


@pytest.mark.slow
def test_ten_thousand_random_systems_against_ase() -> None:
    """Slabs of all sizes and skews, up to 60 atoms, half of them at scale 4 or in between."""
    rng = np.random.default_rng(17)
    metals = np.array([3, 11, 13, 14, 20, 22, 26, 28, 29, 31, 33, 46, 50, 74, 78, 79, 80, 82])
    bound = 0
    for k in range(10_000):
        n, m = int(rng.integers(1, 50 if k % 10 == 0 else 16)), int(rng.integers(1, 6))
        edges = rng.uniform(2.2, 12.0, 2)
        height = rng.uniform(6.0, 25.0)
        lattice = np.diag([*edges, height])
        lattice[1, 0], lattice[2, :2] = rng.uniform(-1, 1) * edges[0], rng.uniform(-0.5, 0.5, 2) * edges
        slab = rng.uniform(0, 1, (n, 3)) * [1, 1, 0.4]
        over = rng.uniform(0, 1, (m, 3)) * [1, 1, 0.15] + [0, 0, 0.4]
        numbers = [*rng.choice(metals, n), *rng.choice([1, 6, 7, 8], m)]
        tags = [*rng.integers(0, 2, n), *[2] * m]
        frac = np.vstack([slab, over]) + rng.integers(-2, 3, (n + m, 3))
        name = Atoms(numbers[n:]).get_chemical_formula()
        miller = tuple(rng.integers(-2, 3, 3).tolist())
        system = make_system(lattice, None, numbers, tags, name, miller, frac=frac)  # type: ignore[arg-type]
        scale = 1.0 if k % 2 else float(rng.choice([0.7, 1.3, 2.0, 4.0]))
        assert three_part_text(system, scale) == _expected(system, scale), k
        bound += configuration(system, scale) != "[]"
    assert 5_000 < bound < 10_000


@pytest.mark.slow
def test_all_real_and_shipped_systems_against_ase(shared: Path) -> None:
    for system in SHIPPED:
        assert three_part_text(system) == _expected(system, 1.0)
    path = shared / "data/dft111_882.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 882
    for row in rows:
        atoms = Atoms(
            row["symbols"],
            row["pos"],
            cell=row["cell"],
            pbc=True,
            tags=[1] * 16 + [2] * (len(row["pos"]) - 16),
        )
        name = atoms[atoms.get_tags() == 2].get_chemical_formula()
        system = make_system(atoms.cell[:], atoms.positions, atoms.numbers, atoms.get_tags(), name, (1, 1, 1))
        for scale in (1.0, 4.0):
            assert configuration(system, scale) == ase_configuration(atoms, scale)
    pickled = load_pickle((shared / "data/oc20/oc22_s2ef_16.pkl").read_bytes())
    assert len(pickled) == 16
    for record in map(from_data, map(fields, pickled)):
        atoms = Atoms(record.numbers, record.positions, cell=record.lattice, pbc=True, tags=record.tags)
        system = make_system(atoms.cell[:], atoms.positions, atoms.numbers, atoms.get_tags(), "O", (1, 1, 1))
        for scale in (1.0, 4.0):
            assert configuration(system, scale) == ase_configuration(atoms, scale)
