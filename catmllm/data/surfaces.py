"""Random slabs of many kinds with adsorbates and their energies: the protocol of `catmllm data make`.

Wider than `fcc_slabs.py`, by which the shipped systems were made: fcc, bcc and hcp metals and their alloys of
two and three elements; seven facets; cells of one to nine surface atoms a layer, so as many coverages; strain
in the plane; fifteen adsorbates. The exposed atoms of a slab relax, then each adsorbate on the rigid slab,
all those of a slab side by side (BFGS, 0.05 eV/Å). Energy: E(slab + adsorbate) - E(slab) - E_ref, with E_ref
from gases (`oracle.py`). Å and eV throughout. Any potential will do; the default is DIEP, not DFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catmllm.data.fcc_slabs import ADSORBATES as FIRST_ADSORBATES
from catmllm.potentials.hessian import adsorbate_start
from catmllm.potentials.relax import Potential, Relaxed, Start, Structure, relaxed, structure_of
from catmllm.structure.adsorbed import adsorbate_fault
from catmllm.structure.elements import COVALENT_RADIUS, SYMBOLS, atomic_number
from catmllm.structure.formula import count_elements, format_formula, reduce_counts
from catmllm.structure.system import ADSORBATE, BULK, SURFACE, make_system

Floats = NDArray[np.float64]
Record = dict[str, Any]

# Crystal and lattice constants (Å): Kittel, Introduction to Solid State Physics, chapter 1.
METALS: dict[str, tuple[str, float, float]] = {
    "Al": ("fcc", 4.05, 0), "Cu": ("fcc", 3.61, 0), "Ag": ("fcc", 4.09, 0), "Au": ("fcc", 4.08, 0),
    "Ni": ("fcc", 3.52, 0), "Pd": ("fcc", 3.89, 0), "Pt": ("fcc", 3.92, 0), "Rh": ("fcc", 3.80, 0),
    "Ir": ("fcc", 3.84, 0), "Fe": ("bcc", 2.87, 0), "V": ("bcc", 3.03, 0), "Cr": ("bcc", 2.88, 0),
    "Mo": ("bcc", 3.15, 0), "W": ("bcc", 3.16, 0), "Nb": ("bcc", 3.30, 0), "Ta": ("bcc", 3.30, 0),
    "Co": ("hcp", 2.51, 4.07), "Ru": ("hcp", 2.71, 4.28), "Ti": ("hcp", 2.95, 4.68),
    "Zn": ("hcp", 2.66, 4.95), "Re": ("hcp", 2.76, 4.46), "Os": ("hcp", 2.74, 4.32),
    "Zr": ("hcp", 3.23, 5.15),
}  # fmt: skip
# ASE's builder by crystal and Miller index, and sizes (along a, along b, layers) to draw from.
FACETS: dict[str, list[tuple[str, tuple[int, int, int], list[tuple[int, int, int]]]]] = {
    "fcc": [
        ("fcc111", (1, 1, 1), [(2, 2, 3), (2, 2, 3), (2, 1, 3), (3, 2, 3), (3, 3, 3)]),
        ("fcc100", (1, 0, 0), [(2, 2, 3), (2, 2, 3), (2, 1, 3), (3, 2, 3), (3, 3, 3)]),
        ("fcc110", (1, 1, 0), [(2, 1, 4), (2, 2, 4)]),
        ("fcc211", (2, 1, 1), [(3, 1, 3), (3, 2, 3)]),
    ],
    "bcc": [
        ("bcc110", (1, 1, 0), [(2, 2, 3), (2, 2, 3), (2, 1, 3), (3, 2, 3)]),
        ("bcc100", (1, 0, 0), [(2, 2, 4), (2, 1, 4)]),
    ],
    "hcp": [("hcp0001", (0, 0, 1), [(2, 2, 3), (2, 2, 3), (2, 1, 3), (3, 2, 3), (3, 3, 3)])],
}
# Shares of the second and the third element of a bulk.
SHARES = ((0.0, 0.0), (0.25, 0.0), (0.25, 0.0), (0.5, 0.0), (0.25, 0.25))
LARGEST_MISFIT = 1.5  # of the atomic volumes of alloyed metals
STRAINS = (-0.03, 0.03)  # of two slabs in five, along a and b alike
EXPOSED = 0.6  # an atom less than this many neighbour distances under the highest one belongs to the surface
CONTACT = 1.05  # an adsorbate starts where its nearest pair with the slab is this many sums of radii apart
MAX_ENERGY = 8.0  # eV, either sign
SHOWN = 4  # frames of a relaxation in a record: the start and others on the way

# Symbols and positions relative to the atom that binds (Å), as in the gas.
ADSORBATES: dict[str, tuple[tuple[str, ...], tuple[tuple[float, float, float], ...]]] = {
    name: (a.symbols, a.positions) for name, a in FIRST_ADSORBATES.items()
} | {
    "S": (("S",), ((0, 0, 0),)),
    "F": (("F",), ((0, 0, 0),)),
    "Cl": (("Cl",), ((0, 0, 0),)),
    "OOH": (("O", "O", "H"), ((0, 0, 0), (0.94, 0, 1.05), (1.72, 0, 0.48))),
    "CHO": (("C", "H", "O"), ((0, 0, 0), (-0.95, 0, 0.57), (0.98, 0, 0.68))),
    "CH3": (("C", "H", "H", "H"), ((0, 0, 0), (1.03, 0, 0.36), (-0.515, 0.89, 0.36), (-0.515, -0.89, 0.36))),
    "NH2": (("N", "H", "H"), ((0, 0, 0), (0.80, 0, 0.63), (-0.80, 0, 0.63))),
}


@dataclass(frozen=True, eq=False)
class Slab:
    """An unrelaxed slab: tags [N] (surface or bulk), the distance of neighbours in the bulk, the strain."""

    structure: Structure
    tags: NDArray[np.int8]
    miller: tuple[int, int, int]
    nearest: float  # Å
    strain: float


def atomic_volume(metal: str) -> float:
    """Å^3 an atom."""
    crystal, a, c = METALS[metal]
    if crystal == "hcp":
        return math.sqrt(3) / 4 * a * a * c
    return a**3 / (4 if crystal == "fcc" else 2)


def draw_slab(rng: Random) -> Slab:
    """A random slab: metals, their shares, facet, size, strain and who sits where, drawn in that order.

    The crystal is that of the first metal, its volume an atom the mean of the metals' (Vegard's rule).
    """
    import ase.build

    host = rng.choice(list(METALS))
    volume = atomic_volume(host)
    fitting = [
        m for m in METALS if m != host and 1 / LARGEST_MISFIT < atomic_volume(m) / volume < LARGEST_MISFIT
    ]
    second, third = rng.sample(fitting, 2)
    share_2, share_3 = rng.choice(SHARES)
    crystal, a, c = METALS[host]
    builder, miller, sizes = rng.choice(FACETS[crystal])
    size = rng.choice(sizes)
    strain = rng.uniform(*STRAINS) if rng.random() < 0.4 else 0.0
    mean = (1 - share_2 - share_3) * volume + share_2 * atomic_volume(second) + share_3 * atomic_volume(third)
    scale = (mean / volume) ** (1 / 3)
    more = {"c": c * scale} if crystal == "hcp" else {}
    atoms = getattr(ase.build, builder)(host, size, a=a * scale, vacuum=5.0, **more)
    n = len(atoms)
    symbols = [host] * n
    order = rng.sample(range(n), n)
    first, then = round(share_2 * n), round(share_3 * n)
    for place in order[:first]:
        symbols[place] = second
    for place in order[first : first + then]:
        symbols[place] = third
    atoms.set_chemical_symbols(symbols)
    cell = atoms.cell[:].copy()
    cell[:2] *= 1 + strain
    atoms.set_cell(cell, scale_atoms=True)
    nearest = a * scale * {"fcc": math.sqrt(0.5), "bcc": math.sqrt(0.75), "hcp": 1.0}[crystal]
    height = atoms.positions[:, 2]
    tags = np.where(height > height.max() - EXPOSED * nearest, SURFACE, BULK).astype(np.int8)
    order_by_tag = np.argsort(tags, kind="stable")
    atoms, tags = atoms[order_by_tag], tags[order_by_tag]
    return Slab(structure_of(atoms), tags, miller, nearest, strain)


def draw_site(slab: Slab, positions: Floats, rng: Random) -> tuple[str, Floats]:
    """A random site over relaxed positions [N, 3]: its name and its centre [3]."""
    a, b = slab.structure.lattice[:2]
    top = positions[slab.tags == SURFACE]
    images = np.concatenate([top + i * a + j * b for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)])
    origin = top[rng.randrange(len(top))]
    kind = rng.choice(["top", "bridge", "hollow", "hollow"])
    around = _within(images, origin, 1.25 * slab.nearest)
    if kind == "top" or not len(around):
        return "top", origin
    second = around[rng.randrange(len(around))]
    if kind == "hollow":
        thirds = _within(_within(images, origin, 1.25 * slab.nearest), second, 1.5 * slab.nearest)
        if len(thirds):
            third = thirds[rng.randrange(len(thirds))]
            square = np.linalg.norm(third - second) > 1.25 * slab.nearest
            return kind, (second + third) / 2 if square else (origin + second + third) / 3
    return "bridge", (origin + second) / 2


def _within(points: Floats, centre: Floats, reach: float) -> Floats:
    distance = np.linalg.norm(points - centre, axis=1)
    return points[(distance > 0.1) & (distance < reach)]


def place(slab: Slab, positions: Floats, name: str, rng: Random) -> tuple[str, Structure]:
    """An adsorbate on a random site, blurred sideways (0.08 Å), turned about the normal, and lowered until it
    touches: the name of the site and the start structure."""
    symbols, relative = ADSORBATES[name]
    kind, centre = draw_site(slab, positions, rng)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    molecule = np.array(relative, dtype=np.float64) @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1.0]])
    molecule += [centre[0] + rng.gauss(0, 0.08), centre[1] + rng.gauss(0, 0.08), 0.0]
    own = np.array([atomic_number(s) for s in symbols])
    a, b = slab.structure.lattice[:2]
    shifts = np.array([i * a + j * b for i in (-1, 0, 1) for j in (-1, 0, 1)])
    images = (positions[None] + shifts[:, None]).reshape(-1, 3)
    radii = np.tile(COVALENT_RADIUS[slab.structure.numbers], len(shifts))
    lowest = -np.inf
    for atom, number in zip(molecule, own):
        touch = CONTACT * (radii + COVALENT_RADIUS[number])
        beside = ((images[:, :2] - atom[:2]) ** 2).sum(1)
        near = beside < touch**2
        if near.any():
            lowest = max(
                lowest, float((images[near, 2] + np.sqrt(touch[near] ** 2 - beside[near])).max() - atom[2])
            )
    molecule[:, 2] += lowest
    numbers = np.concatenate([slab.structure.numbers, own])
    free = np.arange(len(numbers)) >= len(positions)
    return kind, Structure(numbers, slab.structure.lattice, np.concatenate([positions, molecule]), free)


def surface_records(
    rng: Random, label: str, per_slab: int, potential: Potential, references: Mapping[str, float]
) -> Iterator[Record]:
    """Draw and relax one slab, then yield `per_slab` labelled systems on it.

    A record has what a shipped one has, and besides: `strain`; `reason`, why it does not count (`refusal`),
    None where it does; `frames`, up to `SHOWN` positions of the adsorbate on its way with their adsorption
    energies (eV), the start first.
    """
    slab = draw_slab(rng)
    (base,) = relaxed([Start(_free(slab))], potential, max_steps=60)
    names = [rng.choice(list(ADSORBATES)) for _ in range(per_slab)]
    sites, structures = zip(*(place(slab, base.positions, name, rng) for name in names))
    ends = relaxed([adsorbate_start(s) for s in structures], potential, longest=0.15, frames=True)
    for k, (name, site, structure, end) in enumerate(zip(names, sites, structures, ends)):
        yield _record(f"diep-{label}-{k}", label, slab, base, name, site, structure, end, references)


def _free(slab: Slab) -> Structure:
    s = slab.structure
    return Structure(s.numbers, s.lattice, s.positions, slab.tags == SURFACE)


def _record(
    sid: str,
    label: str,
    slab: Slab,
    base: Relaxed,
    name: str,
    site: str,
    structure: Structure,
    end: Relaxed,
    references: Mapping[str, float],
) -> Record:
    symbols, _ = ADSORBATES[name]
    zero = base.energy + sum(references[s] for s in symbols)
    energy = end.energy - zero
    n = len(slab.tags)
    tags = [*slab.tags.tolist(), *[ADSORBATE] * len(symbols)]
    record: Record = {
        "sid": sid,
        "slab": label,
        "adsorbate": name,
        "bulk": format_formula(reduce_counts(count_elements(_symbols(structure)[:n]))[0]),
        "miller": list(slab.miller),
        "start_site": site,
        "strain": round(slab.strain, 5),
        "energy": round(energy, 5) if math.isfinite(energy) else None,
        "ok": False,
        "reason": None,
        "converged": end.converged,
        "steps": end.steps,
        "symbols": _symbols(structure),
        "cell": np.round(structure.lattice, 5).tolist(),
        "pos_start": np.round(structure.positions, 4).tolist(),
        "pos": np.round(end.positions, 4).tolist(),
        "tags": tags,
        "fixed": list(range(n)),
        "frames": [
            {"pos": np.round(positions[n:], 4).tolist(), "energy": round(total - zero, 5)}
            for positions, total in _spread(end.frames[:-1])
            if math.isfinite(total - zero)
        ],
    }
    record["reason"] = refusal(record, base, end, energy)
    record["ok"] = record["reason"] is None
    return record


def _symbols(structure: Structure) -> list[str]:
    return [SYMBOLS[z] for z in structure.numbers]


def _spread(frames: Sequence[tuple[Floats, float]]) -> list[tuple[Floats, float]]:
    """At most `SHOWN` of them, the first among them."""
    step = max(1, -(-len(frames) // SHOWN))
    return list(frames[::step])


def refusal(record: Record, slab: Relaxed, end: Relaxed, energy: float) -> str | None:
    """Why a relaxed system does not count, or None: `slab` (it did not converge), `failed`, `not_converged`,
    `energy_out_of_range` (beyond 8 eV) or what is wrong with its adsorbate (`adsorbate_fault`)."""
    if slab.failed or not slab.converged:
        return "slab"
    if end.failed or not math.isfinite(energy):
        return "failed"
    if not end.converged:
        return "not_converged"
    if abs(energy) >= MAX_ENERGY:
        return "energy_out_of_range"
    numbers = [atomic_number(s) for s in record["symbols"]]
    tags, miller = record["tags"], record["miller"]
    return adsorbate_fault(
        make_system(record["cell"], end.positions, numbers, tags, record["adsorbate"], miller)
    )
