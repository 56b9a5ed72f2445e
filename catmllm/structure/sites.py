"""Adsorption sites of a surface, as the triangles between its atoms seen from above have them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError

from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.system import ADSORBATE, SURFACE, System

Floats = NDArray[np.float64]

CONTACT = 0.95  # sums of covalent radii from the atom that binds to the nearest slab atom
_REACH = 7.0  # Å along the surface
_SQUARE = 1.25  # a triangle whose longest side is this many times the mean of the others is half a rectangle
_SAME = 0.1  # Å; two sites this near are one
_UNDER = 0.5  # Å along the surface from a site to an atom that is under it
_LAYER = 1.0  # Å; so far below the highest of them atoms still belong to the second layer
Kind = Literal["top", "hollow", "bridge"]
KINDS: tuple[Kind, ...] = ("top", "hollow", "bridge")


class Site(NamedTuple):
    """A site of a surface: its kind, its centre [3] (Å, in the cell) amid the atoms that it is between, their
    symbols in order, and that of the atom of the second layer right under it, or None."""

    kind: Kind
    centre: Floats
    symbols: tuple[str, ...]
    below: str | None


def different_sites(system: System, most: int) -> list[Site]:
    """One site of each kind, by the elements that it is between and above; at most so many, tops first, then
    hollows, then bridges."""
    found = {(s.kind, s.symbols, s.below): s for s in reversed(surface_sites(system))}
    return sorted(found.values(), key=lambda s: (KINDS.index(s.kind), s.symbols, s.below or ""))[:most]


def surface_sites(system: System) -> list[Site]:
    """All top, bridge and hollow sites of the cell, where the surface atoms and the triangles between them
    have them; two triangles that make a rectangle have one hollow. Empty without a surface."""
    surface, under = system.tags == SURFACE, system.tags < SURFACE
    points = system.positions[surface]
    if not len(points):
        return []
    shifts = np.array([[i, j] for i in range(-3, 4) for j in range(-3, 4)]) @ system.lattice[:2]
    order = np.argsort(np.linalg.norm(shifts, axis=1), kind="stable")  # the cell itself first
    images = (points + shifts[order, None]).reshape(-1, 3)
    symbols = np.tile(np.array(system.symbols)[surface], len(shifts))
    sites: list[tuple[tuple[int, ...], Kind]] = [((k,), "top") for k in range(len(points))]
    try:
        triangles = Delaunay(images[:, :2]).simplices
    except (QhullError, ValueError):
        triangles = np.empty((0, 3), dtype=np.int64)
    for corners in triangles:
        if corners.min() < 9 * len(points):  # what lies further out has a twin nearer by
            sites += _sites_of(images, corners)
    found: list[Site] = []
    inverse = np.linalg.inv(system.lattice[:2, :2])
    lower = system.positions[under]
    for corners, kind in sites:
        centre = images[list(corners)].mean(0)
        centre -= np.floor(centre[:2] @ inverse + 1e-6) @ system.lattice[:2]
        apart = (np.array([s.centre[:2] for s in found]).reshape(-1, 2) - centre[:2]) @ inverse
        if (np.linalg.norm((apart - np.round(apart)) @ system.lattice[:2, :2], axis=1) < _SAME).any():
            continue
        apart = (lower[:, :2] - centre[:2]) @ inverse
        beside = np.linalg.norm((apart - np.round(apart)) @ system.lattice[:2, :2], axis=1)
        near = (beside < _UNDER) & (lower[:, 2] > lower[:, 2].max(initial=-np.inf) - _LAYER)
        below = [s for s, of in zip(np.array(system.symbols)[under].tolist(), near) if of]
        names = tuple(sorted(symbols[list(corners)].tolist()))
        found.append(Site(kind, centre, names, below[0] if below else None))
    return found


def _sites_of(images: Floats, corners: NDArray[np.int32]) -> list[tuple[tuple[int, ...], Kind]]:
    """The bridges and the hollow of a triangle, by the atoms that each is between."""
    i, j, k = (int(c) for c in corners)
    sides = sorted(((i, j), (j, k), (k, i)), key=lambda s: float(np.linalg.norm(images[s[0]] - images[s[1]])))
    lengths = [float(np.linalg.norm(images[a] - images[b])) for a, b in sides]
    if 2 * lengths[2] < _SQUARE * (lengths[0] + lengths[1]):
        return [*((side, "bridge") for side in sides), ((i, j, k), "hollow")]
    middle = images[list(sides[2])].mean(0)
    around = np.argsort(np.linalg.norm(images - middle, axis=1), kind="stable")[:4]
    return [*((side, "bridge") for side in sides[:2]), (tuple(around.tolist()), "hollow")]


def on_site(system: System) -> System:
    """The adsorbate moved, as it is, to the nearest top, bridge or hollow site, and up or down until the atom
    that binds touches the slab (`CONTACT`). As it was where there is no surface to find a site on."""
    adsorbate, surface = system.tags == ADSORBATE, system.tags == SURFACE
    if not adsorbate.any() or not surface.any():
        return system
    cell, positions = system.lattice, system.positions
    normal = np.cross(cell[0], cell[1])
    spans = np.linalg.norm(normal) / np.linalg.norm(cell[[1, 0]], axis=1)  # between the cell's sides, Å
    many = [np.arange(-n, n + 1) for n in np.ceil(_REACH / spans).astype(int)]
    shifts = np.stack(np.meshgrid(*many), axis=-1).reshape(-1, 2) @ cell[:2]
    normal = normal / np.linalg.norm(normal)

    def images(some: NDArray[np.bool_]) -> Floats:
        return np.asarray((positions[some][:, None] + shifts).reshape(-1, 3))

    slab = images(~adsorbate)
    radii = np.repeat(COVALENT_RADIUS[system.numbers[~adsorbate]], len(shifts))
    own = COVALENT_RADIUS[system.numbers[adsorbate]]
    apart = np.linalg.norm(positions[adsorbate][:, None] - slab, axis=2) / (own[:, None] + radii)
    first = int(apart.min(1).argmin())
    here = positions[adsorbate][first]
    across = np.stack(
        [cell[0] / np.linalg.norm(cell[0]), np.cross(normal, cell[0]) / np.linalg.norm(cell[0])]
    )
    site = _nearest((images(surface) - here) @ across.T)
    if site is None:
        return system
    along = (slab - here) @ across.T - site
    touch = CONTACT * (own[first] + radii)
    under = (along**2).sum(1) < touch**2
    if not under.any():
        return system
    height = (slab - here) @ normal
    up = float((height[under] + np.sqrt(touch[under] ** 2 - (along[under] ** 2).sum(1))).max())
    moved = positions.copy()
    moved[adsorbate] += site @ across + up * normal
    return replace(system, frac=moved @ np.linalg.inv(cell))


def _nearest(points: Floats) -> Floats | None:
    """The site [2] nearest to the origin, of the triangle of points [n, 2] that it lies in; None where it is
    in none."""
    near = points[np.linalg.norm(points, axis=1) < _REACH]
    try:
        triangles = Delaunay(near)
    except (QhullError, ValueError):
        return None
    mine = int(triangles.find_simplex(np.zeros((1, 2)))[0])
    if mine < 0:
        return None
    corners = near[triangles.simplices[mine]]
    sides = list(pairwise([*corners, corners[0]]))
    lengths = np.array([np.linalg.norm(b - a) for a, b in sides])
    sites = [*corners, *((a + b) / 2 for a, b in sides)]
    if 2 * lengths.max() < _SQUARE * (lengths.sum() - lengths.max()):
        sites.append(corners.mean(0))  # else the middle of the longest side is that of a rectangle
    return np.asarray(min(sites, key=lambda site: float(np.linalg.norm(site))))
