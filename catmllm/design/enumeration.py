"""Ideal slabs of an asked composition with the adsorbate at a random site: designs without any model.

The protocol of the shipped systems before anything relaxes (`data/fcc_slabs.py`): the lattice constant
between those of the metals, the arrangement random in each layer, a random top, bridge or hollow site. A
single one of them meets half of the paper's design tasks on the shipped data, so no success rate means
anything without it.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from catmllm.data.fcc_slabs import ADSORBATES, FCC_CONSTANT, N_SLAB, build_slab, place_adsorbate
from catmllm.structure.formula import Identity, Miller, parse_identity
from catmllm.structure.system import System, make_system

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


def _share(asked: Identity) -> float | None:
    """The share of the rarer metal, where a slab of the protocol has this composition."""
    counts = sorted(asked.slab.values())
    if sum(counts) != N_SLAB or len(counts) > 2:
        return None
    share = 0.0 if len(counts) == 1 else counts[0] / N_SLAB
    return share if share in (0.0, 0.25, 0.5) else None
