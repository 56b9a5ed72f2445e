"""Training slabs as the slabs that a design asks for: their elements exchanged, their cells scaled.

What an adsorption energy depends on beyond the metals is the site and what stands around it. A training
system of nearly the wanted energy brings both, and a relaxed geometry, to another composition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

from catmllm.data.exchange import exchanged
from catmllm.data.fcc_slabs import FCC_CONSTANT
from catmllm.structure.formula import parse_identity
from catmllm.structure.system import System


def analogues(
    slabs: Sequence[Sequence[str]], energies: Sequence[float], known: Sequence[System], n: int
) -> list[list[System]]:
    """For each task the n systems of `known` that are nearest to its energy (eV) on one of its slabs, as such
    a slab: those of which fewest atoms change their element come first, then those whose energy is nearest.
    slabs: of each task identity lines of one adsorbate and facet. Fewer where no more can become one: a slab
    of 9 and 3 atoms has no composition of 6 and 6. Systems with energies; each is read once."""
    asked = [[parse_identity(line) for line in lines] for lines in slabs]
    near: dict[Any, list[System]] = {(i.adsorbate, i.miller): [] for some in asked for i in some}
    for system in known if n and near else ():
        near.get((system.adsorbate, system.miller), []).append(system)
    found = []
    for some, energy in zip(asked, energies):
        same = near[some[0].adsorbate, some[0].miller] if some else []
        wanted = [i.slab for i in some if set(i.slab) <= set(FCC_CONSTANT)]
        ranked = sorted(
            (
                (sum(count for old, count in s.slab_counts.items() if names[old] != old), off, k, names)
                for k, s in enumerate(same)
                if set(s.slab_counts) <= set(FCC_CONSTANT)
                for off in (abs(s.known_energy - energy),)
                for slab in wanted
                for names in renamings(s.slab_counts, slab)
            ),
            key=lambda row: row[:3],
        )
        found.append([exchanged(same[k], names) for _, _, k, names in ranked[:n]])
    return found


def renamings(old: dict[str, int], new: dict[str, int]) -> Iterator[dict[str, str]]:
    """Every way to give the metals of a slab other names so that it has the composition `new`."""
    if len(new) == 1:
        (metal, count), total = *new.items(), sum(old.values())
        if count == total:
            yield dict.fromkeys(old, metal)
        return
    if len(old) == len(new):
        for names in permutations(new):
            if all(old[metal] == new[name] for metal, name in zip(old, names)):
                yield dict(zip(old, names))
