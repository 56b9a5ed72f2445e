"""`System`, the one structure type: a crystal with tags, adsorbate, Miller index and energy.

Every System is in the standard orientation (a along x, b in the xy plane with y > 0, right-handed): six cell
parameters then say all of its lattice, and a CIF and its source are the same to an encoder. Most OC20 frames
are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catmllm.structure.elements import SYMBOLS
from catmllm.structure.formula import (
    Miller,
    count_elements,
    format_formula,
    format_identity,
    reduce_counts,
    text_identity,
)
from rewards_fast import Crystal

if TYPE_CHECKING:
    from ase import Atoms

BULK, SURFACE, ADSORBATE = 0, 1, 2  # values of `System.tags`


@dataclass(frozen=True, eq=False, kw_only=True)
class System(Crystal):
    """An adsorption system; make it with `make_system`, which checks and rotates.

    From Crystal: lattice float64 [3, 3] (rows a, b, c, Å), frac float64 [N, 3], numbers int64 [N]. tags int8
    [N]: 0 bulk, 1 surface, 2 adsorbate. adsorbate: its name as published, `CHCH2OH`. miller: None where
    unknown. energy: adsorption energy (eV), None where unknown. sid: where the system is from. start: where
    the atoms stood before the relaxation, as frac, None where unknown. text: the words of a system of which
    nothing else is known (`text_system`): it has no atoms; None where there is a structure. relaxed: false
    where the atoms need not stand where the forces on them vanish, as in a start or a design.
    """

    tags: NDArray[np.int8]
    adsorbate: str
    miller: Miller | None = None
    energy: float | None = None
    sid: str = ""
    start: NDArray[np.float64] | None = None
    text: str | None = None
    relaxed: bool = True

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def symbols(self) -> list[str]:
        """Element symbols [N]."""
        return [SYMBOLS[z] for z in self.numbers]

    @property
    def target(self) -> dict[str, int]:
        """Counts by element of the whole cell, in canonical order."""
        return count_elements(self.symbols)

    @property
    def slab_counts(self) -> dict[str, int]:
        """Counts by element of the atoms that are not adsorbate, in canonical order; of a system without a
        structure those of the composition that its text names."""
        if self.text is not None:
            return text_identity(self.text).slab
        return count_elements(SYMBOLS[z] for z in self.numbers[self.tags != ADSORBATE])

    @property
    def slab_formula(self) -> str:
        """`Pd6Ir6`: every slab atom counted."""
        return format_formula(self.slab_counts)

    @property
    def bulk(self) -> str:
        """`PdIr`: the reduced formula of the slab."""
        return format_formula(reduce_counts(self.slab_counts)[0])

    @property
    def identity(self) -> str:
        """`CO</s>Pd6Ir6 (1 1 1)`, the line that names a system in CIF tasks; the begin of a text that says no
        such thing."""
        if self.text is not None and not self.slab_counts:
            return self.text[:60]
        return format_identity(self.adsorbate, self.slab_counts, self.miller)

    @property
    def known_miller(self) -> Miller:
        """The Miller index. Raises ValueError where it is unknown."""
        if self.miller is None:
            raise ValueError(f"system {self.sid!r} has no Miller index; give `miller` when it is made")
        return self.miller

    @property
    def known_energy(self) -> float:
        """The adsorption energy (eV). Raises ValueError where it is unknown."""
        if self.energy is None:
            raise ValueError(f"system {self.sid!r} has no energy; give `energy` when it is made")
        return self.energy

    def frame(self, progress: float) -> System:
        """The system on its way from the start (0) to the relaxed structure (1), on straight lines; its
        energy stays that of the relaxed one, and it is `relaxed` at 1 only. Raises ValueError where the start
        is unknown."""
        if self.start is None:
            raise ValueError(f"system {self.sid!r} has no start; give `start_positions` when it is made")
        way = self.frac - self.start
        way -= np.round(way)
        return replace(self, frac=self.frac - (1.0 - progress) * way, relaxed=self.relaxed and progress == 1)

    def as_ase(self) -> Atoms:
        """The same as ase.Atoms, periodic in three directions, with tags."""
        from ase import Atoms

        return Atoms(
            numbers=self.numbers, positions=self.positions, cell=self.lattice, tags=self.tags, pbc=True
        )


def make_system(
    lattice: ArrayLike,
    positions: ArrayLike | None,
    numbers: ArrayLike,
    tags: ArrayLike,
    adsorbate: str,
    miller: Miller | None,
    energy: float | None = None,
    sid: str = "",
    *,
    frac: ArrayLike | None = None,
    start_positions: ArrayLike | None = None,
) -> System:
    """A checked System in the standard orientation.

    lattice: [3, 3], rows in Å, any right-handed orientation. positions: [N, 3] in Å, or None with frac [N, 3]
    instead. numbers, tags: [N]. start_positions: [N, 3] in Å, before the relaxation. Raises ValueError for a
    left-handed or flat cell, for anything non-finite and for shapes, atomic numbers or tags that do not fit.
    """
    if (positions is None) == (frac is None):
        raise ValueError("give either positions or frac")
    cell = np.array(lattice, dtype=np.float64)
    standard = standard_lattice(cell)
    if frac is None:
        frac = _fractional(cell, positions)
    fractional = np.array(frac, dtype=np.float64, order="C").reshape(-1, 3)
    z = np.array(numbers, dtype=np.int64)
    tag = np.array(tags, dtype=np.int8)
    n = len(fractional)
    if n == 0 or z.shape != (n,) or tag.shape != (n,):
        raise ValueError(
            f"{n} positions, numbers {z.shape} and tags {tag.shape}: one of each an atom, at least one"
        )
    if not np.isfinite(fractional).all():
        raise ValueError(
            f"atom {int(np.argmin(np.isfinite(fractional).all(axis=1)))} has a non-finite position"
        )
    start = None if start_positions is None else _fractional(cell, start_positions)
    if start is not None and (start.shape != fractional.shape or not np.isfinite(start).all()):
        raise ValueError(f"the start of {sid!r} must have a finite position for each of the {n} atoms")
    if not (z.min() >= 1 and z.max() < len(SYMBOLS)):
        raise ValueError(f"atomic numbers are 1 to {len(SYMBOLS) - 1}, not {sorted(set(z.tolist()))}")
    if not (tag.min() >= BULK and tag.max() <= ADSORBATE):
        raise ValueError(f"tags are 0 (bulk), 1 (surface) and 2 (adsorbate), not {sorted(set(tag.tolist()))}")
    if energy is not None and not np.isfinite(energy):
        raise ValueError(f"the energy of {sid!r} is {energy}")
    if miller is not None:
        h, k, l = miller
        miller = (int(h), int(k), int(l))
    return System(
        lattice=standard,
        frac=fractional,
        numbers=z,
        tags=tag,
        adsorbate=adsorbate,
        miller=miller,
        energy=None if energy is None else float(energy),
        sid=sid,
        start=start,
    )


def text_system(text: str, energy: float | None = None, sid: str = "") -> System:
    """A system of which only words are known, the three-part text or any other; it has no atoms. Adsorbate
    and Miller index are those of a three-part text. Raises ValueError for an empty text or energy that is no
    number."""
    if not text.strip():
        raise ValueError(f"the text of {sid!r} is empty")
    if energy is not None and not np.isfinite(energy):
        raise ValueError(f"the energy of {sid!r} is {energy}")
    identity = text_identity(text)
    return System(
        lattice=np.eye(3),
        frac=np.empty((0, 3)),
        numbers=np.empty(0, dtype=np.int64),
        tags=np.empty(0, dtype=np.int8),
        adsorbate=identity.adsorbate,
        miller=identity.miller,
        energy=energy,
        sid=sid,
        text=text,
    )


def _fractional(cell: NDArray[np.float64], positions: ArrayLike | None) -> NDArray[np.float64]:
    """Fractional coordinates [N, 3] of positions in Å."""
    columns = np.array(positions, dtype=np.float64).reshape(-1, 3).T
    return np.asarray(np.linalg.solve(cell.T, columns).T, dtype=np.float64)


def standard_lattice(lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lattice [3, 3] (rows, Å) turned so that a is along x and b in the xy plane with y > 0.

    A lattice that stands so already comes back bit for bit. Raises ValueError for a left-handed or flat cell.
    """
    rows = lattice.tolist()  # nine numbers: every call of NumPy takes longer than this arithmetic
    if lattice.shape != (3, 3) or not all(math.isfinite(x) for row in rows for x in row):
        raise ValueError(f"a lattice is a finite 3x3 matrix (rows a, b, c in Å), not {rows}")
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = rows
    lengths = [math.hypot(*row) for row in rows]
    volume = ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)
    if not abs(volume) > 1e-9 * math.prod(lengths):
        raise ValueError(f"the cell is flat: volume {volume:g} Å³ with edges {lengths} Å")
    if volume < 0:
        raise ValueError(
            f"the cell is left-handed (volume {volume:.3f} Å³): exchange the vectors a and b, and with them "
            "the first two fractional coordinates; that is the same crystal in a right-handed cell"
        )
    if ay == az == bz == 0 and ax > 0 and by > 0 and cz > 0:
        return lattice.copy()
    (ax, bx, cx), (_, by, cy), (_, _, cz) = np.asarray(np.linalg.qr(lattice.T, mode="r")).tolist()
    x, y, z = (math.copysign(1.0, length) for length in (ax, by, cz))
    return np.array([[ax * x, 0, 0], [bx * x, by * y, 0], [cx * x, cy * y, cz * z]])


def lattice_from_parameters(
    a: float, b: float, c: float, alpha: float, beta: float, gamma: float
) -> NDArray[np.float64]:
    """The standard lattice [3, 3] (rows, Å) of six cell parameters (Å, degrees).
    ValueError if they make no cell."""
    angles = (alpha, beta, gamma)
    cos_a, cos_b, cos_g = (0.0 if angle == 90 else float(np.cos(np.radians(angle))) for angle in angles)
    sin_g = float(np.sin(np.radians(gamma)))
    x, y = cos_b, (cos_a - cos_b * cos_g) / sin_g if sin_g else np.nan
    z_squared = 1 - x * x - y * y
    if not (min(a, b, c) > 0 and all(0 < angle < 180 for angle in angles) and z_squared > 0):
        raise ValueError(f"no cell has edges {a}, {b}, {c} Å and angles {alpha}, {beta}, {gamma} degrees")
    return np.array(
        [[a, 0, 0], [b * cos_g, b * sin_g, 0], [c * x, c * y, c * np.sqrt(z_squared)]], dtype=np.float64
    )


def lattice_parameters(lattice: NDArray[np.float64]) -> tuple[float, float, float, float, float, float]:
    """a, b, c (Å) and alpha, beta, gamma (degrees) of a lattice [3, 3]."""
    a, b, c = lattice

    def angle(u: NDArray[np.float64], v: NDArray[np.float64]) -> float:
        # exact near 90, unlike arccos
        return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(u, v)), u @ v)))

    lengths = [float(np.linalg.norm(v)) for v in (a, b, c)]
    return lengths[0], lengths[1], lengths[2], angle(b, c), angle(a, c), angle(a, b)
