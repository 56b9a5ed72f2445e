"""The standard orientation against ASE and pymatgen, and what `make_system` refuses."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest
from ase.geometry import cell_to_cellpar, cellpar_to_cell
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice

from catmllm.data.slabs import SHIPPED
from catmllm.structure.elements import atomic_number
from catmllm.structure.system import (
    System,
    lattice_from_parameters,
    lattice_parameters,
    make_system,
    standard_lattice,
)
from tests.structure.systems import cells, lattices, rotations, slabs


def _distances(lattice: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


@given(cells(), rotations())
def test_standard_form_keeps_the_crystal(cell: tuple[np.ndarray, np.ndarray], rotation: np.ndarray) -> None:
    lattice, positions = cell
    n = len(positions)
    system = make_system(lattice, positions, [6] * n, [0] * n, "", (1, 1, 1))
    assert not np.triu(system.lattice, 1).any()
    assert (np.diag(system.lattice) > 0).all()
    # the same lengths and angles (metric), the same distances, and nothing but a proper rotation away
    np.testing.assert_allclose(system.lattice @ system.lattice.T, lattice @ lattice.T, atol=1e-9)
    np.testing.assert_allclose(
        _distances(lattice, positions), _distances(lattice, system.positions), atol=1e-8
    )
    turned = np.linalg.solve(lattice, system.lattice)
    assert np.linalg.det(turned) == pytest.approx(1.0, abs=1e-9)
    again = make_system(lattice @ rotation, positions @ rotation, [6] * n, [0] * n, "", (1, 1, 1))
    np.testing.assert_allclose(again.lattice, system.lattice, atol=1e-9)
    np.testing.assert_allclose(again.positions, system.positions, atol=1e-7)


@given(lattices())
def test_parameters_against_ase_and_pymatgen(lattice: np.ndarray) -> None:
    parameters = lattice_parameters(lattice)
    np.testing.assert_allclose(parameters, cell_to_cellpar(lattice), atol=1e-6)
    np.testing.assert_allclose(parameters, Lattice(lattice).parameters, atol=1e-6)
    np.testing.assert_allclose(lattice_from_parameters(*parameters), cellpar_to_cell(parameters), atol=1e-5)
    np.testing.assert_allclose(lattice_from_parameters(*parameters), standard_lattice(lattice), atol=1e-5)


def records() -> list[dict]:
    with gzip.open(SHIPPED, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_standard_lattice_is_untouched() -> None:
    lattice = np.array([[5.53665, 0, 0], [2.76832, 4.79488, 0], [0, 0, 14.52065]])
    assert standard_lattice(lattice).tobytes() == lattice.tobytes()
    assert lattice_from_parameters(3, 4, 5, 90, 90, 90).tolist() == [[3, 0, 0], [0, 4, 0], [0, 0, 5]]


def test_left_handed_cell_is_reported_and_the_advice_works() -> None:
    lattice = np.array([[0.0, 3, 0], [4.0, 0, 0], [0, 0, 12.0]])
    frac = np.array([[0.1, 0.2, 0.3], [0.6, 0.7, 0.5]])
    with pytest.raises(ValueError, match=r"left-handed.*exchange the vectors a and b"):
        make_system(lattice, None, [46, 8], [1, 2], "O", (1, 0, 0), frac=frac)
    swapped = make_system(lattice[[1, 0, 2]], None, [46, 8], [1, 2], "O", (1, 0, 0), frac=frac[:, [1, 0, 2]])
    np.testing.assert_allclose(
        _distances(lattice, swapped.positions), _distances(lattice, frac @ lattice), atol=1e-12
    )


BOX = np.diag([3.0, 4.0, 15.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lattice": np.zeros((3, 3))}, "flat"),
        ({"lattice": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]}, "flat"),
        ({"lattice": np.diag([1, 1, np.nan])}, "finite"),
        ({"lattice": [1, 2, 3]}, "3x3"),
        ({"positions": [[0, 0, np.inf], [0, 0, 0]]}, "atom 0 has a non-finite"),
        ({"positions": None}, "either"),
        ({"positions": [[0, 0, 0]]}, "one of each"),
        ({"numbers": [0, 8]}, "atomic numbers"),
        ({"numbers": [119, 8]}, "atomic numbers"),
        ({"tags": [1, 3]}, "tags are"),
        ({"energy": float("nan")}, "energy"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    given_ = {
        "lattice": BOX,
        "positions": [[0, 0, 5], [0, 0, 7]],
        "numbers": [46, 8],
        "tags": [1, 2],
    } | change
    with pytest.raises(ValueError, match=message):
        make_system(adsorbate="O", miller=(1, 0, 0), **given_)


def test_names_and_counts() -> None:
    positions = np.arange(18.0).reshape(6, 3)
    system = make_system(
        BOX, positions, [77, 46, 77, 46, 6, 8], [0, 0, 1, 1, 2, 2], "CO", (2, -1, 2), energy=-1.5, sid="x"
    )
    assert system.target == {"Pd": 2, "Ir": 2, "C": 1, "O": 1}
    assert list(system.target) == ["Pd", "Ir", "C", "O"]
    assert system.composition == {"Pd": 2.0, "Ir": 2.0, "C": 1.0, "O": 1.0}
    assert (system.slab_formula, system.bulk) == ("Pd2Ir2", "PdIr")
    assert system.identity == "CO</s>Pd2Ir2 (2 -1 2)"
    assert len(system) == 6
    nameless = dataclasses.replace(system, miller=None)
    assert nameless.identity == "CO</s>Pd2Ir2"
    with pytest.raises(ValueError, match="no Miller index"):
        _ = nameless.known_miller


@given(slabs())
def test_as_ase(system: System) -> None:
    atoms = system.as_ase()
    np.testing.assert_allclose(atoms.get_positions(), system.positions)
    assert atoms.get_chemical_symbols() == system.symbols
    assert atoms.get_tags().tolist() == system.tags.tolist()
    assert atoms.pbc.all()


@given(
    st.floats(1, 20),
    st.floats(1, 20),
    st.floats(1, 20),
    st.floats(1, 179),
    st.floats(1, 179),
    st.floats(1, 179),
)
def test_impossible_angles_are_errors_and_possible_ones_round_trip(
    a: float, b: float, c: float, alpha: float, beta: float, gamma: float
) -> None:
    possible = alpha + beta + gamma < 359.9 and all(
        u + v - w > 0.1 for u, v, w in ((alpha, beta, gamma), (beta, gamma, alpha), (gamma, alpha, beta))
    )
    if possible:
        lattice = lattice_from_parameters(a, b, c, alpha, beta, gamma)
        np.testing.assert_allclose(cell_to_cellpar(lattice), (a, b, c, alpha, beta, gamma), atol=1e-4)
    elif alpha + beta + gamma > 360.1 or alpha > beta + gamma + 0.1:
        with pytest.raises(ValueError, match="no cell"):
            lattice_from_parameters(a, b, c, alpha, beta, gamma)


def test_frames_lie_between_start_and_relaxed() -> None:
    """Of shipped systems: the ends are the record's positions,
    an atom that crossed the boundary takes the short way."""
    record = next(r for r in records() if r["pos"] != r["pos_start"])
    numbers = [atomic_number(s) for s in record["symbols"]]
    args = (numbers, record["tags"], record["adsorbate"], record["miller"], record["energy"], "a")
    lattice = np.array(record["cell"])
    wrapped = np.array(record["pos_start"]) + lattice[0] - lattice[1]
    for start in (record["pos_start"], wrapped):
        system = make_system(lattice, record["pos"], *args, start_positions=start)
        assert (system.frame(1.0).frac == system.frac).all()
        for progress in (0.0, 0.25):
            mixed = progress * np.array(record["pos"]) + (1 - progress) * np.array(record["pos_start"])
            exact = np.linalg.solve(lattice.T, mixed.T).T
            apart = system.frame(progress).frac - exact
            np.testing.assert_allclose(apart - np.round(apart), 0, atol=1e-12)
        assert system.frame(0.0).energy == system.energy
    bare = make_system(lattice, record["pos"], *args)
    with pytest.raises(ValueError, match="no start"):
        bare.frame(0.5)
    with pytest.raises(ValueError, match="start of 'a'"):
        make_system(lattice, record["pos"], *args, start_positions=record["pos_start"][1:])
