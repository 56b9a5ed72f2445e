"""The same system seen from elsewhere: symmetry operations of the slab's sites,
as training data that costs nothing.

A slab's site lattice has symmetries that its species and relaxed positions do not. Carrying all atoms through
one of them gives the same crystal (a translation, rotation or mirror image: the energy is the same) whose CIF
differs in which site holds which atom. Without this a small model learns the few hundred training slabs by
heart: on systems of other slabs its cross-entropy was 0.95 per token against 0.20 in training.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.system import ADSORBATE, System

MATCH = 0.9  # Å that an atom may stand away from the site it is carried to, as relaxed atoms do
# Where the adsorbate comes to. On a 2x2 cell sites stand at quarters and sixths, and of the four equal places
# of each one is clearly the nearest to a third. The middle is as near to a quarter as to three quarters.
PLACE = 1 / 3
LEANS = 0.3  # Å from above its first atom at which the rest of a molecule leans
# Where it then leans to, from the first edge to the second: inside a sector of the symmetry of either facet.
TOWARDS = np.deg2rad(22.5)
LEVEL = 0.3  # Å in height within which two sites may be carried into each other


def symmetric_copy(system: System, rng: np.random.Generator) -> System:
    """A random equivalent of a system under its slab's site symmetry;
    the system itself where there is none.

    Turns and mirror images are drawn; where a molecule leans it is the one that brings its lean nearest to
    `TOWARDS`, so that x leaves little open of y. Of the translations it is the one that brings the first atom
    of the adsorbate nearest to `PLACE`, so that each site has one place in the cell, inside it. The slab's
    rows keep their sites (row k holds the atom that now stands nearest to where row k stood), the adsorbate
    stays last. Distances, energy and three-part text up to the order of words are those of the original.
    """
    operations = _isometries(system.lattice.tobytes())
    drawn = [operations[k] for k in rng.permutation(len(operations))]
    lean = _lean(system)
    if lean is not None:
        a, b = system.lattice[:2, :]
        across = b - a * (a @ b) / (a @ a)
        towards = np.cos(TOWARDS) * a / np.linalg.norm(a) + np.sin(TOWARDS) * across / np.linalg.norm(across)
        drawn.sort(key=lambda turn: -float(lean @ turn @ system.lattice @ towards))
    for turn in drawn:
        copy = _carried(system, turn)
        if copy is not None:
            return copy
    return system


def _lean(system: System) -> NDArray[np.float64] | None:
    """Where the mean of an adsorbate's other atoms is from its first, along the surface, in fractional
    coordinates; None where it is above."""
    atoms = system.frac[system.tags == ADSORBATE]
    if len(atoms) < 2:
        return None
    off = atoms[1:] - atoms[0]
    lean = (off - np.round(off)).mean(0) * (1, 1, 0)
    return lean if np.linalg.norm(lean @ system.lattice) > LEANS else None


def _carried(system: System, turn: NDArray[np.float64]) -> System | None:
    """The system turned and moved; None where that does not carry the slab's sites onto each other."""
    slab = np.flatnonzero(system.tags != ADSORBATE)
    sites = system.frac[slab]
    height = system.positions[slab, 2]
    low = int(height.argmin())
    shifts = sites[np.abs(height - height[low]) < LEVEL] - sites[low] @ turn
    anchor = system.frac[np.argmax(system.tags == ADSORBATE)] @ turn
    off = (anchor + shifts)[:, :2] - PLACE
    shift = shifts[np.linalg.norm(off - np.round(off), axis=1).argmin()]
    shift[2] = 0.0
    moved = system.frac @ turn + shift
    apart = moved[slab][:, None] - sites[None]
    apart -= np.round(apart)
    distance = np.linalg.norm(apart @ system.lattice, axis=2)
    source = distance.argmin(0)
    if len(np.unique(source)) < len(slab) or distance[source, np.arange(len(slab))].max() > MATCH:
        return None
    order = np.arange(len(system.frac))
    order[slab] = slab[source]
    frac = moved[order]
    start = None if system.start is None else (system.start @ turn + shift)[order]
    return replace(
        system,
        frac=frac - np.floor(frac),
        numbers=system.numbers[order],
        tags=system.tags[order],
        start=start,
    )


@functools.lru_cache(maxsize=4096)
def _isometries(lattice: bytes) -> list[NDArray[np.float64]]:
    """Integer maps [3, 3] of fractional rows that leave c alone and keep every length of the lattice, within
    a thousandth of the longer edge's square, however high the vacuum is."""
    cell = np.frombuffer(lattice).reshape(3, 3)
    gram = cell @ cell.T
    within = 1e-3 * gram[:2, :2].max()
    found = []
    for entries in itertools.product((-1, 0, 1), repeat=4):
        turn = np.eye(3)
        turn[:2, :2] = np.reshape(entries, (2, 2))
        if abs(np.linalg.det(turn)) == 1 and np.allclose(turn @ gram @ turn.T, gram, rtol=0, atol=within):
            found.append(turn)
    return found
