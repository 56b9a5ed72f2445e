"""Slabs as slabs of other metals: the sites, the molecule and its place on them stay, the cell scales.

As CIF samples such slabs teach that composition, cell and rows follow from what was asked for. Without them a
small model learns training's compositions by heart, and miscounts others.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from catmllm.data.fcc_slabs import FCC_CONSTANT
from catmllm.data.slabs import pair
from catmllm.data.surfaces import METALS
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import format_identity
from catmllm.structure.system import ADSORBATE, System, make_system
from catmllm.structure.tags import heights

TRIES = 20  # before a slab keeps its metals


def _fcc_constant(crystal: str, a: float, c: float) -> float:
    """The lattice constant (Å) of the fcc crystal whose atoms have the volume of those of another one."""
    four_atoms = {"fcc": a**3, "bcc": 2 * a**3, "hcp": math.sqrt(3) * a * a * c}
    return four_atoms[crystal] ** (1 / 3)


# Å; those of the shipped slabs' metals are these slabs' own.
CONSTANT = {metal: _fcc_constant(*of) for metal, of in METALS.items()} | FCC_CONSTANT
_METALS = sorted(CONSTANT)


def other_metals(system: System, held_out: Container[str], rng: np.random.Generator) -> dict[str, str]:
    """Metals drawn at random for those of a slab, such that its (bulk, Miller index), named as by
    `slabs.pair`, is none of those held out, and the adsorbate as sound as it was; none where it has other
    metals or no draw is allowed."""
    old = [*system.slab_counts]
    if not set(old) <= CONSTANT.keys():
        return {}
    for _ in range(TRIES):
        new = rng.choice(len(_METALS), len(old), replace=False)
        names = {metal: _METALS[k] for metal, k in zip(old, new)}
        made = exchanged(system, names)
        if pair(made) not in held_out and adsorbate_fault(made) in (None, adsorbate_fault(system)):
            return names
    return {}


def exchanged(system: System, names: dict[str, str]) -> System:
    """The slab of other metals, scaled by the mean of their lattice constants, as fcc, over that of its own,
    the vacuum as high as it was; an adsorbate keeps its form, its anchor its height above the slab. The
    energy is not known."""
    numbers = system.numbers.copy()
    slab = system.tags != ADSORBATE
    symbols = [s for s, of in zip(system.symbols, slab) if of]
    numbers[slab] = [NUMBER[names[s]] for s in symbols]
    scale = float(np.mean([CONSTANT[names[s]] for s in symbols])) / float(
        np.mean([CONSTANT[s] for s in symbols])
    )
    positions, lattice = _unwrapped(system) @ system.lattice, system.lattice.copy()
    thick = float(np.ptp(positions[slab, 2]))
    lattice[:2] *= scale
    lattice[2] *= 1 + (scale - 1) * thick / lattice[2, 2]
    anchor = positions[~slab][0]
    top = positions[slab, 2].max()
    moved = np.array([*(anchor[:2] * scale), top * scale + anchor[2] - top])
    positions[~slab] += moved - anchor
    positions[slab] *= scale
    made = make_system(lattice, positions, numbers, system.tags, system.adsorbate, system.miller)
    sid = format_identity(made.adsorbate, made.slab_counts, made.miller)
    return replace(made, relaxed=system.relaxed, sid=sid)


def _unwrapped(system: System) -> NDArray[np.float64]:
    """Fractional coordinates [N, 3] of a slab that no boundary along c cuts, and of an adsorbate whose atoms
    are the nearest images to its first."""
    frac = system.frac.copy()
    height = heights(system.lattice, frac) / system.lattice[2, 2]
    frac[:, 2] += np.round(frac[height.argmin(), 2] + height - frac[:, 2])
    atoms = np.flatnonzero(system.tags == ADSORBATE)
    images = np.array([(i, j, 0) for i in (0, -1, 1) for j in (0, -1, 1)])
    for atom in atoms[1:]:
        way = frac[atom] - frac[atoms[0]]
        near = way - np.round(way) + images
        frac[atom] += np.round(near[np.linalg.norm(near @ system.lattice, axis=1).argmin()] - way)
    return frac
