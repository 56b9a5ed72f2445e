"""Which atoms of a bare crystal are adsorbate, surface and bulk: a CIF carries no tags.

The cell is periodic, so "up" is decided by the vacuum: heights are measured along c from the upper side of
the largest gap between atoms. Where the boundary of the cell is a largest gap too, it wins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catmllm.structure.elements import NUMBER
from catmllm.structure.system import ADSORBATE, BULK, SURFACE

# The top layer is what lies within this of the highest slab atom: pymatgen's AdsorbateSiteFinder(height=0.9).
# In the shipped slabs the top layer spans at most 0.62 Å and the next one lies at least 1.73 Å below its
# highest atom.
LAYER_HEIGHT = 0.9  # Å
_SAME_HEIGHT = 1e-6  # Å; below this two heights are one, so that rounding noise does not choose between atoms


def layers(lattice: NDArray[np.float64], frac: NDArray[np.float64]) -> NDArray[np.int64]:
    """The number of the layer in which each of a slab's atoms [N] is: heights in neighbouring layers are more
    than `LAYER_HEIGHT` apart. Counted as the layers' first atoms come."""
    height = heights(lattice, frac)
    order = np.argsort(height)
    level = np.empty(len(frac), dtype=np.int64)
    level[order] = np.cumsum(np.diff(height[order], prepend=height.min()) > LAYER_HEIGHT)
    _, first, number = np.unique(level, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def heights(lattice: NDArray[np.float64], frac: NDArray[np.float64]) -> NDArray[np.float64]:
    """Height (Å) of every atom over the lowest one, the largest gap along c being the vacuum. [3, 3], [N,
    3] -> [N]."""
    rows, columns = (np.ascontiguousarray(array, dtype=np.float64) for array in (lattice, frac))
    found: NDArray[np.float64] = cell_heights(rows, columns)
    return found


@njit(cache=True, nogil=True)
def cell_heights(lattice, frac):
    """`heights` inside Numba: NumPy's cross, det and diff took half of the time of an answer's check."""
    a, b, c = lattice
    x, y, z = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
    spacing = abs(c[0] * x + c[1] * y + c[2] * z) / np.sqrt(x * x + y * y + z * z)
    height = frac[:, 2] - np.floor(frac[:, 2])
    levels = np.sort(height)
    across = levels[0] + 1.0 - levels[-1]  # the gap at the boundary of the cell
    largest, lowest = 0.0, 0
    for i in range(1, len(levels)):
        if levels[i] - levels[i - 1] > largest:
            largest, lowest = levels[i] - levels[i - 1], i
    if across >= largest - _SAME_HEIGHT / spacing:
        lowest = 0
    for i in range(len(height)):
        height[i] = (height[i] - levels[lowest] + (height[i] < levels[lowest])) * spacing
    return height


def surface_tags(
    lattice: NDArray[np.float64],
    frac: NDArray[np.float64],
    numbers: NDArray[np.int64],
    adsorbate: Mapping[str, int],
) -> NDArray[np.int8]:
    """Tags int8 [N]: of the elements and counts of the adsorbate the highest atoms get 2 (at equal height the
    later one, as the adsorbate comes last), of the rest those within 0.9 Å of the highest get 1, others 0.

    lattice [3, 3] (rows, Å), frac [N, 3], numbers [N]. Raises ValueError where
    the crystal lacks an adsorbate atom or has nothing else.
    """
    height = heights(lattice, frac)
    tags = np.full(len(height), BULK, dtype=np.int8)
    for symbol, count in adsorbate.items():
        there = _tag_highest(tags, height, numbers, NUMBER[symbol], count)
        if there < count:
            raise ValueError(f"the adsorbate needs {count} {symbol}, the crystal has {there}")
    if not _tag_surface(tags, height):
        raise ValueError("the crystal has no atom beside the adsorbate")
    return tags


@njit(cache=True, nogil=True)
def _tag_highest(tags, height, numbers, number, count):
    """Tags the `count` highest atoms of an element as adsorbate; how many it has."""
    there = 0
    for i in range(len(tags)):
        there += numbers[i] == number
    for _ in range(min(count, there)):
        best, level = -1, 0.0
        for i in range(len(tags)):
            if numbers[i] == number and tags[i] != ADSORBATE:
                own = np.rint(height[i] / _SAME_HEIGHT)
                if best < 0 or own >= level:
                    best, level = i, own
        tags[best] = ADSORBATE
    return there


@njit(cache=True, nogil=True)
def _tag_surface(tags, height):
    """Tags the top layer of what is not adsorbate; False where nothing is."""
    highest, any_slab = -np.inf, False
    for i in range(len(tags)):
        if tags[i] != ADSORBATE:
            highest, any_slab = max(highest, height[i]), True
    for i in range(len(tags)):
        if tags[i] != ADSORBATE and height[i] >= highest - LAYER_HEIGHT:
            tags[i] = SURFACE
    return any_slab
