"""Where the relaxation of an adsorbate on a slab begins, and a first guess of how it pushes back: stiff
along its bonds, soft elsewhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from catmllm.potentials.relax import Start, Structure
from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS

Floats = NDArray[np.float64]

# eV/Å^2. ASE's 70 for everything is too stiff for an atom on a metal. Mean steps of 20 systems from the
# shipped starts by SevenNet-0: 16.1 so, 10.9 with the numbers below, in the same minimum to 2 meV. (8 instead
# of 20 needs 8.1, but slides off labelled saddle points.)
_BOND = {frozenset("CO"): 70.0, frozenset("OH"): 45.0, frozenset("NH"): 38.0, frozenset("CH"): 32.0}
_OTHER_BOND = 40.0
_SOFT = 20.0
_LONGEST = 1.25  # of a bond, in sums of the covalent radii
_IMAGES = np.array(list(product((-1, 0, 1), repeat=3)), dtype=np.float64)


def first_hessian(numbers: NDArray[np.int64], lattice: Floats, positions: Floats) -> Floats:
    """[3N, 3N] (eV/Å²) of an adsorbate's own N atoms: numbers [N], positions [N, 3] and lattice [3, 3] in Å.
    Bonds may go through the boundary of the cell."""
    n = len(numbers)
    hessian = _SOFT * np.eye(3 * n)
    radii = COVALENT_RADIUS[numbers]
    shifts = _IMAGES @ lattice
    for i in range(n):
        for j in range(i + 1, n):
            vectors = positions[j] - positions[i] + shifts
            vector = vectors[np.argmin((vectors**2).sum(1))]
            length = float(np.linalg.norm(vector))
            if not 0 < length <= _LONGEST * float(radii[i] + radii[j]):
                continue
            pair = frozenset((SYMBOLS[numbers[i]], SYMBOLS[numbers[j]]))
            block = _BOND.get(pair, _OTHER_BOND) * np.outer(vector, vector) / length**2
            a, b = slice(3 * i, 3 * i + 3), slice(3 * j, 3 * j + 3)
            hessian[a, a] += block
            hessian[b, b] += block
            hessian[a, b] -= block
            hessian[b, a] -= block
    return hessian


def adsorbate_start(structure: Structure) -> Start:
    """The free atoms of a structure, an adsorbate that is to relax."""
    free = slice(None) if structure.free is None else structure.free
    hessian = first_hessian(structure.numbers[free], structure.lattice, structure.positions[free])
    return Start(structure, hessian)


def on_relaxed_slab(structure: Structure, slab: Floats, surface: NDArray[np.bool_]) -> Start:
    """The same on the slab as it has relaxed, its positions [N - F, 3] in order: the free atoms [F] are moved
    as its surface [N] as a whole has. Raises ValueError where no atom is held."""
    if structure.free is None:
        raise ValueError("no atom is held: the adsorbate is what is free")
    positions = structure.positions.copy()
    positions[~structure.free] = slab
    if surface.any():
        positions[structure.free] += (positions - structure.positions)[surface].mean(0)
    return adsorbate_start(replace(structure, positions=positions))
