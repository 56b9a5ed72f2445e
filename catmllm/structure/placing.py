"""Where the next atom of a CIF may stand, from what of the file has been written so far.

The rules are those of `adsorbed.py`, which judges whole structures: no two atoms nearer than their radii
allow, the adsorbate on the upper side, in reach of the slab and in one piece. A slab that has a template
keeps to it. Slab atoms come first, as `write_cif` has them. What is asked is cheap: a line through the cell
cuts a sphere in one interval, so that a coordinate's thousand values take about 50 µs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catmllm.structure.adsorbed import (
    ADSORBATE_PAIR,
    LEAST,
    LONGEST,
    LOWEST,
    MOST,
    REACH,
    SLAB_PAIR,
)
from catmllm.structure.elements import COVALENT_RADIUS, NUMBER, SYMBOLS
from catmllm.structure.periodic import first_and_last
from catmllm.structure.system import lattice_from_parameters
from catmllm.structure.tags import LAYER_HEIGHT, heights
from catmllm.structure.templates import Shape, Template

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_CELL = tuple(
    f"_cell_{name} "
    for name in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
)
_VOLUME = "_cell_volume "
_SURE = 0.99  # of a bond's greatest length, within which a first and a second coordinate leave a third
_THINNEST = 1.0  # Å between lattice planes; a thinner cell is no slab, whatever stands in it
_HYDROGEN = NUMBER["H"]


class Growing:
    """A structure while its CIF is being written: `read` its text as it comes, ask `bounds` before a number
    of its cell and `free` before a coordinate."""

    def __init__(
        self,
        slab: Mapping[str, int],
        adsorbate: Mapping[str, int],
        pieces: int = 1,
        template: Template | None = None,
        shape: Shape | None = None,
        by_layer: bool = False,
    ) -> None:
        """The rows of the slab, and then those of the adsorbate's atoms, by element; of several molecules
        each atom has to be in reach of the slab, but need not hang on another. What is known of the slab and
        of the molecule's shape holds as far as it can. by_layer: in each layer of the slab the
        atoms of one element come after those of another, each element's in the order of the sites."""
        self.template = template
        self.by_layer = by_layer
        self.sites: list[int] = []  # of the template, on which the slab's rows stand
        self.shape = {(NUMBER[a], NUMBER[b]): limits for (a, b), limits in (shape or {}).items()}
        self.n_slab = sum(slab.values())
        self.n_atoms = self.n_slab + sum(adsorbate.values())
        # Å: a chain of all atoms of the slab. No edge along a slab is longer, or it would not hang together.
        self.longest = self.n_slab * LONGEST * 2 * max(float(COVALENT_RADIUS[NUMBER[s]]) for s in slab)
        self.hydrogen = set(adsorbate) == {"H"}  # and nothing else
        self.whole = pieces == 1
        self.cell: list[float] = []  # its six parameters, as far as they are known
        self.lattice: Floats | None = None  # None too where it is none that can be searched
        self.spacings = np.zeros(3)
        self.numbers = np.zeros(self.n_atoms, dtype=np.int64)
        self.frac = np.zeros((self.n_atoms, 3))
        self.n = 0
        # z of the lowest slab atom, as frac, and over it the surface and the middle of the vacuum, Å
        self.levels = (0.0, 0.0, 0.0)
        self._line = ""

    def read(self, text: str) -> None:
        """Go on by more of the file's text."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if len(self.cell) < len(_CELL):
                if line.startswith(_CELL[len(self.cell)]):
                    self.cell.append(float(line.split()[1]))
                    if len(self.cell) == len(_CELL):
                        self._begin()
            elif len(row := line.split()) == 7 and row[0] in NUMBER and self.n < self.n_atoms:
                at = np.array([float(x) for x in row[3:6]])
                if self.by_layer and self.template is not None and self.n < self.n_slab:
                    sites = self._sites(self.template, NUMBER[row[0]])
                    away = np.abs(_off(at, self.template.sites[sites])) / self.template.off[sites]
                    self.sites.append(int(sites[away.max(1).argmin()]))
                self.numbers[self.n], self.frac[self.n] = NUMBER[row[0]], at
                self.n += 1
                if self.n == self.n_slab and self.lattice is not None:
                    self._top(self.lattice)

    def _begin(self) -> None:
        a, b, c, alpha, beta, gamma = self.cell
        try:
            lattice = lattice_from_parameters(a, b, c, alpha, beta, gamma)
            self.spacings = 1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
        except (ValueError, np.linalg.LinAlgError):
            return
        if self.spacings.min() >= _THINNEST:
            self.lattice = lattice

    def _top(self, lattice: Floats) -> None:
        height = heights(lattice, self.frac[: self.n])
        level = float(height[height >= height.max() - LAYER_HEIGHT].mean())
        middle = float(height.max() + self.spacings[2]) / 2
        self.levels = float(self.frac[int(height.argmin()), 2]), level, middle

    def bounds(self) -> tuple[str, float, float] | None:
        """What of a length (Å), an angle (degrees) or the volume (Å³) of the cell has been written, `5` of
        `5.346`, and the least and the greatest that it may be; None where none is being written or it may be
        anything. The volume is that of the cell."""
        row, known = self._line.split(" "), len(self.cell)
        if len(row) != 2:
            return None
        if known == len(_CELL):
            if self.lattice is None or not self._line.startswith(_VOLUME):
                return None
            volume = abs(float(np.linalg.det(self.lattice)))
            return row[1], volume, volume
        if not self._line.startswith(_CELL[known]):
            return None
        if self.template is not None:
            low, high = self.template.cell[known]
            return row[1], float(low), float(high)
        return (row[1], 0.0, self.longest) if known < 2 else None

    def free(self, fractions: Floats) -> Bools | None:
        """Which of some values [n] the coordinate that comes next may have; None where all may, where none
        could, and where no coordinate comes next."""
        row = self._line.split()
        if self.lattice is None or self.n >= self.n_atoms or not 3 <= len(row) < 6 or row[0] not in NUMBER:
            return None
        found = self._free(self.lattice, NUMBER[row[0]], [float(x) for x in row[3:]], fractions)
        return None if found is None or found.all() or not found.any() else found

    def _sites(self, template: Template, z: int) -> NDArray[np.int64]:
        """On which of the template's sites, ascending, the slab's next row, of an element, may stand. Where
        rows go by layers: on those of its layer that are left behind the element's last one there, and have
        enough behind them for its further atoms; of layers of which nothing is known on all that are left."""
        if not self.by_layer:
            return np.array([self.n])
        ends = np.cumsum([sum(layer.values()) for layer in template.layers])
        k = int(np.searchsorted(ends, self.n, side="right"))
        first, end = 0, self.n_slab
        if template.layers:
            first, end = int(ends[k - 1]) if k else 0, int(ends[k])
        left = [site for site in range(first, end) if site not in self.sites]
        if template.layers:
            mine = [at for at, of in zip(self.sites, self.numbers) if of == z and at >= first]
            further = template.layers[k][SYMBOLS[z]] - len(mine) - 1
            left = [site for site in left if not mine or site > mine[-1]]
            left = left[: max(len(left) - further, 1)]
        return np.array(left)

    def _free(self, lattice: Floats, z: int, known: list[float], fractions: Floats) -> Bools | None:
        n = self.n
        slab, adsorbate = slice(0, min(n, self.n_slab)), slice(self.n_slab, n)
        radii = COVALENT_RADIUS[self.numbers[:n]] + COVALENT_RADIUS[z]

        def near(part: slice, reach: Floats) -> Bools:
            at = self.frac[:n][part]
            found: Bools = _near(lattice, self.spacings, at, reach, known[0], known[1], fractions)
            return found

        if n < self.n_slab:
            apart = ~near(slab, SLAB_PAIR * radii) if len(known) == 2 else None
            if self.template is None:
                return apart
            sites, k = self._sites(self.template, z), len(known)
            at, off = self.template.sites[sites], self.template.off[sites]
            fits = (np.abs(_off(np.array(known), at[:, :k])) <= off[:, :k]).all(1)
            if fits.any():
                at, off = at[fits], off[fits]
            there: Bools = np.any(np.abs(_off(fractions[:, None], at[:, k])) <= off[:, k], axis=1)
            return there if apart is None or not (there & apart).any() else there & apart
        others = self.numbers[:n][adsorbate]
        # Hydrogen hangs on another element, where there is one.
        bonds = np.full(len(others), self.whole)
        if z == _HYDROGEN and not self.hydrogen:
            bonds &= others != _HYDROGEN
        least, most = LEAST[z, others], MOST[z, others]
        known_of = [self.shape.get((z, other)) for other in others.tolist()]
        shaped = [(self.n_slab + i, limits) for i, limits in enumerate(known_of) if limits is not None]
        if len(known) < 2:
            if not bonds.any():
                return None
            step = float(self.spacings[2]) / len(fractions)  # of the height that is left to choose
            for i, limits in shaped:
                most[i - self.n_slab] = min(most[i - self.n_slab], _sideways_range(limits, step)[1])
            at, reach = self.frac[:n][adsorbate][bonds], _SURE * most[bonds]
            found: Bools = _beside(lattice, self.spacings, at, reach, np.array(known), fractions)
            strict = found.copy()
            for i, limits in shaped if known else ():
                aside = _aside(lattice, known[0] - self.frac[i, 0], fractions - self.frac[i, 1])
                low, high = _sideways_range(limits, step)
                strict &= (aside * _SURE >= low) & (aside <= _SURE * high)
            return strict if strict.any() else found
        bottom, level, middle = self.levels
        height = ((fractions - bottom) % 1.0) * self.spacings[2]
        good: Bools = (height > level + LOWEST) & (height < middle)
        good &= ~near(slab, ADSORBATE_PAIR * radii[slab]) & ~near(adsorbate, least)
        if not bonds.any():
            return good & near(slab, REACH * radii[slab])
        good &= near(adsorbate, np.where(bonds, most, 0.0))
        strict = good.copy()
        for i, (short, long, low, high) in shaped:
            one, above = slice(i, i + 1), height - ((self.frac[i, 2] - bottom) % 1.0) * self.spacings[2]
            strict &= (low <= above) & (above <= high)
            strict &= near(one, np.array([long])) & ~near(one, np.array([short]))
        return strict if strict.any() else good


def _off(frac: Floats, sites: Floats) -> Floats:
    """How far fractional coordinates are from those of sites, round the cell."""
    apart: Floats = frac - sites
    return apart - np.round(apart)


def _sideways_range(limits: tuple[float, float, float, float], step: float) -> tuple[float, float]:
    """How far along the surface an atom is from another at least and at most, by its distance and by how much
    it stands above it, so that heights a `step` apart (Å) leave it one."""
    short, long, low, high = limits
    least = 0.0 if low < 0.0 < high else min(abs(low), abs(high))
    most = max(abs(low), abs(high))
    least = min(least + step, most)
    return max(short**2 - most**2, 0.0) ** 0.5, max(long**2 - least**2, 0.0) ** 0.5


def _aside(lattice: Floats, dx: float, dy: Floats) -> Floats:
    """How far the lines along c through points are apart (Å): [n], by their first and second coordinates'
    difference, the nearest images counted."""
    c = lattice[2] / np.linalg.norm(lattice[2])
    flat = lattice[:2] - np.outer(lattice[:2] @ c, c)
    apart = (dx - round(dx)) * flat[0] + (dy - np.round(dy))[:, None] * flat[1]
    images = np.array([i * flat[0] + j * flat[1] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    found: Floats = np.linalg.norm(apart[:, None] + images, axis=2).min(1)
    return found


@njit(cache=True, nogil=True, inline="always")
def _sideways(cell, p, q):
    """Of the vector p·a + q·b: its square, and its product with c (Å²)."""
    u = p * cell[0, 0] + q * cell[1, 0]
    v = p * cell[0, 1] + q * cell[1, 1]
    w = p * cell[0, 2] + q * cell[1, 2]
    return u * u + v * v + w * w, u * cell[2, 0] + v * cell[2, 1] + w * cell[2, 2]


@njit(cache=True, nogil=True)
def _near(cell, spacings, frac, reach, x, y, fractions):
    """Which third coordinates [n] of a point (x, y, ·) are within `reach` [m] (Å) of an image of any of the
    atoms [m, 3]: along c the line through it cuts each sphere in one interval."""
    found = np.zeros(len(fractions), dtype=np.bool_)
    c = cell[2]
    cc = c[0] * c[0] + c[1] * c[1] + c[2] * c[2]
    for i in range(len(frac)):
        r = reach[i]
        if r <= 0:
            continue
        dx, dy = x - frac[i, 0], y - frac[i, 1]
        a0, a1 = first_and_last(dx, r, spacings[0])
        b0, b1 = first_and_last(dy, r, spacings[1])
        for a in range(a0, a1 + 1):
            for b in range(b0, b1 + 1):
                square, along = _sideways(cell, dx + a, dy + b)
                along /= cc
                inside = along * along - (square - r * r) / cc
                if inside <= 0:
                    continue
                half = np.sqrt(inside)
                begin = frac[i, 2] - along - half
                for k in range(len(fractions)):
                    t = fractions[k] - begin
                    found[k] = found[k] or t - np.floor(t) < 2 * half
    return found


@njit(cache=True, nogil=True)
def _beside(cell, spacings, frac, reach, known, fractions):
    """Which first coordinates [n], or second ones where the first is `known`, leave a point within `reach`
    [m] (Å) of an image of any of the atoms [m, 3]: planes and lines that cut a sphere."""
    found = np.zeros(len(fractions), dtype=np.bool_)
    c = cell[2]
    cc = c[0] * c[0] + c[1] * c[1] + c[2] * c[2]
    for i in range(len(frac)):
        r = reach[i]
        for k in range(len(fractions)):
            if len(known) == 0:
                d = fractions[k] - frac[i, 0]
                d -= np.floor(d + 0.5)
                found[k] = found[k] or abs(d) * spacings[0] < r
                continue
            dx, dy = known[0] - frac[i, 0], fractions[k] - frac[i, 1]
            a0, a1 = first_and_last(dx, r, spacings[0])
            b0, b1 = first_and_last(dy, r, spacings[1])
            for a in range(a0, a1 + 1):
                for b in range(b0, b1 + 1):
                    square, along = _sideways(cell, dx + a, dy + b)
                    found[k] = found[k] or square - along * along / cc < r * r
    return found
