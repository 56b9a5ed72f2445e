"""Random fcc slabs with adsorbates and their energies: the protocol by which the shipped systems were made.

A 2x2 slab of three layers, fcc (111) or (100), of one metal or of an A3B or AB alloy with the arrangement
random in each layer, is relaxed with its two lower layers fixed. It is then held rigid, while each adsorbate
relaxes from a random top, bridge or hollow start (BFGS, 0.05 eV/Å). Energy: E(slab + adsorbate) - E(slab) -
E_ref, with E_ref from H2, H2O, N2 and CO (`oracle.py`). Å and eV throughout. Any ASE calculator will do; the
shipped labels are SevenNet-0's, not DFT.

The order of the random draws is part of the protocol:
`make.py --check` repeats the first shipped systems by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from catmllm.potentials.relax import BLOWN_UP

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

Record = dict[str, Any]

# fcc lattice constants, Å, near SevenNet-0's own
FCC_CONSTANT = {
    "Al": 4.05,
    "Cu": 3.63,
    "Ag": 4.15,
    "Au": 4.16,
    "Ni": 3.52,
    "Pd": 3.95,
    "Pt": 3.97,
    "Rh": 3.83,
    "Ir": 3.88,
}
N_SLAB = 12  # atoms of a slab, four a layer, the bottom layer first
FIXED_IN_SLAB = range(8)
TOP_LAYER = slice(8, 12)
BROKEN_BOND = 1.35  # a bond longer than this many gas-phase lengths is broken
HEIGHT_RANGE = (-0.8, 2.4)  # Å, lowest adsorbate atom over the highest slab atom, of what counts as adsorbed
MAX_ENERGY = 8.0  # eV, either sign


@dataclass(frozen=True)
class Adsorbate:
    """A species to place: symbols, positions relative to the atom that binds, and start heights (Å)."""

    symbols: tuple[str, ...]
    positions: tuple[tuple[float, float, float], ...]
    heights: tuple[float, float, float, float]  # over a top, a bridge, a threefold and a fourfold site
    bond: float = 0.0  # gas-phase length, Å; 0 for an atom


_ATOM = ((0.0, 0.0, 0.0),)
ADSORBATES = {
    "H": Adsorbate(("H",), _ATOM, (1.55, 1.05, 0.85, 0.50)),
    "O": Adsorbate(("O",), _ATOM, (1.80, 1.40, 1.20, 0.85)),
    "N": Adsorbate(("N",), _ATOM, (1.75, 1.30, 1.10, 0.70)),
    "C": Adsorbate(("C",), _ATOM, (1.75, 1.30, 1.05, 0.60)),
    "CO": Adsorbate(("C", "O"), (*_ATOM, (0.0, 0.0, 1.16)), (1.85, 1.45, 1.30, 1.10), bond=1.16),
    "OH": Adsorbate(("O", "H"), (*_ATOM, (0.60, 0.30, 0.75)), (1.95, 1.60, 1.45, 1.30), bond=0.98),
    "NH": Adsorbate(("N", "H"), (*_ATOM, (0.0, 0.0, 1.03)), (1.80, 1.40, 1.20, 0.90), bond=1.03),
    "CH": Adsorbate(("C", "H"), (*_ATOM, (0.0, 0.0, 1.10)), (1.80, 1.40, 1.15, 0.80), bond=1.10),
}


@dataclass
class Slab:
    """A relaxed slab with what its records say of it."""

    atoms: Atoms
    facet: str
    bulk: str
    constant: float  # Å, of the fcc cell
    energy: float = math.nan  # eV
    relaxed: bool = False


def draw_slab(rng: Random) -> Slab:
    """A random unrelaxed slab. Draws: facet, two metals, share of the second, its places layer by layer."""
    facet = rng.choice(["111", "100"])
    host, guest = rng.sample(list(FCC_CONSTANT), 2)
    return build_slab(facet, host, guest, rng.choice([0.0, 0.25, 0.25, 0.5]), rng)


def build_slab(facet: str, host: str, guest: str, share: float, rng: Random) -> Slab:
    """An unrelaxed slab with `share` (0, 0.25 or 0.5) of a second metal, at random places of each layer."""
    from ase.build import fcc100, fcc111

    constant = (1 - share) * FCC_CONSTANT[host] + share * FCC_CONSTANT[guest]
    build = fcc111 if facet == "111" else fcc100
    atoms = build(host, (2, 2, 3), a=constant, vacuum=5.0, periodic=True)
    symbols = [host] * N_SLAB
    for start in range(0, N_SLAB, 4):
        for place in rng.sample(range(start, start + 4), int(4 * share)):
            symbols[place] = guest
    atoms.set_chemical_symbols(symbols)
    bulk = {0.0: host, 0.25: f"{host}3{guest}", 0.5: f"{host}{guest}"}[share]
    return Slab(atoms, facet, bulk, constant)


def relax_slab(slab: Slab, calculator: Calculator) -> None:
    """Relax the top layer in place and fill in `energy` and `relaxed`;
    a slab that blows up stays as it was built."""
    from ase.constraints import FixAtoms
    from ase.optimize import BFGS

    slab.atoms.set_constraint(FixAtoms(indices=list(FIXED_IN_SLAB)))
    slab.atoms.calc = calculator
    built = slab.atoms.positions.copy()
    try:
        slab.relaxed = bool(BFGS(slab.atoms, logfile=None).run(fmax=0.05, steps=60))
        slab.energy = float(slab.atoms.get_potential_energy())
    except BLOWN_UP:
        slab.atoms.positions[:] = built


def draw_site(slab: Slab, rng: Random) -> tuple[str, int, NDArray[np.float64]]:
    """A random adsorption site: its name, the index of its start height, its centre [3] in the top layer.

    Neighbours are sorted by distance, and those at the same distance are told apart by the last bits. A
    rewrite of the distance would reorder them, and the shipped systems would come out on other (equivalent)
    sites.
    """
    top = slab.atoms.positions[TOP_LAYER]
    a, b = slab.atoms.cell[0], slab.atoms.cell[1]
    nearest = slab.constant / np.sqrt(2)  # neighbour distance of the fcc lattice
    origin = rng.choice(list(top))

    def distance(point: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float(np.linalg.norm(point - other))

    images = [point + i * a + j * b for point in top for i in (-1, 0, 1) for j in (-1, 0, 1)]
    images.sort(key=lambda point: distance(point, origin))
    around = [point for point in images[1:] if distance(point, origin) < 1.15 * nearest]

    kind = rng.choice(["top", "bridge", "hollow", "hollow"])
    if kind == "top":
        return kind, 0, origin
    second = rng.choice(around)
    bridge = "bridge", 1, (origin + second) / 2
    if kind == "bridge":
        return bridge
    if slab.facet == "111":
        beside = [p for p in around if 0.5 < distance(p, second) < 1.15 * nearest]
        return (kind, 2, (origin + second + rng.choice(beside)) / 3) if beside else bridge
    across = [p for p in around if 1.2 * nearest < distance(p, second) < 1.6 * nearest]
    if not across:  # a surface this rumpled has no square left
        return bridge
    third = rng.choice(across)
    return kind, 3, (origin + second + third + (second + third - origin)) / 4


def draw_adsorption(slab: Slab, rng: Random) -> tuple[str, str, Atoms]:
    """A random adsorbate on a random site of the slab: its name, the site's name and the start structure.

    The site is blurred sideways (0.08 Å) and the adsorbate turned about the surface normal.
    """
    return place_adsorbate(slab, rng.choice(list(ADSORBATES)), rng)


def place_adsorbate(slab: Slab, name: str, rng: Random) -> tuple[str, str, Atoms]:
    """The same of a given adsorbate."""
    from ase import Atoms

    adsorbate = ADSORBATES[name]
    kind, height, centre = draw_site(slab, rng)
    shift = np.array([rng.gauss(0, 0.08), rng.gauss(0, 0.08), adsorbate.heights[height]])
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])  # row vectors
    system = slab.atoms.copy()
    system.extend(
        Atoms(list(adsorbate.symbols), positions=np.array(adsorbate.positions) @ turn + centre + shift)
    )
    return name, kind, system


def relax_adsorbate(system: Atoms, calculator: Calculator) -> tuple[bool, float, int]:
    """Relax the adsorbate on the rigid slab, in place: converged?,
    total energy (eV, nan if it blew up), steps."""
    from ase.constraints import FixAtoms
    from ase.optimize import BFGS

    system.set_constraint(FixAtoms(indices=list(range(N_SLAB))))
    system.calc = calculator
    optimizer = BFGS(system, logfile=None, maxstep=0.15)
    start = system.positions.copy()
    try:
        converged = bool(optimizer.run(fmax=0.05, steps=80))
        energy = float(system.get_potential_energy())
    except BLOWN_UP:
        system.positions[:] = start
        return False, math.nan, int(optimizer.nsteps)  # recorded as not ok, never hidden
    return converged, energy, int(optimizer.nsteps)


def slab_records(
    rng: Random, label: str, per_slab: int, calculator: Calculator, references: dict[str, float]
) -> Iterator[Record]:
    """Draw and relax one slab, then yield `per_slab` labelled systems on it, in the shipped record layout."""
    slab = draw_slab(rng)
    relax_slab(slab, calculator)
    for k in range(per_slab):
        name, kind, system = draw_adsorption(slab, rng)
        start = system.positions.copy()
        converged, total, steps = relax_adsorbate(system, calculator)
        adsorbate = ADSORBATES[name]
        energy = total - slab.energy - sum(references[s] for s in adsorbate.symbols)
        height = float(system.positions[N_SLAB:, 2].min() - system.positions[TOP_LAYER, 2].max())
        broken = bool(
            adsorbate.bond
            and system.get_distance(N_SLAB, N_SLAB + 1, mic=True) > BROKEN_BOND * adsorbate.bond
        )
        adsorbed = HEIGHT_RANGE[0] < height < HEIGHT_RANGE[1] and abs(energy) < MAX_ENERGY
        yield {
            "sid": f"7net-{label}-{k}",
            "slab": label,
            "adsorbate": name,
            "bulk": slab.bulk,
            "miller": [int(digit) for digit in slab.facet],
            "start_site": kind,
            "energy": round(energy, 5) if math.isfinite(energy) else None,  # None: it blew up
            "ok": bool(slab.relaxed and converged and not broken and adsorbed),
            "converged": converged,
            "dissociated": broken,
            "height": round(height, 3) if math.isfinite(height) else None,
            "steps": steps,
            "symbols": system.get_chemical_symbols(),
            "cell": np.round(system.cell[:], 5).tolist(),
            "pos_start": np.round(start, 4).tolist(),
            "pos": np.round(system.positions, 4).tolist(),
            "tags": [0] * 8 + [1] * 4 + [2] * len(adsorbate.symbols),
            "fixed": list(range(N_SLAB)),
        }
