"""Pictures of adsorption systems as small inline SVG: from above and from the side, with periodic images."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from catmllm.structure.elements import COLOUR, COVALENT_RADIUS, SYMBOLS
from catmllm.structure.system import ADSORBATE, System
from catmllm.structure.tags import heights

MAX_ATOMS = 300  # a generated cell may hold thousands
_MAX_CIRCLES = 600
_IMAGES = 3  # periodic images to either side, enough for every cell that is no needle
_MARGIN = 1.2  # Å above and below the side view

Floats = NDArray[np.float64]


def structure_svg(system: System, view: Literal["top", "side"], width: int = 170) -> str:
    """An `<svg>` of `width` pixels: covalent radii, jmol colours, what lies deeper is paler,
    the adsorbate is ringed.

    The window is centred on the adsorbate and 9 to 24 Å wide, by the cell.
    Raises ValueError for more than 300 atoms.
    """
    if len(system) > MAX_ATOMS:
        raise ValueError(f"{len(system)} atoms are too many to draw; the limit is {MAX_ATOMS}")
    points = unbroken(system)
    adsorbed = system.tags == ADSORBATE
    centre = points[adsorbed if adsorbed.any() else slice(None)].mean(axis=0)
    edge = float(np.linalg.norm(system.lattice[:2], axis=1).max())
    half = float(np.clip(1.7 * edge, 9.0, 24.0)) / 2
    atoms, xyz = _images(system, points, centre, half)
    low, high = float(points[:, 2].min()), float(points[:, 2].max())
    if view == "top":
        flat, depth = xyz[:, :2], xyz[:, 2]
        box = (centre[0] - half, centre[1] - half, 2 * half, 2 * half)
    else:
        in_slice = np.abs(xyz[:, 1] - centre[1]) <= max(0.5 * abs(system.lattice[1, 1]), 1.0) + 1e-6
        atoms, xyz = atoms[in_slice], xyz[in_slice]
        flat, depth = xyz[:, [0, 2]], -xyz[:, 1]
        height = min(high - low + 2 * _MARGIN + 1.0, 4 * half)
        box = (centre[0] - half, high + _MARGIN + 0.5 - height, 2 * half, height)
    order = np.argsort(depth, kind="stable")[-_MAX_CIRCLES:]
    scale = width / box[2]
    pale = _paleness(depth, system.tags[atoms] == ADSORBATE)
    shapes = [_circle(system, int(atoms[i]), flat[i], box, scale, float(pale[i])) for i in order]
    if view == "top":
        shapes.append(_outline(system.lattice, centre, box, scale))
    size = f'width="{width}" height="{box[3] * scale:.0f}" viewBox="0 0 {width} {box[3] * scale:.0f}"'
    return f'<svg {size} role="img" aria-label="{view} view" class="atoms">{"".join(shapes)}</svg>'


def legend(system: System) -> str:
    """The elements of a system as coloured dots with their symbols, HTML."""
    dots = (
        f'<span class="dot" style="background:{COLOUR[z]}"></span>{SYMBOLS[z]}'
        for z in dict.fromkeys(system.numbers.tolist())
    )
    return '<span class="elements">' + " ".join(dots) + "</span>"


def unbroken(system: System) -> Floats:
    """Positions [N, 3] (Å) with the slab in one piece along c: z is the height over the lowest atom."""
    height = heights(system.lattice, system.frac)
    along_c = system.lattice[2] / system.lattice[2, 2]
    inside = system.frac - np.floor(system.frac)
    flat = inside[:, :2] @ system.lattice[:2]
    points: Floats = flat + height[:, None] * along_c
    return points


def _images(system: System, points: Floats, centre: Floats, half: float) -> tuple[NDArray[np.int64], Floats]:
    """Atom indices [M] and positions [M, 3] of the images whose centre
    is within the window and a radius around it."""
    steps = np.arange(-_IMAGES, _IMAGES + 1)
    shifts = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2) @ system.lattice[:2]
    xyz = (points[:, None] + shifts[None]).reshape(-1, 3)
    atoms = np.repeat(np.arange(len(points)), len(shifts))
    seen = (np.abs(xyz[:, :2] - centre[:2]) <= half + 1.5).all(axis=1)
    return atoms[seen], xyz[seen]


def _paleness(depth: Floats, adsorbed: NDArray[np.bool_]) -> Floats:
    """0 for the adsorbate and the foremost slab atoms, up to 0.6 for those farthest behind:
    [M] of depth [M]."""
    slab = depth[~adsorbed]
    front, back = (float(slab.max()), float(slab.min())) if len(slab) else (0.0, 0.0)
    return np.where(adsorbed, 0.0, 0.6 * np.clip((front - depth) / max(front - back, 1e-9), 0.0, 1.0))


def _circle(
    system: System, atom: int, at: Floats, box: tuple[float, float, float, float], scale: float, pale: float
) -> str:
    z = int(system.numbers[atom])
    full = np.array([int(COLOUR[z][k : k + 2], 16) for k in (1, 3, 5)]) / 255
    fill = _hex(full * (1 - pale) + pale)
    ringed = system.tags[atom] == ADSORBATE
    x, y = (at[0] - box[0]) * scale, (box[1] + box[3] - at[1]) * scale
    radius = float(COVALENT_RADIUS[z]) * scale * (1.0 if ringed else 0.95)
    stroke = ("#000", 1.4) if ringed else (_hex(np.full(3, 0.25 + 0.5 * pale)), 0.6)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" stroke="{stroke[0]}" '
        f'stroke-width="{stroke[1]}"/>'
    )


def _outline(lattice: Floats, centre: Floats, box: tuple[float, float, float, float], scale: float) -> str:
    """The cell in the plane, centred on the adsorbate."""
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) @ lattice[:2, :2] + centre[:2]
    points = " ".join(f"{(x - box[0]) * scale:.1f},{(box[1] + box[3] - y) * scale:.1f}" for x, y in corners)
    return f'<polygon points="{points}" fill="none" stroke="#000" stroke-width="1" stroke-dasharray="4 3"/>'


def _hex(rgb: Floats) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, channel))):02x}" for channel in rgb.tolist())
