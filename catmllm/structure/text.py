"""The three-part text `adsorbate</s>composition (h k l)</s>configuration` of a System, CatBERTa's convention.

The composition is the reduced formula of the slab, as in the paper's property prompts.
"""

from __future__ import annotations

import numpy as np

from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.formula import SEPARATOR, format_miller
from catmllm.structure.periodic import bond_matrix
from catmllm.structure.system import ADSORBATE, System

BOND_SLACK = 0.10  # Å; CatBERTa asks ASE's neighbour list with a skin of 0.05 Å for either atom
_SITES = ("", "atop", "bridge", "hollow")


def three_part_text(system: System, scale: float = 1.0) -> str:
    """`CO</s>PdIr (1 1 1)</s>[C Pd atop [Pd Ir Ir Pd C]]`. scale: see `configuration`.

    Raises ValueError where the Miller index is unknown.
    """
    composition = f"{system.bulk} {format_miller(system.known_miller)}"
    return SEPARATOR.join((system.adsorbate, composition, configuration(system, scale)))


def configuration(system: System, scale: float = 1.0) -> str:
    """The bonds between adsorbate and slab: `[C Pd Ir bridge [Pd ...] [Ir ...]]` for every binding atom, or `[]`.

    Two atoms are bonded where their distance under periodic boundary conditions is below scale (r_i + r_j) + 0.10 Å,
    r the covalent radii. scale 1.0 is for true structures, 4.0 for indicative ones (structure-missing inference). A
    binding atom is followed by its slab neighbours, the site by their number, and for each of them all its neighbours;
    everything in index order.
    """
    bonded = bond_matrix(
        system.lattice, system.positions, COVALENT_RADIUS[system.numbers] * scale, BOND_SLACK
    )
    symbols = system.symbols
    slab = system.tags != ADSORBATE
    bundles = []
    for i in np.flatnonzero(~slab):
        anchors = np.flatnonzero(bonded[i] & slab)
        if not len(anchors):
            continue
        primary = " ".join([symbols[i], *(symbols[j] for j in anchors), _SITES[min(len(anchors), 3)]])
        secondary = (
            " ".join([symbols[j], *(symbols[k] for k in np.flatnonzero(bonded[j]))]) for j in anchors
        )
        bundles.append(f"[{primary} {' '.join(f'[{s}]' for s in secondary)}]")
    return "".join(bundles) or "[]"
