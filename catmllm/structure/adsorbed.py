"""Whether the adsorbate of a system is one: a molecule in one piece,
on the upper side of the slab and in reach of it.

The paper's constraints (its §6) look at the composition and at the nearest pair, so a CO with 6 Å between C
and O met them all. What is asked here holds for relaxed systems and for sensible starts of a relaxation: none
of the 2,973 shipped systems fails, relaxed or as it started. Of 30 OC20 starts one does not hold (an N2 that
starts 3 Å up), of their relaxed frames those whose molecule fell apart, an H that sank into the metal, and a
slab whose atoms ran into each other.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catmllm.structure.elements import COVALENT_RADIUS, NUMBER
from catmllm.structure.formula import pieces
from catmllm.structure.periodic import any_image_within, wrap_into
from catmllm.structure.system import ADSORBATE, SURFACE, System
from catmllm.structure.tags import cell_heights

Fault = Literal["no_adsorbate", "squeezed", "broken", "overlap", "buried", "detached"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

# A bond may be this much shorter or longer than in the gas.
SHORTEST, LONGEST = 0.85, 1.20
# Gas-phase bond lengths (Å) by the elements, where bonds of several orders exist the shortest and the
# longest: CO and CH3OH, HCCH and C2H6, N2 and N2H4, O2 and H2O2, NO and NH2OH, HCN and CH3NH2 (NIST CCCBDB,
# experimental r_e or r_0).
_GAS = {
    "HH": (0.741, 0.741),
    "CH": (1.06, 1.12),
    "NH": (1.01, 1.04),
    "OH": (0.96, 0.98),
    "CO": (1.128, 1.43),
    "CC": (1.203, 1.54),
    "CN": (1.153, 1.47),
    "NN": (1.098, 1.45),
    "NO": (1.151, 1.45),
    "OO": (1.208, 1.48),
}
# Of other pairs, in sums of the covalent radii: a triple bond is about 0.8 of a single one.
_OTHER = (0.80, 1.05)
# Nearest slab-slab and adsorbate-slab pairs, in sums of the covalent radii.
# Least in the shipped systems: 0.854, 0.765.
SLAB_PAIR, ADSORBATE_PAIR = 0.72, 0.65
# sums of the covalent radii: an adsorbate without a slab atom this near is not adsorbed (most: 1.36)
REACH = 1.45
LOWEST = -0.8  # Å over the mean surface atom; an adsorbate whose lowest atom is deeper is inside the slab


def _lengths() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest length (Å) of a bond by two atomic numbers, each [119, 119]."""
    pair = COVALENT_RADIUS[:, None] + COVALENT_RADIUS
    least, most = SHORTEST * _OTHER[0] * pair, LONGEST * _OTHER[1] * pair
    for symbols, (short, long) in _GAS.items():
        i, j = (NUMBER[symbol] for symbol in symbols)
        least[i, j] = least[j, i] = SHORTEST * short
        most[i, j] = most[j, i] = LONGEST * long
    return least, most


LEAST, MOST = _lengths()


def adsorbate_fault(system: System) -> Fault | None:
    """Why the adsorbate is none, or None where it is sound.

    `no_adsorbate`: no atom is tagged, or all are. `overlap`: two atoms nearer than their radii allow, other
    than inside the adsorbate. `squeezed`: two atoms of the adsorbate nearer than any bond of theirs.
    `broken`: it is in more pieces than its name says (`(O)4`: four). `buried`: inside the slab or on its
    lower side. `detached`: out of reach of the surface.
    """
    found: int = _fault(
        np.ascontiguousarray(system.lattice),
        system.positions,
        np.ascontiguousarray(system.frac),
        system.numbers,
        system.tags,
        pieces(system.adsorbate),
        COVALENT_RADIUS,
        LEAST,
        MOST,
    )
    return _BY_CODE[found]


_BY_CODE: tuple[Fault | None, ...] = (
    None, "no_adsorbate", "overlap", "squeezed", "broken", "buried", "detached",
)  # fmt: skip


@njit(cache=True, nogil=True)
def _fault(lattice, positions, frac, numbers, tags, most_pieces, radius, shortest, longest):
    """The place in `_BY_CODE`. One function, since NumPy's small calls took most of the time of a check."""
    n = len(numbers)
    adsorbate, radii = tags == ADSORBATE, np.empty(n)
    if not adsorbate.any() or adsorbate.all():
        return 1
    least, most = np.empty((n, n)), np.empty((n, n))
    for i in range(n):
        radii[i] = radius[numbers[i]]
        for j in range(n):
            least[i, j], most[i, j] = shortest[numbers[i], numbers[j]], longest[numbers[i], numbers[j]]
    points, own, spacings, problem, _ = wrap_into(lattice, positions, REACH * 2 * radii.max())
    if problem:  # so small that its images are too many
        return 2
    overlap, squeezed, parts, reached = _contacts(
        lattice, points, own, spacings, radii, adsorbate, least, most
    )
    if overlap:
        return 2
    if squeezed:
        return 3
    if parts > most_pieces:
        return 4
    height = cell_heights(lattice, frac)
    total, n_surface, top, lowest = 0.0, 0, -np.inf, np.inf
    for i in range(n):
        if adsorbate[i]:
            lowest = min(lowest, height[i])
        else:
            top = max(top, height[i])
        if tags[i] == SURFACE:
            total, n_surface = total + height[i], n_surface + 1
    level = total / n_surface if n_surface else top
    if lowest < level + LOWEST:
        return 5
    return 0 if reached else 6


@njit(cache=True, nogil=True)
def _contacts(cell, points, frac, spacings, radii, adsorbate, least, most):
    """Whether atoms overlap, whether a bond of the adsorbate is squeezed, in how many pieces it is,
    and whether one of its atoms is in reach of the slab. least, most [N, N]: lengths of bonds, Å."""
    n = len(points)
    piece = np.arange(n)
    squeezed = reached = False
    for i in range(n):
        for j in range(i, n):
            pair = radii[i] + radii[j]
            if adsorbate[i] != adsorbate[j]:
                if any_image_within(cell, points, frac, spacings, i, j, ADSORBATE_PAIR * pair):
                    return True, squeezed, 1, reached
                reached = reached or any_image_within(cell, points, frac, spacings, i, j, REACH * pair)
            elif not adsorbate[i]:
                if any_image_within(cell, points, frac, spacings, i, j, SLAB_PAIR * pair):
                    return True, squeezed, 1, reached
            elif any_image_within(cell, points, frac, spacings, i, j, least[i, j]):
                squeezed = True
            elif piece[i] != piece[j] and any_image_within(cell, points, frac, spacings, i, j, most[i, j]):
                piece[piece == piece[j]] = piece[i]
    first = piece[adsorbate]
    return False, squeezed, len(np.unique(first)), reached
