"""What the surface around an adsorbate looks like, as numbers for
small regressors (kernel ridge, `evaluate/`).

Per adsorbate atom: the slab atoms around it by radial shells, in distances scaled by the covalent radii, and
in each shell the properties of their elements (electronegativity, radii, group, period). So an element that
training lacks still has a place. Of the nearest slab atoms also what stands around them: their coordination
and their neighbours' properties. Beside these soft counts stand sharp ones: the slab atoms that are bound, as
the three-part text has them. The structure counts as it is given; nothing is relaxed here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import ATOMIC_RADIUS, COVALENT_RADIUS, ELECTRONEGATIVITY, NUMBER
from catmllm.structure.formula import SEPARATOR
from catmllm.structure.graph import neighbour_graph
from catmllm.structure.sites import on_site
from catmllm.structure.system import ADSORBATE, System
from catmllm.structure.tags import heights
from catmllm.structure.text import BOND_SLACK

Floats = NDArray[np.float64]

CUTOFF = 7.0  # Å
SHELLS = np.array([0.9, 1.05, 1.2, 1.4, 1.7, 2.1, 2.6])  # centres, in sums of covalent radii
WIDTHS = np.array([0.08, 0.08, 0.1, 0.14, 0.2, 0.25, 0.3])
FOLDS = 5  # into which (bulk, Miller index) pairs fall
BONDED = 1.3  # sums of covalent radii: where the weight of a bond has fallen to a half


def _group_and_period(z: int) -> tuple[float, float]:
    """Group (1 to 18; lanthanides and actinides 3) and period of an atomic number."""
    ends = (2, 10, 18, 36, 54, 86, 118)
    period = next(p for p, end in enumerate(ends, start=1) if z <= end)
    place = z - (0, *ends)[period - 1]
    length = ends[period - 1] - (0, *ends)[period - 1]
    if length == 2:
        group = 1 if place == 1 else 18
    elif length == 8:
        group = place if place <= 2 else place + 10
    elif length == 18:
        group = place
    else:
        group = place if place <= 2 else 3 if place <= 17 else place - 14
    return float(group), float(period)


def _properties() -> Floats:
    """Element properties [119, 6], about unit scale; what is unknown
    of an element counts as the mean of all."""
    group, period = np.array([(np.nan, np.nan), *(_group_and_period(z) for z in range(1, 119))]).T
    table = np.column_stack(
        [
            (ELECTRONEGATIVITY - 2.0) / 0.4,
            (COVALENT_RADIUS - 1.35) / 0.15,
            (ATOMIC_RADIUS - 1.35) / 0.15,
            (group - 9.5) / 2.0,
            ((group - 9.5) / 2.0) ** 2,
            period - 5.0,
        ]
    )
    return np.where(np.isnan(table), np.nanmean(table, axis=0), table)


PROPERTIES = _properties()


def local_descriptor(system: System) -> Floats:
    """The descriptor [SIZE] of a system with one adsorbate: of its lowest atom and the mean over the others;
    the slab's mean properties; sites of the lowest bound atom and the mean over the others, and how many they
    are; the Miller index, in parts of its largest number, 0 where unknown.

    Of the same length for every system: an adsorbate of one atom has zeros where others have their upper
    atoms. Sites and Miller index take kernel ridge regression on the shipped systems from 0.127 to 0.115 eV.
    """
    edges = neighbour_graph(system.lattice, system.positions, CUTOFF, 400)
    source, target = edges.edge_index
    distance = np.linalg.norm(edges.edge_vec, axis=1)
    z, slab = system.numbers, system.tags != ADSORBATE
    scaled = distance / (COVALENT_RADIUS[z[source]] + COVALENT_RADIUS[z[target]])
    bond = 1.0 / (1.0 + np.exp((scaled - BONDED) / 0.06))
    metal = slab[source]
    # the slab atoms that are bound to each atom, as the three-part text has them
    reach = COVALENT_RADIUS[z[source]] + COVALENT_RADIUS[z[target]] + BOND_SLACK
    near = metal & (distance < reach)
    bound = np.zeros((len(z), len(z)), dtype=bool)
    bound[target[near], source[near]] = True
    # of slab atoms: coordination by other slab atoms, and the mean properties of these
    n = len(z)
    between = metal & slab[target]
    bonds = np.bincount(target[between] * n + source[between], bond[between], n * n).reshape(n, n)
    coordination = bonds.sum(1)
    around = bonds @ PROPERTIES[z] / np.maximum(coordination, 1e-9)[:, None]
    height = heights(system.lattice, system.frac)
    top = height[slab].max()
    atoms = np.flatnonzero(~slab)
    atoms = atoms[np.argsort(height[atoms], kind="stable")]

    def of(atom: int) -> Floats:
        mine = (target == atom) & metal
        shell = np.exp(-0.5 * ((scaled[mine, None] - SHELLS) / WIDTHS) ** 2)  # [E, S]
        weight, s = bond[mine], source[mine]
        total = max(weight.sum(), 1e-9)
        second = np.column_stack([coordination[s] / 9.0, around[s]])
        return np.concatenate(
            [
                shell.sum(0),
                (shell.T @ PROPERTIES[z[s]]).ravel(),
                [weight.sum(), scaled[mine].min(initial=3.0), height[atom] - top],
                weight @ PROPERTIES[z[s]] / total,
                weight @ second / total,
            ]
        )

    lowest = of(atoms[0])
    others = np.mean([of(a) for a in atoms[1:]], axis=0) if len(atoms) > 1 else np.zeros_like(lowest)
    sites = [_site(bound[a], bound, z) for a in atoms if bound[a].any()]
    first = sites[0] if sites else np.zeros(_SITE)
    rest = np.mean(sites[1:], axis=0) if len(sites) > 1 else np.zeros(_SITE)
    plane = np.sort(np.abs(system.miller or (0, 0, 0)))[::-1]
    return np.concatenate(
        [lowest, others, PROPERTIES[z[slab]].mean(0), first, rest, [len(sites)], plane / max(plane[0], 1)]
    )


def _site(mine: NDArray[np.bool_], bound: NDArray[np.bool_], z: NDArray[np.int64]) -> Floats:
    """What slab atoms `mine` [n] are as a site [_SITE]: whether 1, 2, 3 or more, how many, to how many slab
    atoms each is bound (`bound` [n, n]); mean, least and greatest of their properties, mean of those around.
    """
    number, metals = int(mine.sum()), PROPERTIES[z[mine]]
    times = bound[mine].sum(0)
    second = times @ PROPERTIES[z] / max(times.sum(), 1)
    counts = [number == 1, number == 2, number == 3, number > 3, number, times.sum() / number / 9.0]
    return np.concatenate([counts, metals.mean(0), metals.min(0), metals.max(0), second])


_KINDS = PROPERTIES.shape[1]
_SITE = 6 + 4 * _KINDS
SIZE = 2 * (len(SHELLS) * (1 + _KINDS) + 4 + 2 * _KINDS) + _KINDS + 2 * _SITE + 1 + 3
SURROUNDINGS = SIZE + 2 * PROPERTIES.shape[1]


def surroundings(system: System) -> Floats:
    """The descriptor with the properties of the adsorbate's own elements, of its lowest atom and the mean
    over the others: [SURROUNDINGS]. Zeros where no atom is tagged as adsorbate, or all are. What is not
    relaxed is described on the site that it is nearest to: how high it was put there tells nothing."""
    adsorbate = system.tags == ADSORBATE
    if not adsorbate.any() or adsorbate.all():
        return np.zeros(SURROUNDINGS)
    if not system.relaxed:
        system = on_site(system)
    height = heights(system.lattice, system.frac)[adsorbate]
    own = PROPERTIES[system.numbers[adsorbate][np.argsort(height, kind="stable")]]
    others = own[1:].mean(0) if len(own) > 1 else np.zeros(own.shape[1])
    return np.concatenate([local_descriptor(system), own[0], others])


TOLD = 6 * PROPERTIES.shape[1] + 9


def told(text: str) -> Floats:
    """What a three-part text tells, as numbers [TOLD]: mean and spread of the element properties of the
    metals bound, of what these are bound to and of the slab; sites, numbers of bonds, Miller index. A text of
    two parts names no bond; one of other than two or three tells nothing: zeros.
    """
    parts = text.split(SEPARATOR)
    if len(parts) not in (2, 3):
        return np.zeros(TOLD)
    name, surface, configuration = (*parts, "")[:3]
    formula, _, miller = surface.partition(" ")
    counts = re.findall(r"([A-Z][a-z]?)(\d*)", formula)
    slab = [NUMBER[e] for e, n in counts if e in NUMBER for _ in range(int(n or 1))]
    plane = [abs(float(x)) for x in re.findall(r"-?\d+", miller)] or [0.0, 0.0, 0.0]
    own = set(re.findall(r"[A-Z][a-z]?", name))
    depth, binding = 0, 0.0
    sites = dict.fromkeys(("atop", "bridge", "hollow"), 0.0)
    bound: tuple[list[int], list[int]] = ([], [])  # metals, and metals around these
    for word in re.findall(r"\[|\]|[^\s\[\]]+", configuration):
        if word in "[]":
            depth += 1 if word == "[" else -1
            binding += word == "[" and depth == 1
        elif word in sites:
            sites[word] += 1
        elif word in NUMBER and word not in own:
            bound[depth > 1].append(NUMBER[word])
    first, second = (float(len(some)) for some in bound)
    bonds = [*sites.values(), first, second / max(first, 1.0), binding]
    return np.concatenate([*map(_spread, (*bound, slab)), bonds, plane])


def _spread(elements: list[int]) -> Floats:
    """Mean and deviation of element properties; zeros of no element."""
    some = PROPERTIES[elements] if elements else np.zeros((1, PROPERTIES.shape[1]))
    return np.concatenate([some.mean(0), some.std(0)])


def known(systems: Sequence[System], held_out: Sequence[bool] | None = None) -> NDArray[np.int64]:
    """What the call says of structures [n, 3]: adsorbate (a hash of its name), whether unrelaxed, and the
    fold of its (bulk, Miller index) pair, -1 where all fits may speak (`held_out` false, or None for all)."""
    out = np.empty((len(systems), 3), dtype=np.int64)
    for i, s in enumerate(systems):
        fold = fold_of(s) if held_out is not None and held_out[i] else -1
        out[i] = zlib.crc32(s.adsorbate.encode()), not s.relaxed, fold
    return out


def fold_of(system: System) -> int:
    """0 to FOLDS - 1, the same for systems of one (bulk, Miller index) pair."""
    return zlib.crc32(f"{system.bulk} {system.miller}".encode()) % FOLDS
