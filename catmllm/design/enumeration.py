"""Ideal slabs of an asked composition with the adsorbate at a random site: designs without any model.

The protocol of the shipped systems before anything relaxes (`data/fcc_slabs.py`): the lattice constant
between those of the metals, the arrangement random in each layer, a random top, bridge or hollow site. A
single one of them meets half of the paper's design tasks on the shipped data, so no success rate means
anything without it.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from catmllm.data.fcc_slabs import ADSORBATES, FCC_CONSTANT, N_SLAB, build_slab, place_adsorbate
from catmllm.structure.elements import NUMBER
from catmllm.structure.formula import Identity, Miller, parse_identity
from catmllm.structure.sites import different_sites
from catmllm.structure.system import ADSORBATE, System, make_system

MOST_SITES = 10  # of a slab; the alloys of the protocol have 5 to 12 different ones
FACETS: dict[Miller | None, str] = {(1, 1, 1): "111", (1, 0, 0): "100"}


def enumerable(identity: str) -> str | None:
    """Why `ideal_system` cannot make a system, or None where it can."""
    asked = parse_identity(identity)
    if asked.miller not in FACETS:
        return f"facet {asked.miller} is none of {list(FACETS)}"
    if asked.adsorbate not in ADSORBATES:
        return f"adsorbate {asked.adsorbate} is none of {', '.join(ADSORBATES)}"
    unknown = [m for m in asked.slab if m not in FCC_CONSTANT]
    if unknown:
        return f"no fcc lattice constant of {', '.join(unknown)}"
    if _share(asked) is None:
        return f"{asked.slab} is no slab of {N_SLAB} atoms with one metal, A3B or AB"
    try:
        import ase  # noqa: F401
    except ImportError:
        return "slabs are built by ase, which is not installed: pip install ase"
    return None


def ideal_system(identity: str, rng: Random, sid: str = "") -> System:
    """A random unrelaxed system of `CO</s>Pt9Cu3 (1 1 1)`.
    Raises ValueError where `enumerable` says why not."""
    problem = enumerable(identity)
    if problem:
        raise ValueError(f"{identity!r}: {problem}")
    asked = parse_identity(identity)
    share = _share(asked)
    assert share is not None
    metals = sorted(asked.slab, key=lambda m: -asked.slab[m])
    slab = build_slab(FACETS[asked.miller], metals[0], metals[-1], share, rng)
    _, _, atoms = place_adsorbate(slab, asked.adsorbate, rng)
    tags = [0] * 8 + [1] * 4 + [2] * (len(atoms) - N_SLAB)
    system = make_system(
        atoms.cell[:], atoms.positions, atoms.numbers, tags, asked.adsorbate, asked.miller, sid=sid
    )
    return replace(system, relaxed=False)  # to a predictor it is what a design is


def ideal_slab(identity: str, rng: Random) -> System:
    """The slab of such a system without an adsorbate, and with the name of none. Raises ValueError where
    `enumerable` says why not."""
    system = ideal_system(identity, rng)
    slab = system.tags != ADSORBATE
    return replace(
        system, frac=system.frac[slab], numbers=system.numbers[slab], tags=system.tags[slab], adsorbate=""
    )


def on_sites(slab: System, adsorbate: str) -> list[System]:
    """An adsorbate on the different sites of a slab that has none (at most `MOST_SITES`), as high over them
    as the shipped systems' starts. adsorbate: one of `ADSORBATES`."""
    species = ADSORBATES[adsorbate]
    numbers = np.array([NUMBER[s] for s in species.symbols])
    tags = np.concatenate([slab.tags, np.full(len(numbers), ADSORBATE, dtype=np.int8)])
    found = []
    for site in different_sites(slab, MOST_SITES):
        centre = site.centre + [0.0, 0.0, species.heights[len(site.symbols) - 1]]
        own = (np.array(species.positions) + centre) @ np.linalg.inv(slab.lattice)
        found.append(
            replace(
                slab,
                frac=np.concatenate([slab.frac, own]),
                numbers=np.concatenate([slab.numbers, numbers]),
                tags=tags,
                adsorbate=adsorbate,
            )
        )
    return found


def _share(asked: Identity) -> float | None:
    """The share of the rarer metal, where a slab of the protocol has this composition."""
    counts = sorted(asked.slab.values())
    if sum(counts) != N_SLAB or len(counts) > 2:
        return None
    share = 0.0 if len(counts) == 1 else counts[0] / N_SLAB
    return share if share in (0.0, 0.25, 0.5) else None
