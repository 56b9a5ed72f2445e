"""The neighbour graph against ASE's neighbour list and fairchem's own graphs,
its limits and its invariances."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from catmllm.data.slabs import load_slabs
from catmllm.structure.graph import Graph, _many, neighbour_graph, neighbour_graphs
from catmllm.structure.periodic import MAX_CANDIDATES
from catmllm.structure.system import System
from tests.oracles.structure_ase import ase_neighbours
from tests.structure.systems import cells, rotations, slabs

FAIRCHEM = json.loads(Path(__file__).with_name("fairchem_graphs.json").read_text())


def _of_target(graph: Graph, i: int) -> np.ndarray:
    """[M, 4] of one target: vectors and sources, in the order of the graph."""
    mine = graph.edge_index[1] == i
    return np.c_[graph.edge_vec[mine], graph.edge_index[0][mine]]


def _check_against_ase(
    lattice: np.ndarray, positions: np.ndarray, cutoff: float, limit: int, strict: bool
) -> None:
    graph = neighbour_graph(lattice, positions, cutoff, limit, strict)
    assert (np.diff(graph.edge_index[1]) >= 0).all()
    for i, expected in enumerate(ase_neighbours(lattice, positions, cutoff)):
        ours = _of_target(graph, i)
        distances = np.linalg.norm(expected[:, :3], axis=1)
        kept = len(expected)
        if kept > limit:
            kept = limit if strict else int((distances <= distances[limit - 1] + 0.01).sum())
        assert len(ours) == kept
        assert (np.diff(np.linalg.norm(ours[:, :3], axis=1)) >= 0).all()
        np.testing.assert_allclose(np.linalg.norm(ours[:, :3], axis=1), distances[:kept], atol=1e-8)
        # every edge of ours is one of ASE's: the same source by the same vector
        gap = np.abs(ours[:, None] - expected[None]).max(axis=-1)
        assert gap.min(axis=1, initial=np.inf).max(initial=0.0) < 1e-7
        assert len(set(gap.argmin(axis=1))) == kept if kept else True


def _no_pair_near(lattice: np.ndarray, positions: np.ndarray, *limits: float) -> bool:
    """Whether no distance lies within rounding of a limit, where two right programs may differ."""
    rows = ase_neighbours(lattice, positions, max(limits) + 0.1)
    distances = np.concatenate([np.linalg.norm(row[:, :3], axis=1) for row in rows])
    return all(np.abs(distances - limit).min(initial=np.inf) > 1e-6 for limit in limits) and bool(
        (distances > 0.02).all()
    )


@given(cells(), st.floats(1.0, 7.0), st.integers(1, 30), st.booleans())
@settings(max_examples=80)
def test_any_cell_against_ase(
    cell: tuple[np.ndarray, np.ndarray], cutoff: float, limit: int, strict: bool
) -> None:
    if _no_pair_near(*cell, cutoff):
        _check_against_ase(*cell, cutoff, limit, strict)


@pytest.mark.parametrize("strict", [False, True])
def test_shipped_systems_against_ase(strict: bool) -> None:
    for system in load_slabs()[::150]:
        _check_against_ase(system.lattice, system.positions, 6.0, 20, strict)


@pytest.mark.parametrize(
    "case", FAIRCHEM, ids=[f"{len(c['positions'])}atoms-{c['cutoff']}" for c in FAIRCHEM]
)
def test_fairchem_graphs(case: dict) -> None:
    arguments = (case["lattice"], case["positions"], case["cutoff"])
    every = neighbour_graph(*arguments, 10**6)
    assert np.bincount(every.edge_index[1], minlength=len(case["positions"])).tolist() == case["degrees"]
    if "edges" not in case:
        return
    expected = np.array([edge.split() for edge in case["edges"]], dtype=int)
    positions, lattice = np.array(case["positions"]), np.array(case["lattice"])
    vectors = positions[expected[:, 0]] + expected[:, 2:] @ lattice - positions[expected[:, 1]]
    graph = neighbour_graph(*arguments, case["max_neighbours"], strict=True)
    assert graph.edge_index.shape[1] == len(expected)
    for i in range(len(positions)):
        theirs = np.c_[vectors, expected[:, 0]][expected[:, 1] == i]
        ours = _of_target(graph, i)
        gap = np.abs(ours[:, None] - theirs[None]).max(axis=-1)
        assert sorted(gap.argmin(axis=1)) == list(range(len(theirs)))
        assert gap.min(axis=1, initial=np.inf).max(initial=0.0) < 1e-9


def test_types_and_direction() -> None:
    graph = neighbour_graph(np.diag([20.0, 20, 20]), np.array([[1.0, 1, 1], [19, 1, 1]]), 3.0, 5)
    assert (graph.edge_index.dtype, graph.edge_vec.dtype) == (np.int64, np.float64)
    assert graph.edge_index.tolist() == [[1, 0], [0, 1]]
    np.testing.assert_allclose(graph.edge_vec, [[-2, 0, 0], [2, 0, 0]], atol=1e-12)


def test_own_images_are_edges_and_the_atom_itself_is_not() -> None:
    graph = neighbour_graph(np.eye(3) * 2.5, [[0.3, 0.2, 0.1]], 2.6, 20)
    assert graph.edge_index.tolist() == [[0] * 6, [0] * 6]
    np.testing.assert_allclose(np.linalg.norm(graph.edge_vec, axis=1), 2.5)


def test_whole_shells_and_strict() -> None:
    copper = bulk("Cu", "fcc", a=3.6)  # shells of 12, 6, 24
    arguments = (copper.cell[:], copper.positions, 6.0)
    for limit, kept in ((1, 12), (12, 12), (13, 18), (20, 42), (42, 42)):
        assert neighbour_graph(*arguments, limit).edge_index.shape[1] == kept
        assert neighbour_graph(*arguments, limit, strict=True).edge_index.shape[1] == limit


def test_shell_tolerance_is_a_hundredth_of_an_angstrom() -> None:
    for stretch, kept in ((0.009, 2), (0.011, 1)):
        positions = np.array([[10, 10, 10], [12, 10, 10], [8 - stretch, 10, 10]])
        graph = neighbour_graph(np.eye(3) * 30, positions, 3.0, 1)
        assert (graph.edge_index[1] == 0).sum() == kept


def test_lone_atom_has_no_edge() -> None:
    graph = neighbour_graph(np.eye(3) * 30, [[1, 1, 1]], 6.0, 20)
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_vec.shape == (0, 3)


def test_coincident_atoms_have_no_direction_and_no_edge() -> None:
    graph = neighbour_graph(np.eye(3) * 30, np.array([[1, 1, 1], [1, 1, 1.005], [1, 1, 3]]), 6.0, 20)
    assert sorted(map(tuple, graph.edge_index.T.tolist())) == [(0, 2), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("lattice", "positions", "message"),
    [
        (np.eye(3) * 0.01, [[0, 0, 0]], "too small.*limit"),
        (np.diag([5.0, 5.0, 1e-9]), [[0, 0, 0]], "too small"),
        ([[5, 0, 0], [5, 1e-7, 0], [0, 0, 5]], [[0, 0, 0]], "too small"),
        (np.eye(3) * 1e-200, [[0, 0, 0]], "flat|too small"),
        (np.zeros((3, 3)), [[0, 0, 0]], "flat"),
        ([[1, 0, 0], [1, 0, 0], [0, 0, 1]], [[0, 0, 0]], "flat"),
        (np.eye(3) * np.nan, [[0, 0, 0]], "finite"),
        (np.full((3, 3), np.inf), [[0, 0, 0]], "finite"),
        (np.eye(3) * 5, [[0, 0, np.nan]], "finite"),
        (np.eye(3) * 1e-3 + 5e-4, [[1e308, 0, 0]], "too small|too far"),
    ],
)
def test_hopeless_cells_are_errors_at_once(lattice: ArrayLike, positions: ArrayLike, message: str) -> None:
    start = time.perf_counter()
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
        neighbour_graph(lattice, positions, 12.0, 20)
    assert time.perf_counter() - start < 1.0


def test_work_just_below_the_limit_is_done() -> None:
    edge = 24.0 / ((0.9 * MAX_CANDIDATES / 4) ** (1 / 3) - 1)
    graph = neighbour_graph(
        np.eye(3) * edge, np.array([[0, 0, 0], [0.03, 0.04, 0.05]]), 12.0, 20, strict=True
    )
    assert graph.edge_index.shape == (2, 40)


@pytest.mark.parametrize(("cutoff", "limit"), [(0.0, 20), (-1.0, 20), (float("nan"), 20), (6.0, 0)])
def test_settings_must_be_positive(cutoff: float, limit: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        neighbour_graph(np.eye(3) * 5, [[0, 0, 0]], cutoff, limit)


def _as_rows(graph: Graph, rotation: np.ndarray | None = None) -> np.ndarray:
    """Edges [E, 5] in an order that does not depend on theirs: target, source, vector."""
    vectors = graph.edge_vec if rotation is None else graph.edge_vec @ rotation
    rows: np.ndarray = np.column_stack((graph.edge_index[1], graph.edge_index[0], vectors))
    rounded = np.round(rows, 5)
    return rows[np.lexsort([rounded[:, k] for k in reversed(range(5))])]


def _robust(system: System, cutoff: float, limit: int) -> bool:
    """Whether no choice of the graph hangs on rounding."""
    for row in ase_neighbours(system.lattice, system.positions, cutoff + 0.1):
        distances = np.linalg.norm(row[:, :3], axis=1)
        if np.abs(distances - cutoff).min(initial=np.inf) < 1e-6:
            return False
        inside = distances[distances <= cutoff]
        if len(inside) > limit and np.abs(inside - inside[limit - 1] - 0.01).min() < 1e-6:
            return False
    return True


@given(slabs(), rotations(), st.lists(st.integers(-3, 3), min_size=3, max_size=3), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_invariance(system: System, rotation: np.ndarray, images: list[int], seed: int) -> None:
    """Rotation turns the vectors; translation, other images and
    another order of the atoms change nothing else."""
    cutoff, limit = 4.5, 12
    if not _robust(system, cutoff, limit):
        return
    plain = neighbour_graph(system.lattice, system.positions, cutoff, limit)
    moved = system.positions + [1.7, -0.3, 40.0]
    moved[1::2] += np.array(images) @ system.lattice
    shifted = neighbour_graph(system.lattice, moved, cutoff, limit)
    np.testing.assert_allclose(_as_rows(shifted), _as_rows(plain), atol=1e-7)

    turned = neighbour_graph(system.lattice @ rotation, system.positions @ rotation, cutoff, limit)
    np.testing.assert_allclose(_as_rows(turned, rotation.T), _as_rows(plain), atol=1e-7)

    order = np.random.default_rng(seed).permutation(len(system))
    permuted = neighbour_graph(system.lattice, system.positions[order], cutoff, limit)
    renamed = Graph(order[permuted.edge_index], permuted.edge_vec)
    np.testing.assert_allclose(_as_rows(renamed), _as_rows(plain), atol=1e-7)


@given(slabs())
@settings(max_examples=20)
def test_doubled_cell_sees_the_same_surroundings(system: System) -> None:
    if not _robust(system, 5.0, 15):
        return
    doubled = system.lattice * [[2.0], [1.0], [1.0]]
    positions = np.vstack((system.positions, system.positions + system.lattice[0]))
    once = neighbour_graph(system.lattice, system.positions, 5.0, 15)
    twice = neighbour_graph(doubled, positions, 5.0, 15)
    n = len(system)
    folded = Graph(twice.edge_index % n, twice.edge_vec)
    first_half = twice.edge_index[1] < n
    half = Graph(folded.edge_index[:, first_half], folded.edge_vec[first_half])
    np.testing.assert_allclose(_as_rows(half), _as_rows(once), atol=1e-7)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("threads", [1, 3, 64])
def test_batch_is_the_graphs_side_by_side(strict: bool, threads: int) -> None:
    systems = load_slabs()[::400]
    joined, degree = neighbour_graphs(systems, 6.0, 12, strict, threads)
    shift = edges = atoms = 0
    for system in systems:
        one = neighbour_graph(system.lattice, system.positions, 6.0, 12, strict)
        there = slice(edges, edges + one.edge_index.shape[1])
        np.testing.assert_array_equal(joined.edge_index[:, there], one.edge_index + shift)
        np.testing.assert_array_equal(joined.edge_vec[there], one.edge_vec)
        counts = np.bincount(one.edge_index[1], minlength=len(system))
        assert degree[atoms : atoms + len(system)].tolist() == counts.tolist()
        shift, edges, atoms = shift + len(system), there.stop, atoms + len(system)
    assert joined.edge_index.shape == (2, edges) and len(degree) == atoms
    empty, none = neighbour_graphs([], 6.0, 12)
    assert empty.edge_index.shape == (2, 0) and empty.edge_vec.shape == (0, 3) and len(none) == 0


def test_batch_names_what_is_wrong_with_a_system() -> None:
    good = load_slabs()[0]
    bad = replace(good, lattice=np.diag([0.01, 0.01, 20.0]))
    with pytest.raises(ValueError, match="too small"):
        neighbour_graphs([good, bad], 6.0, 12)


def test_threads_run_side_by_side_without_the_gil() -> None:
    """While one thread is inside the loops another one runs Python."""
    systems = load_slabs()[:600]
    neighbour_graphs(systems[:1], 12.0, 20)
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        _many(*arguments)
        done.set()

    lattices = np.array([s.lattice for s in systems])
    points = np.concatenate([s.positions for s in systems])
    first = np.cumsum([0, *(len(s) for s in systems)])
    arguments = (lattices, points, first, 12.0, 20, True)
    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    steps = 0
    while not done.is_set():
        steps += 1
    thread.join()
    assert steps > 1000, "the loops held the GIL"
