"""The neighbour graph that the encoder reads, with fairchem's conventions (pbc in three directions).

An edge goes from a neighbour (source) to the atom that it informs (target); its vector points from target to source.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from catmllm.structure.periodic import first_and_last, wrap

SHELL_TOLERANCE = 0.01  # Å
CLOSEST = 0.01  # Å; nearer pairs have no direction and are no edge (fairchem: d² <= 1e-4)


class Graph(NamedTuple):
    """edge_index int64 [2, E] (source, target), sorted by target (CSR), a target's nearest first; edge_vec float64
    [E, 3] = position[source] + offset - position[target] in Å."""

    edge_index: NDArray[np.int64]
    edge_vec: NDArray[np.float64]


def neighbour_graph(
    lattice: ArrayLike, positions: ArrayLike, cutoff: float, max_neighbours: int, strict: bool = False
) -> Graph:
    """The nearest neighbours within the cutoff of every atom, periodic images included; an atom's own image is one.

    lattice [3, 3] (rows, Å), positions [N, 3] (Å, anywhere), cutoff in Å. By default the shell of the
    max_neighbours-th neighbour is kept whole: all within 0.01 Å of its distance, so that the graph does not depend on
    the order of the atoms or on rounding. strict keeps exactly max_neighbours, ties in the order of the sources, as
    fairchem's EquiformerV2 was trained on OC20. (fairchem's own non-strict mode starts at the *next* neighbour and
    adds 0.01 to the squared distance.) An atom alone within its cutoff has no edge. Raises ValueError for bad input
    and for cells that are too small (`periodic.MAX_CANDIDATES`).
    """
    if not cutoff > 0 or max_neighbours < 1:
        raise ValueError(f"cutoff {cutoff} and max_neighbours {max_neighbours} must be positive")
    cell, points, frac, spacings = wrap(lattice, positions, cutoff)
    source, target, vectors = _nearest(
        cell, points, frac, spacings, float(cutoff), int(max_neighbours), bool(strict)
    )
    return Graph(np.stack((source, target)), vectors)


@njit(cache=True)
def _grown(array, size):
    """The array with room for at least `size` rows."""
    if size <= len(array):
        return array
    larger = np.empty((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


@njit(cache=True)
def _neighbours(cell, points, frac, spacings, i, reach, source, edges):
    """Every neighbour of atom i within reach, M of them, in buffers that grow: source [M] and (vector, distance)
    [M, 4]; and M."""
    found = 0
    for j in range(len(points)):
        a0, a1 = first_and_last(frac[j, 0] - frac[i, 0], reach, spacings[0])
        b0, b1 = first_and_last(frac[j, 1] - frac[i, 1], reach, spacings[1])
        c0, c1 = first_and_last(frac[j, 2] - frac[i, 2], reach, spacings[2])
        for a in range(a0, a1 + 1):
            for b in range(b0, b1 + 1):
                for c in range(c0, c1 + 1):
                    x = points[j, 0] - points[i, 0] + a * cell[0, 0] + b * cell[1, 0] + c * cell[2, 0]
                    y = points[j, 1] - points[i, 1] + a * cell[0, 1] + b * cell[1, 1] + c * cell[2, 1]
                    z = points[j, 2] - points[i, 2] + a * cell[0, 2] + b * cell[1, 2] + c * cell[2, 2]
                    squared = x * x + y * y + z * z
                    if CLOSEST * CLOSEST < squared <= reach * reach:
                        source, edges = _grown(source, found + 1), _grown(edges, found + 1)
                        source[found] = j
                        edges[found, 0], edges[found, 1], edges[found, 2] = x, y, z
                        edges[found, 3] = np.sqrt(squared)
                        found += 1
    return source, edges, found


@njit(cache=True)
def _nearest(cell, points, frac, spacings, cutoff, max_neighbours, strict):
    n = len(points)
    edges = 0
    source = np.empty(64, np.int64)
    target = np.empty(64, np.int64)
    vectors = np.empty((64, 3), np.float64)
    near = np.empty(64, np.int64)
    near_edges = np.empty((64, 4), np.float64)
    # The nearest 20 mostly lie within half of a 12 Å cutoff: search the sphere that holds as many at the mean density
    # (the vacuum makes it ample) and widen it where that is not enough.
    volume = abs(np.dot(cell[0], np.cross(cell[1], cell[2])))
    start = min(cutoff, (max_neighbours * volume / n * 3 / (4 * np.pi)) ** (1 / 3))
    for i in range(n):
        reach = start
        while True:
            near, near_edges, found = _neighbours(cell, points, frac, spacings, i, reach, near, near_edges)
            order = np.argsort(near_edges[:found, 3].copy(), kind="mergesort")
            kept = min(found, max_neighbours)
            limit = near_edges[order[kept - 1], 3] + SHELL_TOLERANCE if kept else 0.0
            if reach >= cutoff or (kept == max_neighbours and limit <= reach):
                break
            reach = min(cutoff, 1.25 * reach)
        while not strict and kept < found and near_edges[order[kept], 3] <= limit:
            kept += 1
        source, target = _grown(source, edges + kept), _grown(target, edges + kept)
        vectors = _grown(vectors, edges + kept)
        for k in range(kept):
            source[edges], target[edges] = near[order[k]], i
            vectors[edges] = near_edges[order[k], :3]
            edges += 1
    return source[:edges].copy(), target[:edges].copy(), vectors[:edges].copy()
