"""Pairs of atoms under periodic boundary conditions in all three directions (Numba, without the GIL).

Every loop runs over the lattice translations that can matter for that pair, found from the spacing of the
lattice planes, so small and skewed cells are right without a guess. The work is bounded: a cell that needs
more than `MAX_CANDIDATES` trials (a generated CIF may have a 0.01 Å edge) is a ValueError.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

# Pairs times translations, about 0.1 s of work. OC20 slabs with a 12 Å cutoff stay under 1 million.
MAX_CANDIDATES = 20_000_000
_NOT_FINITE, _FLAT, _TOO_SMALL, _TOO_FAR = 1, 2, 3, 4


def wrap(
    lattice: ArrayLike, positions: ArrayLike, reach: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The input of the loops: lattice [3, 3], positions [N, 3] moved into the cell, their fractional
    coordinates and the plane spacings [3] in Å.

    reach: the largest distance (Å) that a pair may have.
    Raises ValueError for non-finite or flat input and for more than `MAX_CANDIDATES` trials.
    """
    cell = np.ascontiguousarray(lattice, dtype=np.float64).reshape(3, 3)
    points = np.ascontiguousarray(positions, dtype=np.float64).reshape(-1, 3)
    wrapped, frac, spacings, problem, candidates = wrap_into(cell, points, float(reach))
    if problem:
        complain(problem, cell, len(points), reach, spacings, candidates)
    return cell, wrapped, frac, spacings


def complain(
    problem: int,
    cell: NDArray[np.float64],
    n: int,
    reach: float,
    spacings: NDArray[np.float64],
    candidates: float,
) -> None:
    """Raise the ValueError of a problem that `wrap_into` found."""
    if problem == _NOT_FINITE:
        raise ValueError("lattice, positions and cutoff must be finite")
    if problem == _FLAT:
        raise ValueError(f"the cell is flat: {cell.tolist()}")
    if problem == _TOO_SMALL:
        raise ValueError(
            f"the cell is too small: {n} atoms within {reach:g} Å and lattice planes "
            f"{spacings.round(4).tolist()} Å apart are {candidates:.3g} pairs, the limit is "
            f"{MAX_CANDIDATES:.3g}"
        )
    raise ValueError("positions are too far from the cell to be wrapped into it")


@njit(cache=True, nogil=True)
def wrap_into(cell, points, reach):
    """Positions [N, 3] in the cell, their fractional coordinates [N, 3], plane spacings [3] (0 for a flat
    cell), a problem (0: none) and the number of trials that the reach (Å) may take.

    Written out because NumPy's cross, det and solve cost 80 µs a call,
    as much as the graph of a 14-atom slab.
    """
    n = len(points)
    normals = np.empty((3, 3))
    for k in range(3):
        u, v = cell[(k + 1) % 3], cell[(k + 2) % 3]
        normals[k, 0] = u[1] * v[2] - u[2] * v[1]
        normals[k, 1] = u[2] * v[0] - u[0] * v[2]
        normals[k, 2] = u[0] * v[1] - u[1] * v[0]
    frac = np.zeros((n, 3))
    wrapped = np.zeros((n, 3))
    spacings = np.zeros(3)
    volume = cell[0, 0] * normals[0, 0] + cell[0, 1] * normals[0, 1] + cell[0, 2] * normals[0, 2]
    candidates = float(n) * n
    for k in range(3):
        length = np.sqrt(normals[k, 0] ** 2 + normals[k, 1] ** 2 + normals[k, 2] ** 2)
        if volume != 0 and np.isfinite(volume) and length > 0:
            spacings[k] = abs(volume) / length
            candidates *= 2 * reach / spacings[k] + 1
    finite, near = np.isfinite(reach), True
    for row in cell:
        for value in row:
            finite &= np.isfinite(value)
    for i in range(n):
        for k in range(3):
            finite &= np.isfinite(points[i, k])
            x, y, z = normals[k, 0], normals[k, 1], normals[k, 2]
            along = (points[i, 0] * x + points[i, 1] * y + points[i, 2] * z) / volume if volume else 0.0
            frac[i, k] = along - np.floor(along)
            near &= np.isfinite(frac[i, k])
            for axis in range(3):
                wrapped[i, axis] += frac[i, k] * cell[k, axis]
    problem = 0
    if not finite:
        problem = _NOT_FINITE
    elif not min(spacings[0], spacings[1], spacings[2]) > 0:
        problem = _FLAT
    elif not candidates <= MAX_CANDIDATES:
        problem = _TOO_SMALL
    elif not near:
        problem = _TOO_FAR
    return wrapped, frac, spacings, problem, candidates


@njit(cache=True, nogil=True)
def first_and_last(delta: float, reach: float, spacing: float) -> tuple[int, int]:
    """The translations n along one axis with |delta + n| · spacing <= reach (with a hair to spare)."""
    most = reach / spacing + 1e-9
    return int(np.ceil(-most - delta)), int(np.floor(most - delta))


def bond_matrix(
    lattice: ArrayLike, positions: ArrayLike, radii: ArrayLike, slack: float
) -> NDArray[np.bool_]:
    """bool [N, N]: whether any periodic image of j is nearer to i than radii[i] + radii[j] + slack.

    lattice [3, 3], positions [N, 3], radii [N] and slack in Å. Several images are one bond; an atom can be
    bonded to its own image (as in ASE's neighbour list), never to itself.
    """
    r = np.ascontiguousarray(radii, dtype=np.float64)
    cell, points, frac, spacings = wrap(lattice, positions, 2 * float(r.max(initial=0.0)) + slack)
    return _bond_matrix(cell, points, frac, spacings, r, slack)


@njit(cache=True, nogil=True)
def _bond_matrix(cell, points, frac, spacings, radii, slack):
    n = len(points)
    bonded = np.zeros((n, n), dtype=np.bool_)
    for i in range(n):
        for j in range(i, n):
            hit = any_image_within(cell, points, frac, spacings, i, j, radii[i] + radii[j] + slack)
            bonded[i, j] = hit
            bonded[j, i] = hit
    return bonded


@njit(cache=True, nogil=True, inline="always")
def image_vector(cell, points, i, j, a, b, c):
    """From i to the image (a, b, c) of j, three numbers in Å."""
    x = points[j, 0] - points[i, 0] + a * cell[0, 0] + b * cell[1, 0] + c * cell[2, 0]
    y = points[j, 1] - points[i, 1] + a * cell[0, 1] + b * cell[1, 1] + c * cell[2, 1]
    z = points[j, 2] - points[i, 2] + a * cell[0, 2] + b * cell[1, 2] + c * cell[2, 2]
    return x, y, z


@njit(cache=True, nogil=True)
def any_image_within(cell, points, frac, spacings, i, j, reach):
    """Whether an image of j (for i = j, another one) is nearer to i than reach."""
    for axis in (2, 0, 1):
        # the nearest image along one axis already tells for most pairs, without a division
        delta = frac[j, axis] - frac[i, axis]
        delta -= np.floor(delta + 0.5)
        if (abs(delta) - 1e-9) * spacings[axis] > reach:
            return False
    a0, a1 = first_and_last(frac[j, 0] - frac[i, 0], reach, spacings[0])
    b0, b1 = first_and_last(frac[j, 1] - frac[i, 1], reach, spacings[1])
    c0, c1 = first_and_last(frac[j, 2] - frac[i, 2], reach, spacings[2])
    for a in range(a0, a1 + 1):
        for b in range(b0, b1 + 1):
            for c in range(c0, c1 + 1):
                x, y, z = image_vector(cell, points, i, j, a, b, c)
                if x * x + y * y + z * z < reach * reach and (i != j or a != 0 or b != 0 or c != 0):
                    return True
    return False
