"""Slabs for the energies of their best sites: adsorbates, facet and energies are given, the metals free.

What a catalyst does is mostly told by where adsorbates bind most firmly. So an answer is a slab without an
adsorbate, and its energy is the lowest of those that relaxations from its different sites end at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from catmllm.design.enumeration import on_sites
from catmllm.design.search import structure_key
from catmllm.evaluate.judges import Judge
from catmllm.structure.system import System


@dataclass(frozen=True)
class Lowest:
    """What a judge says of an adsorbate on a slab. energy: the lowest adsorption energy (eV) of the starts
    that count, nan where none does; sites: how many starts there were; left_out: of those that do not count,
    how many for which reason (`JudgedEnergy`)."""

    energy: float
    sites: int
    left_out: dict[str, int]


def lowest_energies(
    judge: Judge, asked: Sequence[tuple[System, str]], progress: bool = False
) -> list[Lowest]:
    """Of each slab without an adsorbate, and name of one, the adsorption energy of the best of the different
    sites: the adsorbate relaxes from each of `on_sites`. Equal ones are judged once."""
    keys = [(structure_key(slab), adsorbate) for slab, adsorbate in asked]
    starts = {key: on_sites(slab, adsorbate) for key, (slab, adsorbate) in zip(keys, asked)}
    verdicts = iter(judge.judge_many([s for some in starts.values() for s in some], progress=progress))
    found = {}
    for key, some in starts.items():
        mine = [next(verdicts) for _ in some]
        counted = [v.energy for v in mine if v.ok]
        reasons = Counter(v.reason for v in mine if v.reason is not None)
        found[key] = Lowest(min(counted, default=float("nan")), len(mine), dict(reasons))
    return [found[key] for key in keys]
