"""Which atoms of a bare crystal are adsorbate, surface and bulk: a CIF carries no tags.

The cell is periodic, so "up" is decided by the vacuum: heights are measured along c from the upper side of
the largest gap between atoms. Where the boundary of the cell is a largest gap too, it wins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import NUMBER
from catmllm.structure.system import ADSORBATE, BULK, SURFACE

# The top layer is what lies within this of the highest slab atom: pymatgen's AdsorbateSiteFinder(height=0.9).
# In the shipped slabs the top layer spans at most 0.62 Å and the next one lies at least 1.73 Å below its
# highest atom.
LAYER_HEIGHT = 0.9  # Å
_SAME_HEIGHT = 1e-6  # Å; below this two heights are one, so that rounding noise does not choose between atoms


def heights(lattice: NDArray[np.float64], frac: NDArray[np.float64]) -> NDArray[np.float64]:
    """Height (Å) of every atom over the lowest one, the largest gap along c being the vacuum. [3, 3], [N,
    3] -> [N]."""
    spacing = abs(np.linalg.det(lattice)) / float(np.linalg.norm(np.cross(lattice[0], lattice[1])))
    z = frac[:, 2] - np.floor(frac[:, 2])
    levels = np.sort(z)
    gaps = np.diff(levels, append=levels[0] + 1.0)  # above each level; the last one crosses the cell boundary
    lowest = 0 if gaps[-1] >= gaps.max() - _SAME_HEIGHT / spacing else int(np.argmax(gaps)) + 1
    return np.where(z < levels[lowest], z + 1.0 - levels[lowest], z - levels[lowest]) * spacing


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
    from_top = np.lexsort((np.arange(len(height)), np.round(height / _SAME_HEIGHT)))[::-1]
    tags = np.full(len(height), BULK, dtype=np.int8)
    for symbol, count in adsorbate.items():
        of_element = from_top[numbers[from_top] == NUMBER[symbol]]
        if len(of_element) < count:
            raise ValueError(f"the adsorbate needs {count} {symbol}, the crystal has {len(of_element)}")
        tags[of_element[:count]] = ADSORBATE
    slab = tags != ADSORBATE
    if not slab.any():
        raise ValueError("the crystal has no atom beside the adsorbate")
    tags[slab & (height >= height[slab].max() - LAYER_HEIGHT)] = SURFACE
    return tags
