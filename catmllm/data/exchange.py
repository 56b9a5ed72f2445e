"""Slabs as slabs of other metals: the sites, the molecule and its place on them stay, the cell scales.

As CIF samples such slabs teach that composition, cell and rows follow from what was asked for. Without them a
small model learns training's compositions by heart, and miscounts others.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import numpy as np

from catmllm.data.fcc_slabs import FCC_CONSTANT
from catmllm.data.slabs import pair
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import format_identity
from catmllm.structure.system import ADSORBATE, System, make_system

TRIES = 20  # before a slab keeps its metals
_METALS = sorted(FCC_CONSTANT)


def with_other_metals(system: System, held_out: Container[str], rng: np.random.Generator) -> System:
    """The slab of fcc metals drawn at random, such that its (bulk, Miller index), named as by `slabs.pair`,
    is none of those held out; without an energy. The system itself where it has other metals or no draw is
    allowed."""
    old = [*system.slab_counts]
    if not set(old) <= FCC_CONSTANT.keys():
        return system
    for _ in range(TRIES):
        new = rng.choice(len(_METALS), len(old), replace=False)
        made = exchanged(system, {metal: _METALS[k] for metal, k in zip(old, new)})
        if pair(made) not in held_out:
            return made
    return system


def exchanged(system: System, names: dict[str, str]) -> System:
    """The slab of other metals, scaled by the mean of their lattice constants over that of its own, the
    vacuum as high as it was; an adsorbate keeps its form, its anchor its height above the slab."""
    numbers = system.numbers.copy()
    slab = system.tags != ADSORBATE
    symbols = [s for s, of in zip(system.symbols, slab) if of]
    numbers[slab] = [NUMBER[names[s]] for s in symbols]
    scale = float(np.mean([FCC_CONSTANT[names[s]] for s in symbols])) / float(
        np.mean([FCC_CONSTANT[s] for s in symbols])
    )
    positions, lattice = system.frac @ system.lattice, system.lattice.copy()
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
