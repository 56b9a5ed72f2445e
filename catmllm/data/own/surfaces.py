"""How a slab stands in its cell, and its Miller index where the structure alone is certain of it."""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.formula import Miller

Floats = NDArray[np.float64]

VACUUM = (
    5.0  # Å; a gap between atoms that is wider is a vacuum (layers of an open facet are 3 Å apart at most)
)
ADDED = 20.0  # Å of vacuum for a slab that comes without a third lattice vector


def stand_up(lattice: Floats, positions: Floats) -> tuple[Floats, list[str]]:
    """The lattice [3, 3] with the vacuum along its third vector and right-handed, and what was done. Atoms
    stay where they are: the new vectors span the same lattice. A Miller index stays too, as it is in the axes
    of the bulk.

    Raises ValueError for a cell that lacks more than its third vector.
    """
    said: list[str] = []
    lengths = np.linalg.norm(lattice, axis=1)
    if (lengths < 1e-8).any():
        if lengths[0] < 1e-8 or lengths[1] < 1e-8:
            raise ValueError("no periodic cell: the lattice vectors a and b are needed")
        normal = np.cross(lattice[0], lattice[1])
        normal /= np.linalg.norm(normal)
        lattice = np.array([lattice[0], lattice[1], normal * (np.ptp(positions @ normal) + ADDED)])
        said.append(f"no third lattice vector: {ADDED:g} Å of vacuum were added")
    if np.linalg.det(lattice) < 0:
        lattice = lattice[[1, 0, 2]]
        said.append("left-handed cell: a and b were exchanged")
    if largest_gap(lattice, positions, 2) < VACUUM:
        gaps = [largest_gap(lattice, positions, axis) for axis in range(2)]
        axis = int(np.argmax(gaps))
        if gaps[axis] >= VACUUM:
            # a cyclic exchange keeps the hand
            lattice = lattice[[1, 2, 0]] if axis == 0 else lattice[[2, 0, 1]]
            said.append(f"vacuum along {'ab'[axis]}: it was made the third lattice vector")
        else:
            said.append("no vacuum: the largest gap between atoms is narrower than 5 Å")
    return lattice, said


def largest_gap(lattice: Floats, positions: Floats, axis: int) -> float:
    """The widest gap (Å) without atoms along the normal of the two other lattice vectors."""
    (a, b, c), (d, e, f) = (lattice[i].tolist() for i in range(3) if i != axis)
    normal = np.array([b * f - c * e, c * d - a * f, a * e - b * d])
    area, volume = float(np.sqrt(normal @ normal)), float(lattice[axis] @ normal)
    if area < 1e-12 or abs(volume) < 1e-12 * area:
        return 0.0
    level = np.sort((positions @ normal / volume) % 1.0)
    across = level[0] + 1.0 - level[-1]
    return max(float(across), float((level[1:] - level[:-1]).max(initial=0.0))) * abs(volume) / area


# Unit vectors to the 12 nearest atoms of fcc and the 8 of bcc, over the cube's axes.
_FCC = np.array([(0, i, j) for i in (1, -1) for j in (1, -1)]) / np.sqrt(2)
_FCC = np.concatenate([_FCC, _FCC[:, [1, 0, 2]], _FCC[:, [1, 2, 0]]])
_BCC = np.array([(i, j, k) for i in (1, -1) for j in (1, -1) for k in (1, -1)]) / np.sqrt(3)


def surface_miller(lattice: Floats, positions: Floats) -> Miller | None:
    """The Miller index of an fcc or bcc slab (of any elements on its sites), (1, 1, 1) with the largest index
    first and without signs, as facets of a cube are all alike; None where it is not certain.

    lattice [3, 3] with the vacuum along its third vector, positions [N, 3] of the slab alone. The shell of
    neighbours of the best coordinated atom is laid over that of the lattice (least squares over rotations,
    Kabsch); the normal in the cube's axes must then be within 2 degrees of small whole numbers.
    """
    normal = np.cross(lattice[0], lattice[1])
    normal /= np.linalg.norm(normal)
    shifts = np.array([(i, j, 0) for i in range(-2, 3) for j in range(-2, 3)]) @ lattice
    n = len(positions)
    delta = positions[None, :, None] + shifts - positions[:, None, None]  # [N, N, S, 3]
    distance = np.linalg.norm(delta, axis=-1).reshape(n, -1)
    delta = delta.reshape(n, -1, 3)
    distance[distance < 1e-6] = np.inf
    for shell, reach in ((_FCC, 1.25), (_BCC, 1.08)):
        votes = set()
        near = distance < reach * distance.min(axis=1, keepdims=True)
        for atom in np.flatnonzero(near.sum(axis=1) == len(shell)):
            votes.add(_indices(delta[atom][near[atom]], shell, normal))
        votes.discard(None)
        if len(votes) == 1:
            return votes.pop()
    return None


def _indices(neighbours: Floats, shell: Floats, normal: Floats) -> Miller | None:
    """The Miller index by one shell of neighbours [K, 3], or None."""
    unit = neighbours / np.linalg.norm(neighbours, axis=1, keepdims=True)
    cosine = shell @ shell.T
    first = unit[0]
    # two neighbours that stand to each other as the shell's first and a second one do
    for i, j in ((0, 1), (0, 4), (0, 5)) if len(shell) == 12 else ((0, 1), (0, 2)):
        for k in range(1, len(unit)):
            if abs(first @ unit[k] - cosine[i, j]) > 0.12:
                continue
            frame = _frame(first, unit[k]).T @ _frame(shell[i], shell[j])
            matched = (unit @ frame) @ shell.T  # cosines between rotated neighbours and the shell
            best = matched.argmax(axis=1)
            if len(set(best.tolist())) < len(shell) or matched.max(axis=1).min() < 0.985:
                continue
            u, _, vt = np.linalg.svd(unit.T @ shell[best])
            rotation = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
            return _whole(np.sort(np.abs(normal @ rotation))[::-1])
    return None


def _frame(a: Floats, b: Floats) -> Floats:
    """Right-handed orthonormal rows with a along the first and b in the plane of the first two."""
    y = b - (a @ b) * a
    y /= np.sqrt(y @ y)
    (p, q, r), (u, v, w) = a.tolist(), y.tolist()
    return np.array([(p, q, r), (u, v, w), (q * w - r * v, r * u - p * w, p * v - q * u)])


_FACETS: list[Miller] = [
    (h, k, l) for h in range(1, 6) for k in range(h + 1) for l in range(k + 1) if gcd(h, k, l) == 1
]
_NORMALS = np.array(_FACETS) / np.linalg.norm(_FACETS, axis=1, keepdims=True)


def _whole(direction: Floats) -> Miller | None:
    """Small whole numbers along a direction, or None where none are within 2 degrees."""
    cosines = _NORMALS @ direction
    best = int(cosines.argmax())
    return _FACETS[best] if cosines[best] > np.cos(np.radians(2.0)) else None
