"""The neighbour graph that the encoder reads, with fairchem's conventions (pbc in three directions).

An edge goes from a neighbour (source) to the atom that it informs (target); its vector points from target to
source. The loops release the GIL, so that threads of one process work side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from catmllm.structure.periodic import image_vector, wrap, wrap_into
from catmllm.structure.system import System

SHELL_TOLERANCE = 0.01  # Å
CLOSEST = 0.01  # Å; nearer pairs have no direction and are no edge (fairchem: d² <= 1e-4)


class Graph(NamedTuple):
    """edge_index int64 [2, E] (source, target), sorted by target (CSR), a target's nearest first; edge_vec
    float64 [E, 3] = position[source] + offset - position[target] in Å."""

    edge_index: NDArray[np.int64]
    edge_vec: NDArray[np.float64]


def neighbour_graph(
    lattice: ArrayLike, positions: ArrayLike, cutoff: float, max_neighbours: int, strict: bool = False
) -> Graph:
    """The nearest neighbours within the cutoff of every atom, periodic images included;
    an atom's own image is one.

    lattice [3, 3] (rows, Å), positions [N, 3] (Å, anywhere), cutoff in Å. By default the shell of the
    max_neighbours-th neighbour is kept whole: all within 0.01 Å of its distance, so that the graph does not
    depend on the order of the atoms or on rounding. strict keeps exactly max_neighbours, ties in the order of
    the sources, as fairchem's EquiformerV2 was trained on OC20. (fairchem's own non-strict mode starts at the
    *next* neighbour and adds 0.01 to the squared distance.) An atom alone within its cutoff has no edge.
    Raises ValueError for bad input and for cells that are too small (`periodic.MAX_CANDIDATES`).
    """
    _check(cutoff, max_neighbours)
    cell, points, frac, spacings = wrap(lattice, positions, cutoff)
    edge_index, vectors, _ = _nearest(
        cell, points, frac, spacings, float(cutoff), int(max_neighbours), bool(strict)
    )
    return Graph(edge_index, vectors)


def neighbour_graphs(
    systems: Sequence[System], cutoff: float, max_neighbours: int, strict: bool = False, threads: int = 1
) -> tuple[Graph, NDArray[np.int64]]:
    """The graphs of several systems as one, the atoms of each following those of the last; and the number of
    edges of every atom, int64 [N], of which CSR row pointers are the running sum.

    Each is what `neighbour_graph` gives, by one call without the GIL for a thread's share of the systems.
    """
    _check(cutoff, max_neighbours)
    shares = np.array_split(np.arange(len(systems)), max(1, min(threads, len(systems))))

    def part(share: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        some = [systems[i] for i in share.tolist()]
        first = np.cumsum([0, *(len(s) for s in some)])
        lattices = np.array([s.lattice for s in some]).reshape(-1, 3, 3)
        points = np.concatenate([np.empty((0, 3)), *(s.positions for s in some)])
        made = _many(lattices, points, first, float(cutoff), int(max_neighbours), bool(strict))
        if made[3] >= 0:
            bad = some[int(made[3])]
            neighbour_graph(bad.lattice, bad.positions, cutoff, max_neighbours, strict)  # raises, saying why
        return made[:3]

    if len(shares) == 1:
        parts = [part(shares[0])]
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            parts = list(pool.map(part, shares))
    sizes = np.cumsum([0, *(len(p[2]) for p in parts)])
    edge_index = np.concatenate([p[0] + shift for p, shift in zip(parts, sizes)], axis=1)
    return Graph(edge_index, np.concatenate([p[1] for p in parts])), np.concatenate([p[2] for p in parts])


def all_neighbours(
    lattices: NDArray[np.float64], positions: NDArray[np.float64], first: NDArray[np.int64], cutoff: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Every neighbour within the cutoff (Å) of every atom of several structures, as a potential wants them.

    lattices [B, 3, 3], positions [N, 3] of all structures in a row, first [B + 1] where each begins. Returns
    neighbour [E], centre [E], vector from centre to neighbour [E, 3] (Å), sorted by centre and then by
    length, and the number of neighbours of each atom [N]. Raises ValueError for bad input and for a cell so
    small that an atom has more than 500.
    """
    _check(cutoff, 500)
    cells = np.ascontiguousarray(lattices, dtype=np.float64)
    points = np.ascontiguousarray(positions, dtype=np.float64)
    index, vectors, degree, bad = _many(cells, points, first, float(cutoff), 500, True)
    if bad >= 0:
        wrap(cells[bad], points[first[bad] : first[bad + 1]], cutoff)  # raises, saying why
    if (degree >= 500).any():
        raise ValueError(f"an atom has 500 neighbours or more within {cutoff:g} Å: the atoms lie too close")
    return index[0], index[1], vectors, degree


def _check(cutoff: float, max_neighbours: int) -> None:
    if not cutoff > 0 or max_neighbours < 1:
        raise ValueError(f"cutoff {cutoff} and max_neighbours {max_neighbours} must be positive")


@njit(cache=True, nogil=True)
def _grown(array, size):
    """The array with room for at least `size` rows."""
    if size <= len(array):
        return array
    larger = np.empty((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


@njit(cache=True, nogil=True)
def _neighbours(cell, points, frac, spacings, i, reach, source, edges):
    """Every neighbour of atom i within reach, M of them, in buffers that grow:
    source [M] and (vector, distance) [M, 4]; and M."""
    found = 0
    most_a, most_b, most_c = (
        reach / spacings[0] + 1e-9,
        reach / spacings[1] + 1e-9,
        reach / spacings[2] + 1e-9,
    )
    squared_reach = reach * reach
    for j in range(len(points)):
        # c first: along it lies the vacuum, and most pairs that have no image within reach are told by it
        delta = frac[j, 2] - frac[i, 2]
        c0, c1 = int(np.ceil(-most_c - delta)), int(np.floor(most_c - delta))
        if c0 > c1:
            continue
        delta = frac[j, 0] - frac[i, 0]
        a0, a1 = int(np.ceil(-most_a - delta)), int(np.floor(most_a - delta))
        if a0 > a1:
            continue
        delta = frac[j, 1] - frac[i, 1]
        b0, b1 = int(np.ceil(-most_b - delta)), int(np.floor(most_b - delta))
        for a in range(a0, a1 + 1):
            for b in range(b0, b1 + 1):
                for c in range(c0, c1 + 1):
                    x, y, z = image_vector(cell, points, i, j, a, b, c)
                    squared = x * x + y * y + z * z
                    if CLOSEST * CLOSEST < squared <= squared_reach:
                        if found == len(source):
                            source, edges = _grown(source, found + 1), _grown(edges, found + 1)
                        source[found] = j
                        edges[found, 0], edges[found, 1], edges[found, 2] = x, y, z
                        edges[found, 3] = np.sqrt(squared)
                        found += 1
    return source, edges, found


@njit(cache=True, nogil=True)
def _ascending(edges, found, order):
    """The rows by distance, those at the same distance in their order: filled into `order`. Some 50 rows
    mostly, for which insertion takes a third of the time of NumPy's merge sort."""
    if found > 400:
        order[:found] = np.argsort(edges[:found, 3].copy(), kind="mergesort")
        return
    for k in range(found):
        distance = edges[k, 3]
        at = k
        while at > 0 and edges[order[at - 1], 3] > distance:
            order[at] = order[at - 1]
            at -= 1
        order[at] = k


@njit(cache=True, nogil=True)
def _nearest(cell, points, frac, spacings, cutoff, max_neighbours, strict):
    """edge_index [2, E], vectors [E, 3], edges of each atom [N]."""
    n = len(points)
    edges = 0
    index = np.empty((n * (max_neighbours + 4), 2), np.int64)
    vectors = np.empty((n * (max_neighbours + 4), 3), np.float64)
    degree = np.zeros(n, np.int64)
    near = np.empty(128, np.int64)
    near_edges = np.empty((128, 4), np.float64)
    order = np.empty(128, np.int64)
    # The nearest 20 mostly lie within half of a 12 Å cutoff: search the sphere that holds as many at the mean
    # density (the vacuum makes it ample), from then on a little more than the last atom needed, and widen it
    # where that is not enough.
    volume = abs(np.dot(cell[0], np.cross(cell[1], cell[2])))
    start = min(cutoff, (max_neighbours * volume / n * 3 / (4 * np.pi)) ** (1 / 3))
    for i in range(n):
        reach = start
        while True:
            near, near_edges, found = _neighbours(cell, points, frac, spacings, i, reach, near, near_edges)
            if reach >= cutoff or found >= max_neighbours:
                order = _grown(order, found)
                _ascending(near_edges, found, order)
                kept = min(found, max_neighbours)
                limit = near_edges[order[kept - 1], 3] + SHELL_TOLERANCE if kept else 0.0
                if reach >= cutoff or limit <= reach:
                    break
            reach = min(cutoff, 1.25 * reach)
        if kept == max_neighbours:
            start = min(cutoff, 1.12 * limit)
        while not strict and kept < found and near_edges[order[kept], 3] <= limit:
            kept += 1
        index, vectors = _grown(index, edges + kept), _grown(vectors, edges + kept)
        for k in range(kept):
            row = order[k]
            index[edges, 0], index[edges, 1] = near[row], i
            vectors[edges, 0], vectors[edges, 1], vectors[edges, 2] = (
                near_edges[row, 0],
                near_edges[row, 1],
                near_edges[row, 2],
            )
            edges += 1
        degree[i] = kept
    out = np.empty((2, edges), np.int64)
    for k in range(edges):
        out[0, k], out[1, k] = index[k, 0], index[k, 1]
    return out, vectors[:edges].copy(), degree


@njit(cache=True, nogil=True)
def _many(lattices, positions, first, cutoff, max_neighbours, strict):
    """`_nearest` of systems one after the other, joined; and the first one that cannot be, or -1."""
    n = len(positions)
    index = np.empty((2, n * (max_neighbours + 4)), np.int64)
    vectors = np.empty((n * (max_neighbours + 4), 3), np.float64)
    degree = np.zeros(n, np.int64)
    edges = 0
    for s in range(len(lattices)):
        a, b = first[s], first[s + 1]
        wrapped, frac, spacings, problem, _ = wrap_into(lattices[s], positions[a:b], cutoff)
        if problem:
            return index, vectors, degree, s
        one, vector, counts = _nearest(lattices[s], wrapped, frac, spacings, cutoff, max_neighbours, strict)
        more = one.shape[1]
        if edges + more > index.shape[1]:
            larger = np.empty((2, 2 * (edges + more)), np.int64)
            larger[:, :edges] = index[:, :edges]
            index = larger
            vectors = _grown(vectors, 2 * (edges + more))
        index[:, edges : edges + more] = one + a
        vectors[edges : edges + more] = vector
        degree[a:b] = counts
        edges += more
    return index[:, :edges].copy(), vectors[:edges].copy(), degree, -1
