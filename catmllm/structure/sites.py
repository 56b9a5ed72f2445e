"""Adsorption sites of a surface, as the triangles between its atoms seen from above have them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError

from catmllm.structure.elements import COVALENT_RADIUS
from catmllm.structure.system import ADSORBATE, SURFACE, System

Floats = NDArray[np.float64]

CONTACT = 0.95  # sums of covalent radii from the atom that binds to the nearest slab atom
_REACH = 7.0  # Å along the surface
_SQUARE = 1.25  # a triangle whose longest side is this many times the mean of the others is half a rectangle


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
